"""INT4 weights whose group scales are quantised, too: 8 bits each, under a scale for 256 of them.

A weight is code * group scale as in `autoq.kernels.int4`, in groups of 64. Group scales are
mean + scale code * second scale: the mean is that of all scales of the matrix, scale codes are
-127..127, and the second scale is the largest distance from the mean among 256 scales that follow
each other row by row, divided by 127. A scale whose nearest code stands for nothing positive takes
the next code. Weights are rounded under the scales that come out, so that rounding those costs
little. All arithmetic is float32 but for the mean's; rounding is to nearest, ties to even.

Source: "double quantization" in Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs"
(2023), section 3, with its groups of 64 and its blocks of 256; scale codes are integers, as
ModelOpt's are, and weight codes INT4, not NF4.

Operations on scales are a 64th of those on weights, and have no kernels: scales are dequantised, and
the kernels of `autoq.kernels.int4` take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels import int4
from autoq.kernels._checks import (
    EMPTY_GROUP_SCALE,
    require_dtype,
    require_matrix,
    require_record,
    require_same_device,
)
from autoq.kernels._packed import PackedTensor

GROUP_SIZE = 64
"""Columns that share a group scale."""

SCALES_PER_BLOCK = 256
"""Group scales that share a second scale, row by row; the last block may have fewer."""

_LARGEST = 127.0


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedScales:
    """Group scales [N, G] in 8 bits."""

    codes: Tensor  # int8 [N, G], -127..127
    second_scale: Tensor  # float32 [ceil(N * G / 256)], positive
    mean: Tensor  # float32 scalar

    def values(self) -> Tensor:
        """The group scales that codes stand for, float32 [N, G], positive."""
        return (self.codes * _spread(self.second_scale, self.codes)).add_(self.mean)


@dataclass(frozen=True, slots=True, eq=False)
class INT4DoubleTensor(PackedTensor):
    """A weight [N, K] in INT4, the scales of its groups in INT8."""

    codes: Tensor
    """uint8 [N, K/2], as in `INT4Tensor`."""
    scale_codes: Tensor
    """int8 [N, K/64]."""
    second_scale: Tensor
    """float32 [ceil(N * K / 64 / 256)]."""
    mean_scale: Tensor
    """float32 scalar."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (N, K)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def scales(self) -> QuantizedScales:
        """The group scales."""
        return QuantizedScales(self.scale_codes, self.second_scale, self.mean_scale)

    def plain(self) -> int4.INT4Tensor:
        """The same weight, its scales dequantised.

        Raises:
            InputError: a dtype or shape is not as above.
        """
        _require_scales(self.scale_codes, self.second_scale, self.mean_scale)
        return int4.INT4Tensor(codes=self.codes, group_scale=self.scales.values())


def quantize_scales(group_scale: Tensor) -> QuantizedScales:
    """Group scales in 8 bits.

    Args:
        group_scale: float32 [N, G], positive.

    Raises:
        InputError: the dtype or shape is not as above.
    """
    require_dtype("group_scale", group_scale, torch.float32)
    require_matrix("group_scale", group_scale)
    if not group_scale.numel():
        raise InputError(
            "group_scale must have at least one scale, got none; leave empty weights out"
        )
    mean = group_scale.double().mean().float()  # whose order of adding up no device shares
    distance = group_scale - mean
    second_scale = _blocks(distance.abs()).amax(dim=1) / _LARGEST
    second_scale = torch.where(second_scale == 0, EMPTY_GROUP_SCALE, second_scale)
    step = _spread(second_scale, group_scale)
    codes = (distance / step).round_().clamp_(-_LARGEST, _LARGEST)
    codes += codes * step + mean <= 0
    return QuantizedScales(codes.to(torch.int8), second_scale, mean)


def quantize(weight: Tensor, group_scale: Tensor | None = None) -> INT4DoubleTensor:
    """Codes of the weight under its group scales, once those have 8 bits.

    Args:
        weight: float32, bfloat16 or float16 [N, K], K a multiple of 64.
        group_scale: float32 [N, K/64]; amax / 7 if left out.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    scales = _scales_of(weight, group_scale)
    packed = int4.quantize(weight, scales.values())
    return _record(packed.codes, scales)


def dequantize(packed: INT4DoubleTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * group scale [N, K], computed in float32 and rounded once to `dtype`.

    Raises:
        InputError: a dtype or shape is not as `INT4DoubleTensor` says, or `dtype` is not float32,
            bfloat16 or float16.
    """
    require_record("packed", packed, INT4DoubleTensor)
    return int4.dequantize(packed.plain(), dtype)


def fake_quantize(weight: Tensor, group_scale: Tensor | None = None) -> Tensor:
    """`dequantize(quantize(weight, group_scale), weight.dtype)`, bit for bit, without storing codes.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    return int4.fake_quantize(weight, _scales_of(weight, group_scale).values())


def linear(
    x: Tensor, weight: INT4DoubleTensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """x @ weight.T + bias with the input as it is: `int4.linear`, which says the rest.

    Raises:
        InputError: a dtype, shape or device does not fit.
    """
    require_record("weight", weight, INT4DoubleTensor)
    return int4.linear(x, weight.plain(), bias, **options)


def pack(codes: Tensor, scales: QuantizedScales) -> INT4DoubleTensor:
    """The packed weight of plain codes.

    Args:
        codes: int8 [N, K] in -8..7.
        scales: of its groups, [N, K/64].

    Raises:
        InputError: another dtype or shape, or a code out of range.
    """
    return _record(int4.pack(codes, scales.values()).codes, scales)


def _record(codes: Tensor, scales: QuantizedScales) -> INT4DoubleTensor:
    return INT4DoubleTensor(
        codes=codes,
        scale_codes=scales.codes,
        second_scale=scales.second_scale,
        mean_scale=scales.mean,
    )


def _scales_of(weight: Tensor, group_scale: Tensor | None) -> QuantizedScales:
    if group_scale is None:
        group_scale = int4.group_scale(weight, GROUP_SIZE)
    return quantize_scales(group_scale)


def _blocks(scales: Tensor) -> Tensor:
    """[blocks, 256], the last one filled up with zeros."""
    flat = scales.flatten()
    missing = -len(flat) % SCALES_PER_BLOCK
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, SCALES_PER_BLOCK)


def _spread(second_scale: Tensor, like: Tensor) -> Tensor:
    """The second scale of every group scale, float32 in the shape of `like`."""
    every = second_scale.repeat_interleave(SCALES_PER_BLOCK)
    return every[: like.numel()].view(like.shape)


def _require_scales(codes: Tensor, second_scale: Tensor, mean: Tensor) -> None:
    require_dtype("scale_codes", codes, torch.int8)
    require_matrix("scale_codes", codes)
    require_dtype("second_scale", second_scale, torch.float32)
    require_dtype("mean_scale", mean, torch.float32)
    require_same_device(codes, second_scale, mean)
    blocks = -(-codes.numel() // SCALES_PER_BLOCK)
    if tuple(second_scale.shape) != (blocks,) or mean.ndim:
        raise InputError(
            f"{tuple(codes.shape)} scale codes need second scales ({blocks},) and one mean, got "
            f"{tuple(second_scale.shape)} and {tuple(mean.shape)}; take what quantize returned"
        )
