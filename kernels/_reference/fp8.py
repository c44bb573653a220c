"""What FP8 E4M3 quantisation means: slow, obvious, the truth that fast paths are tested against.

E4M3 (the "fn" variant): sign, 4 exponent bits with bias 7, 3 mantissa bits; largest magnitude
448, smallest 2**-9, NaN 0x7F and 0xFF, no infinity.
Source: OCP 8-bit Floating Point Specification (OFP8) v1.0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.kernels._checks import SMALLEST_SCALE
from autoq.kernels._scaling import BLOCK, Scaling

LARGEST = 448.0
_LARGEST_CODE = 0x7E
_NAN_CODE = 0x7F
_SIGN_BIT = 0x80


def decode_byte(code: int) -> float:
    """The value of one E4M3 byte."""
    sign = -1.0 if code & _SIGN_BIT else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if (code & 0x7F) == _NAN_CODE:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_MAGNITUDES = tuple(decode_byte(code) for code in range(_LARGEST_CODE + 1))


def encode_value(value: float) -> int:
    """The E4M3 byte nearest to `value`, ties to the even code, saturating at 448."""
    if math.isnan(value):
        return _NAN_CODE
    magnitude = min(abs(value), LARGEST)
    nearest = min(
        range(_LARGEST_CODE + 1),
        key=lambda code: (abs(_MAGNITUDES[code] - magnitude), code % 2),
    )
    return nearest | (_SIGN_BIT if math.copysign(1.0, value) < 0 else 0)


def decode(codes: Tensor) -> Tensor:
    """Values of E4M3 codes (float8_e4m3fn), float32."""
    table = torch.tensor([decode_byte(code) for code in range(256)], dtype=torch.float32)
    return table[codes.view(torch.uint8).long()]


def encode(values: Tensor) -> Tensor:
    """Clamp float32 values to 448 and round them to E4M3, ties to even."""
    bytes_ = [encode_value(value) for value in values.flatten().tolist()]
    codes = torch.tensor(bytes_, dtype=torch.uint8).reshape(values.shape)
    return codes.view(torch.float8_e4m3fn)


def tensor_scale(amax: float) -> Tensor:
    """amax / 448 in float32; 1 if amax is 0, never below 2**-100."""
    if amax == 0:
        return torch.tensor(1.0)
    return (torch.tensor(amax) / torch.tensor(LARGEST)).clamp(min=SMALLEST_SCALE)


def _places(shape: torch.Size, scaling: Scaling) -> Tensor:
    """For each element the flat number of its scale."""
    rows = torch.arange(math.prod(shape[:-1]))[:, None].expand(-1, shape[-1])
    columns = torch.arange(shape[-1]).expand_as(rows)
    blocks = -(-shape[-1] // BLOCK)
    numbers = {
        Scaling.TENSOR: torch.zeros_like(rows),
        Scaling.ROW: rows,
        Scaling.BLOCK_1X128: rows * blocks + columns // BLOCK,
        Scaling.BLOCK_128X128: rows // BLOCK * blocks + columns // BLOCK,
    }
    return numbers[scaling].reshape(shape)


def scales(x: Tensor, scaling: Scaling) -> Tensor:
    """`tensor_scale` of the largest magnitude among the elements that share a scale."""
    places = _places(x.shape, scaling)
    scale = torch.ones(scaling.scale_shape(x.shape))
    for number in range(scale.numel()):
        shared = x.float()[places == number]
        if shared.numel():
            scale.view(-1)[number] = tensor_scale(shared.abs().max().item())
    return scale


def quantize(x: Tensor, scale: Tensor, scaling: Scaling = Scaling.TENSOR) -> Tensor:
    """Codes e4m3(clamp(x / scale))."""
    return encode(x.float() / scale.flatten()[_places(x.shape, scaling)])


def dequantize(
    codes: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    scaling: Scaling = Scaling.TENSOR,
) -> Tensor:
    """Values code * scale."""
    return (decode(codes) * scale.flatten()[_places(codes.shape, scaling)]).to(dtype)


def fake_quantize(
    x: Tensor, scale: Tensor | None = None, scaling: Scaling = Scaling.TENSOR
) -> Tensor:
    """What is left of `x` after quantising and dequantising."""
    scale = scales(x, scaling) if scale is None else scale
    return dequantize(quantize(x, scale, scaling), scale, x.dtype, scaling)
