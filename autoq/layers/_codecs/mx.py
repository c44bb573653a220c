"""MXFP8 and MXFP4: E4M3 and E2M1 in blocks of 32 under powers of two, weights and inputs alike.

Weights of MXFP8 are scaled so that nothing saturates, as ModelOpt scales them, weights of MXFP4 as
compressed-tensors does, which uses the range better. Readers take either.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autoq.formats import ActivationScheme, Container, QuantFormat, WeightElement, WeightScaling
from autoq.kernels import mxfp4, mxfp8
from autoq.kernels.mxfp8 import ScaleRule
from autoq.layers._codecs._types import (
    CodeGrid,
    Family,
    InputCodec,
    ScaleChoices,
    Tensors,
    WeightCodec,
    nearest_e2m1,
)
from autoq.layers._types import LayerCalibration

_MXFP8_RULE, _MXFP4_RULE = ScaleRule.UP, ScaleRule.HALF
_EXPONENT_BIAS = 127
_CHOSEN_OFFSETS = (-1, 1)
"""Powers of two beside that of the largest magnitude."""

_LARGEST_BYTE = 252  # of E8M0: 6 * 2**125 is the largest that float32 has


def _quantize_mxfp8(
    weight: Tensor, _: QuantFormat, __: LayerCalibration, ___: torch.dtype
) -> Tensors:
    return mxfp8.quantize(weight, _MXFP8_RULE).tensors()


def _pack_mxfp8(tensors: Tensors, _: Container) -> mxfp8.MXFP8Tensor:
    return mxfp8.MXFP8Tensor(tensors["codes"], tensors["block_scale"])


def _fake_quantize_mxfp8(
    weight: Tensor, _: QuantFormat, __: LayerCalibration, ___: torch.dtype, ____: Container
) -> Tensor:
    return mxfp8.fake_quantize(weight, _MXFP8_RULE)


def _quantize_mxfp4(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> Tensors:
    if calibration.codes is None:
        block_scale = _mxfp4_block_scale(weight, calibration)
        return mxfp4.quantize(weight, _MXFP4_RULE, block_scale).tensors()
    block_scale = _mxfp4_block_scale_of_codes(weight, calibration)
    return mxfp4.MXFP4Tensor(calibration.codes.to(weight.device), block_scale).tensors()


def _mxfp4_block_scale(weight: Tensor, calibration: LayerCalibration) -> Tensor | None:
    if calibration.block_scale is not None:
        return calibration.block_scale.to(weight.device)
    if calibration.importance is None:
        return None
    return mxfp4.choose_block_scale(weight, calibration.importance, _MXFP4_RULE)


def _mxfp4_block_scale_of_codes(weight: Tensor, calibration: LayerCalibration) -> Tensor:
    """The block scales under which codes are chosen and stored."""
    chosen = _mxfp4_block_scale(weight, calibration)
    return mxfp4.quantize(weight, _MXFP4_RULE).block_scale if chosen is None else chosen


def _pack_mxfp4(tensors: Tensors, _: Container) -> mxfp4.MXFP4Tensor:
    return mxfp4.MXFP4Tensor(tensors["codes"], tensors["block_scale"])


def _fake_quantize_mxfp4(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    chosen = (calibration.importance, calibration.block_scale, calibration.codes)
    if all(tensor is None for tensor in chosen):
        return mxfp4.fake_quantize(weight, _MXFP4_RULE)
    tensors = _quantize_mxfp4(weight, fmt, calibration, scale_dtype)
    return mxfp4.dequantize(_pack_mxfp4(tensors, container), weight.dtype)


def _mxfp4_grid(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> CodeGrid:
    block_scale = _mxfp4_block_scale_of_codes(weight, calibration)
    return CodeGrid.of_e2m1(_mxfp4_step(block_scale).repeat_interleave(mxfp4.BLOCK, dim=1))


def _mxfp4_step(block_scale: Tensor) -> Tensor:
    return torch.exp2(block_scale.float() - _EXPONENT_BIAS)


def _mxfp4_choices(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> ScaleChoices:
    taken = _mxfp4_block_scale_of_codes(weight, calibration)
    largest = mxfp4.quantize(weight, _MXFP4_RULE).block_scale.int()
    near = (
        (largest + offset).clamp(0, _LARGEST_BYTE).to(torch.uint8) for offset in _CHOSEN_OFFSETS
    )
    stored = torch.stack([taken, largest.to(torch.uint8), *near])
    return ScaleChoices(nearest=nearest_e2m1, stored=stored, step=_mxfp4_step(stored))


def _fake_quantize_mxfp8_input(rule: ScaleRule, x: Tensor, _: float) -> Tensor:
    return mxfp8.fake_quantize(x, rule)


def _fake_quantize_mxfp4_input(x: Tensor, _: float) -> Tensor:
    return mxfp4.fake_quantize(x, ScaleRule.HALF)


def _linear_mxfp8(
    rule: ScaleRule,
    x: Tensor,
    weight: mxfp8.MXFP8Tensor,
    bias: Tensor | None,
    *,
    input_scale: Any,
) -> Tensor:
    return mxfp8.linear(x, weight, bias, rule=rule)


def _linear_mxfp4(
    x: Tensor, weight: mxfp4.MXFP4Tensor, bias: Tensor | None, *, input_scale: Any
) -> Tensor:
    return mxfp4.linear(x, weight, bias, input_type=mxfp4.MXFP4Tensor, rule=ScaleRule.HALF)


MX = Family(
    weights={
        (WeightElement.E4M3, WeightScaling.MX): WeightCodec(
            tensors=("codes", "block_scale"),
            quantize=_quantize_mxfp8,
            pack=_pack_mxfp8,
            fake_quantize=_fake_quantize_mxfp8,
        ),
        (WeightElement.E2M1, WeightScaling.MX): WeightCodec(
            tensors=("codes", "block_scale"),
            quantize=_quantize_mxfp4,
            pack=_pack_mxfp4,
            fake_quantize=_fake_quantize_mxfp4,
            grid=_mxfp4_grid,
            choices=_mxfp4_choices,
        ),
    },
    inputs={
        ActivationScheme.MXFP8_UP: InputCodec(
            fake_quantize=partial(_fake_quantize_mxfp8_input, ScaleRule.UP)
        ),
        ActivationScheme.MXFP8_HALF: InputCodec(
            fake_quantize=partial(_fake_quantize_mxfp8_input, ScaleRule.HALF)
        ),
        ActivationScheme.MXFP4_HALF: InputCodec(fake_quantize=_fake_quantize_mxfp4_input),
    },
    dequantizers={mxfp8.MXFP8Tensor: mxfp8.dequantize, mxfp4.MXFP4Tensor: mxfp4.dequantize},
    linears={
        (mxfp8.MXFP8Tensor, ActivationScheme.MXFP8_UP): partial(_linear_mxfp8, ScaleRule.UP),
        (mxfp8.MXFP8Tensor, ActivationScheme.MXFP8_HALF): partial(_linear_mxfp8, ScaleRule.HALF),
        (mxfp4.MXFP4Tensor, ActivationScheme.MXFP4_HALF): _linear_mxfp4,
    },
)
