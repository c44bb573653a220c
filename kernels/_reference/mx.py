"""What MXFP8 and MXFP4 mean: slow, obvious, the truth that fast paths are tested against.

A value is element * 2**(byte - 127), one byte (E8M0) per 32 values along the last dimension. A
byte of 255 makes every value of its block NaN, whatever the elements are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.kernels._mx import ScaleRule
from autoq.kernels._reference import fp8, nvfp4

BLOCK = 32
_BIAS = 127
_NAN_BYTE = 255


@dataclass(frozen=True)
class Element:
    """An element type."""

    largest: float
    encode: Callable[[Tensor], Tensor]  # float32 values to codes, saturating
    decode: Callable[[Tensor], Tensor]

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest))."""
        return math.floor(math.log2(self.largest))


E4M3 = Element(fp8.LARGEST, fp8.encode, fp8.decode)
E2M1 = Element(nvfp4.MAGNITUDES[-1], nvfp4.encode, nvfp4.decode)


def decode_scale(byte: int) -> float:
    """The value of one E8M0 byte."""
    return math.nan if byte == _NAN_BYTE else 2.0 ** (byte - _BIAS)


def scale_byte(amax: float, element: Element, rule: ScaleRule = ScaleRule.OCP) -> int:
    """The E8M0 byte of a block whose largest magnitude is `amax`; 255 for infinity and NaN.

    Exponents below -127 become -127, and so does that of a block of zeros. Rounding up stops where
    the largest element times the scale would overflow float32.
    """
    if not math.isfinite(amax):
        return _NAN_BYTE
    if amax == 0:
        return 0
    exponent = math.frexp(amax)[1]  # amax = m * 2**exponent, 0.5 <= m < 1
    scale_exponent = exponent - 1 - element.largest_exponent
    doubles = {
        ScaleRule.OCP: False,
        ScaleRule.UP: amax > element.largest * 2.0**scale_exponent,
        ScaleRule.HALF: amax >= 1.75 * 2.0 ** (exponent - 1),
    }
    if doubles[rule]:
        scale_exponent = min(scale_exponent + 1, 127 - element.largest_exponent)
    return max(scale_exponent, -_BIAS) + _BIAS


def quantize(x: Tensor, element: Element, rule: ScaleRule = ScaleRule.OCP) -> tuple[Tensor, Tensor]:
    """Codes [..., K], one per element, and bytes uint8 [..., K/32]."""
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    maxima = blocks.abs().amax(-1)
    bytes_ = [scale_byte(amax, element, rule) for amax in maxima.flatten().tolist()]
    scales = torch.tensor(bytes_, dtype=torch.uint8).reshape(maxima.shape)
    # Division by a power of two, in float64 so that not even the smallest numbers round.
    values = (blocks.double() / _decode_scales(scales)[..., None].double()).float()
    values[scales == _NAN_BYTE] = 0.0
    return element.encode(values.flatten(-2)), scales


def dequantize(
    codes: Tensor, scales: Tensor, element: Element, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values element * scale, [..., K]."""
    elements = element.decode(codes).reshape(*scales.shape, BLOCK)
    return (elements * _decode_scales(scales)[..., None]).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, element: Element, rule: ScaleRule = ScaleRule.OCP) -> Tensor:
    """What is left of `x` after quantising and dequantising."""
    return dequantize(*quantize(x, element, rule), element, x.dtype)


def pack(codes: Tensor) -> Tensor:
    """E2M1 codes [..., K] to uint8 [..., K/2], the even element in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def _decode_scales(scales: Tensor) -> Tensor:
    table = torch.tensor([decode_scale(byte) for byte in range(256)], dtype=torch.float32)
    return table[scales.long()]
