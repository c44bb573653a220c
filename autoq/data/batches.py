"""Cutting token sequences into batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def batches(
    ids: NDArray[np.int64], batch_size: int, *, device: str | torch.device = "cpu"
) -> Iterator[Tensor]:
    """Yield int64 tensors [batch, tokens] in order; the last one may have fewer rows.

    Args:
        ids: [sequences, tokens].
        batch_size: sequences in a batch.
        device: where the tensors go.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(ids), batch_size):
        yield torch.tensor(ids[start : start + batch_size], dtype=torch.int64, device=device)
