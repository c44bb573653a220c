"""NVFP4 in vectorised torch, on any device; operands were checked by `autoq.kernels.nvfp4`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels._torch import e2m1, e2m1_pairs, fused
from autoq.kernels._torch.chunks import exponent_part_, float32_pieces, map_rows
from autoq.kernels._torch.fp8 import LARGEST as LARGEST_E4M3
from autoq.kernels._torch.fp8 import decode_e4m3, round_e4m3_
from autoq.kernels._torch.programs import Offer

BLOCK = 16
_LARGEST_ELEMENT = 6.0
_SMALLEST_BLOCK_SCALE = 2.0**-9
_CODE_OF_ONE = 0x38


def amax(x: Tensor) -> Tensor:
    """The largest magnitude, float32 scalar; 0 of an empty tensor, NaN if there is one."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    smallest, largest = torch.aminmax(x)
    return torch.maximum(-smallest, largest).float()


def quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and block scales."""
    *leading, columns = x.shape
    scales = torch.empty(*leading, columns // BLOCK, dtype=torch.float8_e4m3fn, device=x.device)
    codes = torch.empty(*leading, columns // 2, dtype=torch.uint8, device=x.device)
    stored, packed = scales.view(-1, 1), codes.view(-1, BLOCK // 2)
    if e2m1_pairs.takes(x):
        for piece, pairs in e2m1_pairs.blocks(x, BLOCK):
            scale = _block_scale_or_one(pairs.amax(), global_scale)
            stored[piece] = scale
            step = scale.mul_(global_scale)
            packed[piece] = pairs.packed(step, partial(_divided_, step))
        return codes, scales
    for piece, blocks in float32_pieces(x.reshape(-1, BLOCK)):
        scale = block_scale(blocks, global_scale)
        stored[piece] = scale.to(torch.float8_e4m3fn)
        packed[piece] = e2m1.pack(e2m1.encode(blocks.div_(scale * global_scale)))
    return codes, scales


def block_scale(blocks: Tensor, global_scale: Tensor) -> Tensor:
    """Scales of float32 blocks [..., 16] by their largest magnitudes, float32 numbers [..., 1]."""
    amax = _block_amax(blocks.abs().view(-1, BLOCK)).view(*blocks.shape[:-1], 1)
    return _block_scale_or_one(amax, global_scale)


def stored_block_scale(amax: Tensor, global_scale: Tensor) -> Tensor:
    """`_block_scale_or_one` as E4M3 codes."""
    quotient = amax / (_LARGEST_ELEMENT * global_scale)
    vanishes = quotient == 0
    codes = quotient.clamp_(_SMALLEST_BLOCK_SCALE, LARGEST_E4M3).to(torch.float8_e4m3fn)
    codes.view(torch.uint8).masked_fill_(vanishes, _CODE_OF_ONE)
    return codes


def _block_scale_or_one(amax: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 scales, as float32 numbers, of blocks with the maxima `amax`; 1 where they vanish."""
    scale = _block_scale(amax, global_scale)
    quotient = amax / (_LARGEST_ELEMENT * global_scale)
    if amax.device.type == "cpu" and amax.numel() and quotient.min() > 0:
        return scale  # NaN is not above zero, so it is not skipped
    return scale.masked_fill_(quotient == 0, 1.0)


def codes_under(x: Tensor, global_scale: Tensor, block_scale: Tensor) -> Tensor:
    """Packed codes under given block scales."""
    *leading, columns = x.shape
    codes = torch.empty(*leading, columns // 2, dtype=torch.uint8, device=x.device)
    scales, packed = block_scale.reshape(-1, 1), codes.view(-1, BLOCK // 2)
    if e2m1_pairs.takes(x):
        for piece, pairs in e2m1_pairs.blocks(x, BLOCK):
            step = decode_e4m3(scales[piece]) * global_scale
            packed[piece] = pairs.packed(step, partial(_divided_, step))
        return codes
    for piece, blocks in float32_pieces(x.reshape(-1, BLOCK)):
        step = scales[piece].float() * global_scale
        packed[piece] = e2m1.pack(e2m1.encode(blocks.div_(step)))
    return codes


def fake_quantize_under(x: Tensor, global_scale: Tensor, block_scale: Tensor) -> Tensor:
    """Quantise and dequantise under given block scales without storing codes."""
    scales = block_scale.reshape(-1, 1)

    def body(source: Tensor, values: Tensor, scratch: Tensor, rows: slice) -> None:
        step = scales[rows].float() * global_scale
        torch.div(source, step, out=values)
        e2m1.round_(values, scratch).mul_(step)

    return map_rows(x, BLOCK, body)


def dequantize(
    packed: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Values e2m1 * (block scale * global scale)."""
    values = e2m1.decode_packed(packed).view(*block_scale.shape, BLOCK)
    step = block_scale.float() * global_scale
    return values.mul_(step[..., None]).flatten(-2).to(dtype)


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """Quantise and dequantise without storing codes."""

    def body(source: Tensor, values: Tensor, scratch: Tensor, _: slice) -> None:
        amax = _block_amax(torch.abs(source, out=scratch))
        # A block without a scale is zeros, or rounds to zeros, under any.
        step = _block_scale(amax, global_scale).mul_(global_scale)
        torch.div(source, step, out=values)
        # Exact: no step is near the subnormal numbers.
        _round_twice_e2m1_(values, scratch).mul_(step.mul_(0.5))

    offer = Offer(fused.NVFP4, lambda _: (global_scale,))
    return map_rows(x, BLOCK, body, offer)


def linear(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x @ weight.T + bias in the dtype of `x`; without an input scale x is used as it is."""
    values = x if input_scale is None else fake_quantize(x, input_scale)
    weight = dequantize(codes, block_scale, global_scale, x.dtype)
    bias = None if bias is None else bias.detach().to(x.dtype)
    return functional.linear(values, weight, bias).to(out_dtype)


def matmul(
    a_codes: Tensor,
    a_block_scale: Tensor,
    a_global_scale: Tensor,
    b_codes: Tensor,
    b_block_scale: Tensor,
    b_global_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """a @ b.T + bias in float32."""
    a = dequantize(a_codes, a_block_scale, a_global_scale, torch.float32)
    b = dequantize(b_codes, b_block_scale, b_global_scale, torch.float32)
    bias = None if bias is None else bias.detach().float()
    return functional.linear(a, b, bias).to(out_dtype)


def _divided_(step: Tensor, values: Tensor) -> Tensor:
    return values.div_(step)


def _block_amax(magnitudes: Tensor) -> Tensor:
    """Row maxima [rows, 1] of a contiguous [rows, 16] tensor."""
    if magnitudes.device.type != "cpu" or not magnitudes.numel():
        return magnitudes.amax(-1, keepdim=True)
    # The pooling kernel is twice as fast as amax on rows this short.
    return functional.max_pool1d(magnitudes.view(1, 1, -1), BLOCK).view(-1, 1)


def _block_scale(amax: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 scales, as float32 numbers, of blocks with the float32 maxima `amax`."""
    scale = (amax / (_LARGEST_ELEMENT * global_scale)).clamp_(min=_SMALLEST_BLOCK_SCALE)
    return round_e4m3_(scale, torch.empty_like(scale))


def _round_twice_e2m1_(values: Tensor, scratch: Tensor) -> Tensor:
    """Replace float32 `values` by twice what E2M1 makes of them; negative zero becomes zero.

    The E2M1 step under |value| is half of its power of two, between 0.5 and 2. Doubling the
    values instead of halving the powers saves a pass: adding to zero is needed in any case, to
    turn -0.0 into 0.0, while a negative value that rounds to zero has to stay negative.
    """
    power = exponent_part_(values, scratch).clamp_(1.0, 4.0)
    zero = values.new_zeros(())
    torch.add(zero, values, alpha=2, out=values)
    largest = 2 * _LARGEST_ELEMENT
    return values.div_(power).round_().mul_(power).clamp_(-largest, largest)
