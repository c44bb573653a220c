"""Comparing what transformers loads of its own fp8 checkpoints with what was searched.

On a CPU it widens the weights while loading, to the model's dtype, and leaves inputs alone, so that
weights are compared and not logits. It wants the package `accelerate` for that.
"""

from __future__ import annotations

from pathlib import Path

import torch

from autoq.errors import ExportError, VerificationError
from autoq.export._types import Spelling
from autoq.export.evaluation import load_checkpoint_for_evaluation, transformers_model
from autoq.export.reader import read_quantized
from autoq.formats import NONE
from autoq.models.weights import slot_weight

__all__ = ["verify_transformers_weights"]


def verify_transformers_weights(path: Path | str) -> int:
    """Load an fp8 checkpoint with transformers, and compare every quantised matrix.

    Returns:
        How many were compared: each is what the searched one rounds to in the checkpoint's dtype.
    Raises:
        ExportError: the checkpoint is none of transformers' own fp8.
        VerificationError: transformers cannot load it, finds keys missing, unexpected or of another
            shape, or has another matrix.
    """
    checkpoint = read_quantized(path)
    if checkpoint.spelling is not Spelling.TRANSFORMERS_FP8:
        raise ExportError(f"{path} is no checkpoint of transformers' own fp8; give one")
    _, contents = load_checkpoint_for_evaluation(path)
    theirs = transformers_model(checkpoint, contents.storage_dtype)
    quantized = [slot for slot, fmt in contents.slot_formats.items() if fmt != NONE]
    for name in quantized:
        matrix = slot_weight(theirs, contents.model_map.slots[name])
        expected = contents.dequantized[name].to(contents.storage_dtype)
        if not torch.equal(matrix.to(contents.storage_dtype), expected):
            raise VerificationError(
                f"transformers' {name} of {path} is not what was searched; the checkpoint is wrong"
            )
    return len(quantized)
