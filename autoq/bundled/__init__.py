"""A small language model that comes with autoq, and the artificial language it was trained on."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator


def model_path() -> pathlib.Path:
    """Return the folder of the bundled model."""
    return pathlib.Path(__file__).resolve().parent / "model"


def tasks_path() -> pathlib.Path:
    """Return the folder of the evaluation tasks for the bundled model."""
    return pathlib.Path(__file__).resolve().parent / "tasks"


def documents(seed: int, split: str = "train") -> Iterator[str]:
    """Yield documents of the bundled language without end; see `autoq.bundled.language`."""
    from autoq.bundled import language

    return language.documents(seed, split)
