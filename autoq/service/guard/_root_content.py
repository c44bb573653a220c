"""What may lie in a folder that a client names: links that stay inside, and nothing that runs."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from autoq.errors import DataError, InputError

_MAXIMUM_ENTRIES = 20_000
_MAXIMUM_STATE_BYTES = 4 << 20

_DATA_SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")
_FOLDER_SUFFIXES = (".txt", ".jsonl", ".parquet")
_SAVED_SUFFIXES = (".arrow", ".json")
_SAVED_STATES = ("state.json", "dataset_dict.json")


def check_content(
    folder: Path, bounds: Sequence[Path], shown: str, refusal: type[InputError]
) -> None:
    """Refuse a folder with links that lead out of `bounds`, or with what is no file.

    Whoever opens a model reads some of its files by name, and follows links then.

    Args:
        folder: without links.
        bounds: folders, without links.
        shown: the folder, as the client wrote it.
    Raises:
        refusal: it is no folder; or there is such a link, a device, socket or pipe, or more entries
            than can be looked at.
    """
    if not os.path.isdir(folder):
        raise refusal(f"a model is a folder, and {shown!r} is none; give the folder it lies in")
    for _ in _checked_files(folder, bounds, shown, refusal):
        pass


def check_data(path: Path, bounds: Sequence[Path], shown: str) -> None:
    """Refuse data that could name other data, or that takes unpickling.

    Args:
        path: file or folder, without links.
        bounds: as in `check_content`.
        shown: the path, as the client wrote it.
    Raises:
        DataError: a file of another kind, or a folder with one; or as `check_content`.
    """
    if ":" in shown:
        raise DataError(
            f"data are a file or folder, without a split or configuration, got {shown!r}; leave "
            "out what begins with :"
        )
    if os.path.isdir(path):
        _check_data_folder(path, bounds, shown)
        return
    if not os.path.isfile(path) or path.suffix not in _DATA_SUFFIXES:
        raise DataError(
            f"a data file is one of {', '.join(_DATA_SUFFIXES)}, got {shown!r}; convert it (token "
            "ids with numpy.save)"
        )


def _check_data_folder(folder: Path, bounds: Sequence[Path], shown: str) -> None:
    is_saved = any(os.path.isfile(folder / name) for name in _SAVED_STATES)
    allowed = _SAVED_SUFFIXES if is_saved else _FOLDER_SUFFIXES
    for file in _checked_files(folder, bounds, shown, DataError):
        # A dataset's card or script may name data elsewhere, on this machine or another.
        if file.suffix not in allowed:
            raise DataError(
                f"this folder of data holds nothing but {', '.join(allowed)} files, and {shown!r} "
                f"has {file.name!r}; take it out"
            )
        if file.name == "state.json":
            _check_state(file, shown)


def _check_state(state: Path, shown: str) -> None:
    """Refuse a saved dataset whose parts lie elsewhere."""
    try:
        if state.stat().st_size > _MAXIMUM_STATE_BYTES:
            raise ValueError("too large")
        names = [part["filename"] for part in json.loads(state.read_bytes())["_data_files"]]
        strange = [name for name in names if os.path.basename(name) != name]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"a saved dataset has a state.json that lists its files, and that of {shown!r} does "
            "not; write it again with save_to_disk"
        ) from error
    if strange:
        raise DataError(
            f"a saved dataset lists files of its own folder, and {shown!r} lists {strange[0]!r}; "
            "write it again with save_to_disk"
        )


def _checked_files(
    folder: Path, bounds: Sequence[Path], shown: str, refusal: type[InputError]
) -> Iterator[Path]:
    """The folder's files, at any depth; hidden folders are left out, which no reader opens."""
    seen = 0
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        seen += len(folders) + len(files)
        if seen > _MAXIMUM_ENTRIES:
            raise refusal(
                f"a folder has at most {_MAXIMUM_ENTRIES} entries, and {shown!r} has more; give "
                "one that holds nothing else"
            )
        for name in (*folders, *files):
            _check_entry(Path(place, name), folder, bounds, shown, refusal)
        yield from (Path(place, name) for name in files)


def _check_entry(
    entry: Path, folder: Path, bounds: Sequence[Path], shown: str, refusal: type[InputError]
) -> None:
    inside = entry.relative_to(folder)
    if os.path.islink(entry):
        target = Path(os.path.realpath(entry))
        if not any(target.is_relative_to(bound) for bound in bounds):
            raise refusal(
                f"links must stay in the folders that the server may use, and {str(inside)!r} in "
                f"{shown!r} leads out of them; copy the file, or give the server the folder that "
                "holds both"
            )
    try:
        mode = os.stat(entry).st_mode
    except OSError:
        return  # a link to nothing or in a circle, or removed meanwhile: whoever opens it says so
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise refusal(
            f"a folder holds files, and {str(inside)!r} in {shown!r} is a device, socket or pipe; "
            "take it out"
        )
