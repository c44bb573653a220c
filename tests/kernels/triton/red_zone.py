"""Tensors between two stretches of memory that must stay as they are."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# As much as a program of most kernels writes: one that forgets its mask is then told by name, where
# a shorter zone lets it end the process.
ZONE_BYTES = 65536
POISON = 0xFF  # NaN in every floating type here, so that what is read there shows as well


class RedZones:
    """Makes guarded tensors, and says at the end whether a kernel wrote beside one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guarded: list[tuple[str, Tensor, int]] = []

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor, its own elements poisoned too."""
        size = math.prod(shape) * dtype.itemsize
        # Whole multiples of 16 before the tensor keep it aligned, as kernels expect.
        memory = torch.full(
            (size + 2 * ZONE_BYTES,), POISON, dtype=torch.uint8, device=self._device
        )
        self._guarded.append((f"{list(shape)} {dtype}", memory, size))
        return memory[ZONE_BYTES : ZONE_BYTES + size].view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A guarded copy of an operand: reading beside it gives NaN."""
        return self(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    def check(self) -> None:
        """Fail if a byte beside one of the tensors has changed."""
        for name, memory, size in self._guarded:
            before = int((memory[:ZONE_BYTES] != POISON).sum())
            after = int((memory[ZONE_BYTES + size :] != POISON).sum())
            assert not before, f"{before} bytes written before the tensor {name}"
            assert not after, f"{after} bytes written behind the tensor {name}"


def for_launches(zones: RedZones, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty or torch.empty_like, that gives launch wrappers guarded tensors."""

    def allocate(*like: Any, dtype: torch.dtype | None = None, **named: Any) -> Tensor:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not caller.startswith("autoq.kernels._launch"):
            return stock(*like, dtype=dtype, **named)
        wanted = stock(*like, dtype=dtype, **{**named, "device": "meta"})
        return zones(tuple(wanted.shape), wanted.dtype)

    return allocate
