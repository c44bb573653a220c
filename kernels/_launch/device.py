"""What every launch needs: the tensors' device made current, and grids."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from autoq.kernels.targets import Target


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current; nothing for the CPU (interpreter) and meta (compile only)."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return nullcontext()


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def multiprocessors_of(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; where there is none, as many as an H200 has."""
    if tensor.device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(tensor.device).multi_processor_count)


def rounds_to_e4m3(target: Target) -> bool:
    """Whether triton's cast from float32 to E4M3 rounds once, to nearest even, on `target`.

    On sm_89 triton before 3.9 goes by float16 and rounds twice. AMD's cast was not verified.
    """
    if target.backend != "cuda" or not target.fp8_type:
        return False
    major, minor = map(int, triton.__version__.split(".")[:2])
    return target.name != "sm_89" or (major, minor) >= (3, 9)
