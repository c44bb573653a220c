"""Where output goes: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from autoq.cli._failures import debugging
from autoq.errors import InputError

_QUIET_ENVIRONMENT = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and warnings off the terminal.

    Works for libraries that are not loaded yet. What the user set in the environment stays.
    """
    if debugging():
        return
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    for name in ("alembic", "datasets", "optuna", "sqlalchemy", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def results_kept_clean() -> Iterator[None]:
    """While work runs, whatever prints to standard output prints to standard error instead.

    Native code is diverted too, where standard output is a real file descriptor.
    """
    sys.stdout.flush()
    with redirect_stdout(sys.stderr):
        saved = _divert_descriptor()
        try:
            yield
        finally:
            if saved is not None:
                os.dup2(saved, 1)
                os.close(saved)


def _divert_descriptor() -> int | None:
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:
        return None
    return saved


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output; NaN and infinities become null."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def print_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of text on standard output, as wide as its longest cells.

    As `_tables.plain_table`, but for thousands of rows, and without what that one loads.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = "─" * (sum(widths) + 3 * len(widths) - 1)
    lines = [
        " "
        + "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    print("\n".join(["", lines[0], f" {rule}", *lines[1:], ""]))


def plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "item"):  # a numpy scalar
        return plain(value.item())
    return str(value)


def check_writable(path: Path | None) -> None:
    """Refuse a file that could not be written, before any work is done.

    Raises:
        InputError: the path is a folder, or its folder does not exist or cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist; create it or name another file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(f"{path} cannot be written; name another file or change its permissions")


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or not there at all.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # writing to an open file does not say which
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
