"""NVFP4: E2M1 weights and inputs in blocks of 16."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.formats import ActivationScheme, Container, QuantFormat, WeightElement, WeightScaling
from autoq.kernels import nvfp4
from autoq.kernels.scoring import Scheme
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

_CHOSEN_OFFSETS = tuple(range(-4, 13))
"""Steps of E4M3 from the scale of the largest magnitude; eight double a scale."""

_SMALLEST_CODE, _LARGEST_CODE = 1, 126  # of E4M3: 2**-9 and 448


def _quantize_e2m1(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> Tensors:
    scale = nvfp4.global_scale(calibration.weight_amax).to(weight.device)
    if calibration.codes is None:
        block_scale = _e2m1_block_scale(weight, scale, calibration)
        return nvfp4.quantize(weight, scale, block_scale).tensors()
    block_scale = _e2m1_block_scale_of_codes(weight, scale, calibration)
    codes = calibration.codes.to(weight.device)
    return nvfp4.NVFP4Tensor(codes=codes, block_scale=block_scale, global_scale=scale).tensors()


def _e2m1_grid(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> CodeGrid:
    scale = nvfp4.global_scale(calibration.weight_amax).to(weight.device)
    block_scale = _e2m1_block_scale_of_codes(weight, scale, calibration)
    return CodeGrid.of_e2m1((block_scale.float() * scale).repeat_interleave(nvfp4.BLOCK, dim=1))


def _e2m1_block_scale(
    weight: Tensor, scale: Tensor, calibration: LayerCalibration
) -> Tensor | None:
    if calibration.block_scale is not None:
        return calibration.block_scale.to(weight.device)
    if calibration.importance is None:
        return None
    return nvfp4.choose_block_scale(weight, scale, calibration.importance)


def _e2m1_block_scale_of_codes(
    weight: Tensor, scale: Tensor, calibration: LayerCalibration
) -> Tensor:
    """The block scales under which codes are chosen and stored."""
    chosen = _e2m1_block_scale(weight, scale, calibration)
    return nvfp4.quantize(weight, scale).block_scale if chosen is None else chosen


def _e2m1_choices(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> ScaleChoices:
    scale = nvfp4.global_scale(calibration.weight_amax).to(weight.device)
    taken = _e2m1_block_scale_of_codes(weight, scale, calibration).view(torch.uint8)
    largest = nvfp4.quantize(weight, scale).block_scale.view(torch.uint8).int()
    near = ((largest + offset).clamp(_SMALLEST_CODE, _LARGEST_CODE) for offset in _CHOSEN_OFFSETS)
    codes = torch.stack([taken, *(code.to(torch.uint8) for code in near)])
    stored = codes.view(torch.float8_e4m3fn)
    return ScaleChoices(nearest=nearest_e2m1, stored=stored, step=stored.float() * scale)


def _pack_e2m1(tensors: Tensors, container: Container) -> nvfp4.NVFP4Tensor:
    scale = _read_global_scale(tensors["global_scale"], container)
    return nvfp4.NVFP4Tensor(
        codes=tensors["codes"], block_scale=tensors["block_scale"], global_scale=scale
    )


def _fake_quantize_e2m1(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    scale = nvfp4.global_scale(calibration.weight_amax)
    if calibration.codes is None and torch.equal(_read_global_scale(scale, container), scale):
        block_scale = _e2m1_block_scale(weight, scale, calibration)
        return nvfp4.fake_quantize(weight, scale, block_scale)
    tensors = _quantize_e2m1(weight, fmt, calibration, scale_dtype)
    return nvfp4.dequantize(_pack_e2m1(tensors, container), weight.dtype)


def _read_global_scale(scale: Tensor, container: Container) -> Tensor:
    """The scale that a reader has: compressed-tensors stores its reciprocal.

    Two reciprocals change the last bit of about one scale in six.
    """
    if container is Container.COMPRESSED_TENSORS:
        return scale.reciprocal().reciprocal()
    return scale


def _fake_quantize_nvfp4_input(x: Tensor, amax: float) -> Tensor:
    return nvfp4.fake_quantize(x, nvfp4.global_scale(amax))


def _e2m1_scheme(
    calibration: LayerCalibration, container: Container
) -> tuple[Scheme, Tensor] | None:
    scale = nvfp4.global_scale(calibration.weight_amax)
    chosen = (calibration.importance, calibration.block_scale, calibration.codes)
    is_plain = all(tensor is None for tensor in chosen)
    if not is_plain or not torch.equal(_read_global_scale(scale, container), scale):
        return None
    return Scheme.NVFP4, scale


NVFP4 = Family(
    weights={
        (WeightElement.E2M1, WeightScaling.TWO_LEVEL_GROUP): WeightCodec(
            tensors=("codes", "block_scale", "global_scale"),
            quantize=_quantize_e2m1,
            pack=_pack_e2m1,
            fake_quantize=_fake_quantize_e2m1,
            grid=_e2m1_grid,
            choices=_e2m1_choices,
            scheme=_e2m1_scheme,
        ),
    },
    inputs={
        ActivationScheme.NVFP4_DYNAMIC: InputCodec(
            fake_quantize=_fake_quantize_nvfp4_input, scale=nvfp4.global_scale
        ),
    },
    dequantizers={nvfp4.NVFP4Tensor: nvfp4.dequantize},
    linears={
        (nvfp4.NVFP4Tensor, ActivationScheme.NVFP4_DYNAMIC): nvfp4.linear,
        (nvfp4.NVFP4Tensor, ActivationScheme.NONE): nvfp4.linear,  # without an input scale
    },
)
