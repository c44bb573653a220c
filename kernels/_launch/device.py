"""What every launch needs: the tensors' device made current, and grids."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current; nothing for the CPU (interpreter) and meta (compile only)."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return nullcontext()


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)
