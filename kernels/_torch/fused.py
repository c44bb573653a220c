"""The fake-quantise bodies as pure functions of one piece, from which `compiled` makes C++ loops.

They give what the bodies in the families' modules give, bit for bit, with operations that a C++
compiler turns into vector instructions: powers of two come from arithmetic instead of from bits,
and rounding is an addition and a subtraction. What a loop would compute once for a row but the
compiler repeats for every element is a stage of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoq.kernels._torch.programs import Program

_LARGEST_E4M3 = 448.0
_LARGEST_E2M1 = 6.0
_BLOCK = 16
_MX_BLOCK = 32
_ROUND_TO_INTEGER = 2.0**23
"""Added to a float32 in 0..2**23 and taken away again, it rounds to nearest, ties to even."""


def _power_of_two_below(magnitudes: Tensor) -> Tensor:
    """The largest power of two that is not above each magnitude; 0 and subnormals give less.

    Source: S. M. Rump, Error estimation of floating-point summation and dot product, BIT 52
    (2012): the unit in the first place from two products and a difference.
    """
    scaled = magnitudes * (2.0**23 + 1.0)
    return (scaled - scaled * (1.0 - 2.0**-24)).abs()


def _round_to(magnitudes: Tensor, step: Tensor) -> Tensor:
    """Nearest multiples of powers of two `step`, ties to even."""
    offset = step * _ROUND_TO_INTEGER
    return (magnitudes + offset) - offset


def round_e4m3(values: Tensor) -> Tensor:
    """E4M3 of float32 values, saturating, the sign of zero kept."""
    magnitudes = values.abs().clamp(max=_LARGEST_E4M3)
    step = _power_of_two_below(magnitudes).clamp(min=2.0**-6) * 2.0**-3
    return torch.copysign(_round_to(magnitudes, step), values)


def round_e2m1(values: Tensor) -> Tensor:
    """E2M1 of float32 values, saturating; negative zero becomes zero."""
    magnitudes = values.abs().clamp(max=_LARGEST_E2M1)
    step = _power_of_two_below(magnitudes).clamp(1.0, 4.0) * 0.5
    return torch.copysign(_round_to(magnitudes, step), values + 0.0)


def _int4_codes(values: Tensor, scale: Tensor) -> Tensor:
    """Adding zero drops the sign that integers lack."""
    return (values / scale).round().clamp(-8.0, 7.0) + 0.0


def _fp8(x: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(round_e4m3(x.float() / scale) * scale)


def _int4(x: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(_int4_codes(x.float(), scale) * scale)


def _w4a8(x: Tensor, scale: Tensor, rate: Tensor, tensor_scale: Tensor, out: Tensor) -> None:
    out.copy_(round_e4m3(_int4_codes(x.float(), scale) * rate) * tensor_scale)


def _int8(x: Tensor, scale: Tensor, out: Tensor) -> None:
    codes = (x.float() / scale).clamp(-127.0, 127.0).round()
    out.copy_(codes * scale + 0.0)


def _nvfp4_scratch(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` transposed, and the steps of each row's two blocks."""
    rows, width = x.shape
    return x.new_empty(width, rows), x.new_empty(width // _BLOCK, rows, dtype=torch.float32)


def _nvfp4_transpose(
    x: Tensor, global_scale: Tensor, columns: Tensor, steps: Tensor, out: Tensor
) -> None:
    """Maxima down columns are vector operations, where maxima along 16 elements are shuffles."""
    columns.copy_(x.t())


def _nvfp4_steps(
    x: Tensor, global_scale: Tensor, columns: Tensor, steps: Tensor, out: Tensor
) -> None:
    amax = columns.view(len(steps), _BLOCK, -1).float().abs().amax(1)
    scale = (amax / (_LARGEST_E2M1 * global_scale)).clamp(min=2.0**-9)
    steps.copy_(round_e4m3(scale) * global_scale)


def _nvfp4_round(
    x: Tensor, global_scale: Tensor, columns: Tensor, steps: Tensor, out: Tensor
) -> None:
    in_first = torch.arange(x.shape[1], device=x.device) < _BLOCK
    step = torch.where(in_first, steps[0, :, None], steps[1, :, None])
    out.copy_(round_e2m1(x.float() / step) * step)


def microscaling(
    name: str,
    scales: Callable[[Tensor], tuple[Tensor, Tensor]],
    round_element: Callable[[Tensor], Tensor],
) -> Program:
    """The program of an MX format.

    Args:
        name: for people.
        scales: float32 maxima of blocks -> what to multiply by before rounding, and after.
        round_element: float32 values -> those of the element type.
    """

    def scratch(x: Tensor) -> tuple[Tensor, ...]:
        columns = x.new_empty(x.shape[1], x.shape[0])
        return columns, *x.new_empty(2, x.shape[0], 1, dtype=torch.float32).unbind()

    def transpose(x: Tensor, columns: Tensor, before: Tensor, after: Tensor, out: Tensor) -> None:
        columns.copy_(x.t())

    def scale(x: Tensor, columns: Tensor, before: Tensor, after: Tensor, out: Tensor) -> None:
        # The NaN that a vectorised maximum makes has its sign bit set.
        amax = columns.float().abs().amax(0).abs()
        own_before, own_after = scales(amax[:, None])
        before.copy_(own_before)
        after.copy_(own_after)

    def round_(x: Tensor, columns: Tensor, before: Tensor, after: Tensor, out: Tensor) -> None:
        out.copy_(round_element(x.float() * before) * after)

    return Program(name, (transpose, scale, round_), width=_MX_BLOCK, scratch=scratch)


FP8_TENSOR = Program("fp8 under one scale", (_fp8,), width=128)
"""Operands: scale []."""
FP8_ROWS = Program("fp8 under scales of rows", (_fp8,), width=None)
"""Operands: scales [rows, 1]."""
# Two blocks to a row: a vector of bfloat16 holds 32, and half-filled ones cost as much.
NVFP4 = Program("nvfp4", (_nvfp4_transpose, _nvfp4_steps, _nvfp4_round), 2 * _BLOCK, _nvfp4_scratch)
"""Operands: global scale []."""
INT4 = Program("int4", (_int4,), width=None)
"""Operands: group scales [rows, 1]."""
W4A8 = Program("w4a8", (_w4a8,), width=None)
"""Operands: group scales and rates [rows, 1], tensor scale []."""
INT8 = Program("int8", (_int8,), width=None)
"""Operands: scales [rows, 1], NaN where the row has one."""
