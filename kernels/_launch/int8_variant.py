"""Which kernels products with an INT8 weight take, and why. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autoq.kernels.targets import Target

DECODE_ROWS = 64
"""Products of at most so many rows are bound by reading the weight, and may be cut along K."""


class Kernel(StrEnum):
    """How a product is computed."""

    DECODE = "decode"
    """Small tiles, K cut into parts: as many programs as the GPU holds read the weight."""
    TILED = "tiled"
    """One program a tile."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What was chosen, and why in one sentence."""

    kernel: Kernel
    reason: str


def variant(target: Target, m: int, n: int, k: int) -> Variant:
    """The kernel for [m, k] @ [n, k].T, of INT8 inputs and of 16-bit ones."""
    widened = "codes are widened in registers where inputs stay 16-bit"
    if m <= DECODE_ROWS:
        return Variant(Kernel.DECODE, f"{m} rows are bound by reading the weight; {widened}")
    return Variant(Kernel.TILED, f"{m} rows fill the matrix units of {target.name}; {widened}")
