"""MXFP8 and MXFP4 in vectorised torch, on any device; operands were checked by the contracts."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels._mx import BLOCK, E2M1, E4M3, Element, ScaleRule
from autoq.kernels._torch import e2m1, e2m1_pairs, fused
from autoq.kernels._torch.chunks import bfloat16_block_amax, float32_pieces, map_rows
from autoq.kernels._torch.fp8 import decode_e4m3, round_e4m3_
from autoq.kernels._torch.programs import Offer, Program

_NAN_BYTE = 255
_INFINITY_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_LARGEST_FINITE_EXPONENT = 254
_SMALLEST_SCALE_BITS = 0x00400000  # 2**-127, byte 0, is a subnormal float32


def quantize(x: Tensor, element: Element, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Codes, float8_e4m3fn [..., K] or uint8 [..., K/2], and E8M0 bytes uint8 [..., K/32]."""
    *leading, columns = x.shape
    scale = torch.empty(*leading, columns // BLOCK, dtype=torch.uint8, device=x.device)
    bytes_ = scale.view(-1, 1)
    if element is not E4M3:
        return _quantize_e2m1(x, bytes_, rule), scale
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    rows, source = codes.view(-1, BLOCK), x.contiguous().view(-1, BLOCK)
    as_bits = e2m1_pairs.takes(x)
    for piece, values in float32_pieces(source):
        amax = bfloat16_block_amax(source[piece]) if as_bits else _block_amax(values.abs())
        own = scale_bytes(amax, element, rule)
        bytes_[piece] = own
        rows[piece] = _over_scale_(own, values).clamp_(-E4M3.largest, E4M3.largest)
    return codes, scale


def quantize_under(x: Tensor, scale: Tensor) -> Tensor:
    """MXFP4 codes of `x` under given E8M0 bytes."""
    return _quantize_e2m1(x, scale.reshape(-1, 1), None)


def _quantize_e2m1(x: Tensor, bytes_: Tensor, rule: ScaleRule | None) -> Tensor:
    """Packed codes under the bytes [blocks, 1], which are first written if there is a rule."""
    *leading, columns = x.shape
    codes = torch.empty(*leading, columns // 2, dtype=torch.uint8, device=x.device)
    packed = codes.view(-1, BLOCK // 2)
    if e2m1_pairs.takes(x):
        for piece, pairs in e2m1_pairs.blocks(x, BLOCK):
            if rule is not None:
                bytes_[piece] = scale_bytes(pairs.amax(), E2M1, rule)
            own = bytes_[piece].int()
            packed[piece] = pairs.packed(decode_scale(own), partial(_over_scale_, own))
        return codes
    for piece, values in float32_pieces(x.reshape(-1, BLOCK)):
        if rule is not None:
            bytes_[piece] = scale_bytes(_block_amax(values.abs()), E2M1, rule)
        packed[piece] = e2m1.pack(e2m1.encode(_over_scale_(bytes_[piece].int(), values)))
    return codes


def _over_scale_(scale: Tensor, values: Tensor) -> Tensor:
    """Replace values by those over the scale of int32 bytes, by zeros where that is NaN."""
    values.mul_(inverse_scale(scale))
    is_nan = scale == _NAN_BYTE
    return values.masked_fill_(is_nan, 0.0) if is_nan.any() else values


def dequantize(codes: Tensor, scale: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """Values element * 2**(byte - 127)."""
    elements = decode_e4m3(codes) if element is E4M3 else e2m1.decode_packed(codes)
    step = decode_scale(scale.int())
    return (elements.reshape(*step.shape, BLOCK) * step[..., None]).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """Quantise and dequantise without storing codes."""
    round_ = round_e4m3_ if element is E4M3 else e2m1.round_

    def body(source: Tensor, values: Tensor, scratch: Tensor, _: slice) -> None:
        scale = scale_bytes(_block_amax(torch.abs(source, out=scratch)), element, rule)
        torch.mul(source, inverse_scale(scale), out=values)
        round_(values, scratch).mul_(decode_scale(scale))

    return map_rows(x, BLOCK, body, Offer(_program(element, rule), lambda _: ()))


@cache
def _program(element: Element, rule: ScaleRule) -> Program:
    def scales(amax: Tensor) -> tuple[Tensor, Tensor]:
        scale = scale_bytes(amax, element, rule)
        return inverse_scale(scale), decode_scale(scale)

    name, round_ = ("mxfp8", fused.round_e4m3) if element is E4M3 else ("mxfp4", fused.round_e2m1)
    return fused.microscaling(f"{name}, scales by rule {rule}", scales, round_)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias of dequantised operands, in their dtype."""
    bias = None if bias is None else bias.detach().to(x.dtype)
    return functional.linear(x, weight, bias).to(out_dtype)


def _block_amax(magnitudes: Tensor) -> Tensor:
    """Row maxima [rows, 1] of a contiguous [rows, 32] tensor; NaN wins."""
    if magnitudes.device.type != "cpu" or not magnitudes.numel():
        return magnitudes.amax(-1, keepdim=True)
    # The pooling kernel is faster than amax on rows this short.
    return functional.max_pool1d(magnitudes.view(1, 1, -1), BLOCK).view(-1, 1)


def scale_bytes(amax: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """E8M0 bytes, int32, of blocks with the float32 maxima `amax`.

    Exponents are read from the bits: a subnormal number has exponent field 0 and, like a block of
    zeros, gets byte 0.
    """
    bits = amax.view(torch.int32)
    exponent = ((bits + element.increment(rule)) >> 23).clamp_(max=_LARGEST_FINITE_EXPONENT)
    scale = exponent.sub_(element.largest_exponent).clamp_(min=0)
    return scale.masked_fill_(bits >= _INFINITY_BITS, _NAN_BYTE)


def decode_scale(scale: Tensor) -> Tensor:
    """2**(byte - 127), float32, of int32 bytes; NaN of 255."""
    bits = (scale << 23).clamp_(min=_SMALLEST_SCALE_BITS)
    return bits.masked_fill_(scale == _NAN_BYTE, _NAN_BITS).view(torch.float32)


def inverse_scale(scale: Tensor) -> Tensor:
    """2**(127 - byte), float32: never subnormal for the bytes of `scale_bytes`, except 255."""
    return ((254 - scale) << 23).view(torch.float32)
