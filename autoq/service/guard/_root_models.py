"""Which models there are below a folder."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autoq.wire import ModelEntry

_MAXIMUM_DEPTH = 4  # a hub's cache needs 3: models--NAME/snapshots/REVISION
_MAXIMUM_MODELS = 1000
_MAXIMUM_FOLDERS = 20_000
_MAXIMUM_CONFIG_BYTES = 4 << 20


def find_models(name: str, root: Path, bounds: Sequence[Path]) -> list[ModelEntry]:
    """The models at or below a root, by path; no more than 1000.

    Looks no deeper than four folders and into no more than 20,000; leaves out hidden folders, links
    out of `bounds`, folders without a config.json or safetensors files, and quantised models.

    Args:
        name: that stands for the root.
        root: without links.
        bounds: folders that links may lead to.
    """
    found: list[ModelEntry] = []
    seen: set[Path] = set()
    waiting: deque[tuple[Path, tuple[str, ...]]] = deque([(root, ())])
    while waiting and len(found) < _MAXIMUM_MODELS and len(seen) < _MAXIMUM_FOLDERS:
        folder, inside = waiting.popleft()
        real = Path(os.path.realpath(folder))
        if real in seen or not any(real.is_relative_to(bound) for bound in bounds):
            continue
        seen.add(real)
        if os.path.isfile(folder / "config.json"):
            found += _entry(folder, "/".join((name, *inside)), bounds)
        elif len(inside) < _MAXIMUM_DEPTH:
            waiting += [(folder / sub, (*inside, sub)) for sub in _folders(folder)]
    return sorted(found, key=lambda entry: entry.path)


def _folders(folder: Path) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    # False, too, of links in a circle.
    return sorted(n for n in names if _can_be_named(n) and os.path.isdir(folder / n))


def _can_be_named(name: str) -> bool:
    """Whether a path from the network can have this part."""
    return name[:1] not in ".-" and name.isprintable() and "\\" not in name


def _entry(folder: Path, path: str, bounds: Sequence[Path]) -> Iterator[ModelEntry]:
    """The folder's entry, if it is a model to search."""
    config = _config(folder / "config.json", bounds)
    if config is None or "quantization_config" in config:
        return
    if os.path.exists(folder / "hf_quant_config.json"):
        return
    size = _weight_bytes(folder)
    if size:
        yield ModelEntry(path=path, architecture=_architecture(config), bytes=size)


def _config(file: Path, bounds: Sequence[Path]) -> dict[str, Any] | None:
    real = Path(os.path.realpath(file))
    if not any(real.is_relative_to(bound) for bound in bounds):
        return None
    try:
        if real.stat().st_size > _MAXIMUM_CONFIG_BYTES:
            return None
        content = json.loads(real.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0][:200].encode("utf-8", "replace").decode()  # JSON may escape what is no text
    return None


def _weight_bytes(folder: Path) -> int:
    try:
        return sum(
            file.stat().st_size for file in folder.glob("*.safetensors") if os.path.isfile(file)
        )
    except OSError:
        return 0
