"""Which kernel a product of MXFP8 and MXFP4 takes on a target, and why. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autoq.kernels._mx import E2M1, E4M3, Element
from autoq.kernels.targets import Target

FEW_ROWS = 16
"""Products of at most so many rows take the tiles of decoding."""
DECODE_ROWS = 64
"""Products of at most so many rows are bound by memory, and may be cut along K."""


class Kernel(StrEnum):
    """A kernel of `autoq.kernels._jit.mx_matmul`."""

    SCALED = "scaled"
    """Matrix units that take E8M0 scales."""
    GROUPED = "grouped"
    """Matrix units for FP8, scales applied to the sum of each block of 32."""
    UPCAST = "upcast"
    """Matrix units for 16-bit numbers: the input's values are bfloat16, if it is quantised, and the
    weight's are made of its codes on the way."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What was chosen, and why in one sentence."""

    kernel: Kernel
    reason: str
    widen: bool = False
    """E2M1 becomes E4M3 on the way."""
    swap: bool = False
    """Computed as (weight @ input.T).T."""


def variant(target: Target, m: int, n: int, k: int, a: Element | None, b: Element) -> Variant:
    """The kernel for [m, k] @ [n, k].T.

    Args:
        target: the GPU.
        m, n, k: sizes.
        a: the type of the left operand; None for values in bfloat16 or float16.
        b: the type of the right operand, the weight.
    """
    if a is None:
        return Variant(Kernel.UPCAST, "the input is not quantised")
    if target.mx_matmul:
        return _scaled(target, m, a, b)
    if not target.fp8_matmul:
        return Variant(Kernel.UPCAST, f"{target.name} has no matrix units for E4M3")
    if a is E2M1:
        return Variant(Kernel.UPCAST, f"{target.name} has no matrix units for E2M1")
    if m <= DECODE_ROWS:
        # Blocks of 32 are loads of 16 or 32 bytes, which waste memory transactions.
        return Variant(Kernel.UPCAST, "with few rows reading the weight takes all the time")
    return Variant(
        Kernel.GROUPED,
        f"{target.name} has matrix units for E4M3, but none that take scales",
        widen=b is E2M1,
    )


def _scaled(target: Target, m: int, a: Element, b: Element) -> Variant:
    reason = f"{target.name} has matrix units that take E8M0 scales"
    if target.architecture in (100, 103) and m <= DECODE_ROWS:
        return Variant(Kernel.SCALED, f"{reason}, for 128 rows of the left operand", swap=True)
    if target.architecture in (120, 121) and a is E4M3 and b is E2M1:
        return Variant(Kernel.SCALED, f"{reason}, but not for E4M3 with E2M1", widen=True)
    return Variant(Kernel.SCALED, reason)
