"""Which kernel a product with an INT4 weight takes on a target, and why. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autoq.kernels.targets import Target

DECODE_ROWS = 64
"""Products of at most so many rows are bound by reading the weight, and may be cut along K."""
MOST_FUSED_ROWS = 1024
"""With more rows unpacking the whole weight costs less than unpacking it again for every tile.

An estimate: per weight unpacking moves 2.5 bytes at 4 TB/s, as long as 700 rows take if the fused
kernel reaches two thirds of the speed of the FP8 product. To be measured."""


class Product(StrEnum):
    """What is multiplied."""

    W4A16 = "w4a16"
    """code * group scale with bfloat16 or float16."""
    W4A8 = "w4a8"
    """code * group scale with E4M3."""
    TWO_LEVEL = "two_level"
    """e4m3(code * rate) with E4M3."""


class Kernel(StrEnum):
    """How a product is computed."""

    DECODE = "decode"
    """Small tiles, K cut into parts: as many programs as the GPU holds read the weight."""
    TILED = "tiled"
    """One program a tile, codes unpacked in registers."""
    UNPACKED = "unpacked"
    """The whole weight is unpacked to E4M3 first, and the FP8 product follows."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What was chosen, and why in one sentence."""

    kernel: Kernel
    reason: str


def variant(target: Target, m: int, n: int, k: int, product: Product) -> Variant:
    """The kernel for [m, k] @ [n, k].T."""
    if m <= DECODE_ROWS:
        return Variant(Kernel.DECODE, f"{m} rows are bound by reading the weight")
    if product is not Product.TWO_LEVEL:
        return Variant(Kernel.TILED, "group scales belong to sums of a group, so codes stay packed")
    if not target.fp8_matmul:
        return Variant(Kernel.TILED, f"{target.name} has no matrix units for E4M3")
    if m <= MOST_FUSED_ROWS:
        return Variant(Kernel.TILED, f"{m} rows do not pay for unpacking the whole weight")
    return Variant(Kernel.UNPACKED, f"{m} rows pay for unpacking the whole weight to E4M3")
