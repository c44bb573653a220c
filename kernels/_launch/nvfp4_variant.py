"""Which kernel a product of NVFP4 takes on a target, and why. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autoq.kernels.targets import Target

FEW_ROWS = 16
"""Products of at most so many rows take the tiles of decoding."""
DECODE_ROWS = 64
"""Products of at most so many rows are bound by memory, and may be cut along K."""


class Kernel(StrEnum):
    """A kernel of `autoq.kernels._jit.nvfp4_matmul`."""

    SCALED = "scaled"
    """Matrix units that take E2M1 with an E4M3 scale per 16; the input becomes NVFP4."""
    WEIGHT_ONLY = "weight_only"
    """Matrix units for 16-bit numbers, weights dequantised in registers without the global scale.

    An input that is to be quantised is fake-quantised without its global scale, which bfloat16
    holds exactly: the products are those of the other kernel.
    """


@dataclass(frozen=True, slots=True)
class Variant:
    """What was chosen, and why in one sentence."""

    kernel: Kernel
    reason: str
    swap: bool = False
    """Computed as (weight @ input.T).T."""


def variant(target: Target, m: int, n: int, k: int, quantized_input: bool) -> Variant:
    """The kernel for [m, k] @ [n, k].T.

    Args:
        target: the GPU.
        m, n, k: sizes.
        quantized_input: whether the left operand is NVFP4, or is to become it.
    """
    if quantized_input and target.nvfp4_matmul:
        reason = f"{target.name} has matrix units for NVFP4"
        if target.architecture in (100, 103) and m <= DECODE_ROWS:
            return Variant(Kernel.SCALED, f"{reason}, for 128 rows of the left operand", swap=True)
        return Variant(Kernel.SCALED, reason)
    reason = "the input is not quantised"
    if quantized_input:
        reason = f"{target.name} has no matrix units for NVFP4; bfloat16 holds its values exactly"
    # There each warp dequantises what it multiplies: on the left, fewer of them the same.
    by_warps = target.architecture in (80, 86, 87, 89, 120, 121)
    return Variant(Kernel.WEIGHT_ONLY, reason, swap=by_warps and m > DECODE_ROWS)
