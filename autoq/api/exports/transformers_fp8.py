"""The name of transformers' own fp8 checkpoints among containers, and which container they are of."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autoq.export._types import Spelling
from autoq.export.transformers_fp8 import verify_transformers_weights
from autoq.formats import Container
from autoq.progress import Progress

TRANSFORMERS_FP8 = Spelling.TRANSFORMERS_FP8.value
"""What `export` calls it, among the names of containers."""


def spelled(container: str | None) -> tuple[Container, Spelling] | None:
    """Container and spelling that the name stands for; None of another name."""
    if container != TRANSFORMERS_FP8:
        return None
    return Container.COMPRESSED_TENSORS, Spelling.TRANSFORMERS_FP8


def compared_weights(folder: Path, progress: Progress) -> dict[str, Any]:
    """What transformers made of the weights; empty, and said, where it cannot be asked."""
    if find_spec("accelerate") is None:
        progress.note(
            "weights are not compared with transformers': that needs the package accelerate, as "
            "does loading the checkpoint with it"
        )
        return {}
    with progress.task("loading with transformers", 1) as advance:
        count = verify_transformers_weights(folder)
        advance()
    return {"transformers_weights": count}
