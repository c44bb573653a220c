"""INT4 weights in groups, and W4A8, their second level in E4M3."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.formats import ActivationScheme, Container, QuantFormat, WeightElement, WeightScaling
from autoq.kernels import fp8, int4, int4_dq, w4a8
from autoq.layers._codecs._types import (
    CodeGrid,
    Family,
    ScaleChoices,
    Tensors,
    WeightCodec,
)
from autoq.layers._types import LayerCalibration

_CHOSEN_FACTORS = tuple(1 - step / 40 for step in range(21))
"""Shares of the scale of the largest magnitude, down to half of it."""


def _quantize_int4(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> Tensors:
    group_scale = _group_scale(weight, fmt, calibration, scale_dtype)
    if calibration.codes is None:
        codes = int4.quantize_plain(weight, group_scale)
    else:
        codes = _signed_nibbles(calibration.codes.to(weight.device))
    return {"codes": codes, "group_scale": group_scale}


def _quantize_w4a8(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> Tensors:
    tensors = _quantize_int4(weight, fmt, calibration, scale_dtype)
    tensor_scale = fp8.tensor_scale(calibration.weight_amax).to(weight.device)
    return {**tensors, "tensor_scale": tensor_scale}


def _signed_nibbles(packed: Tensor) -> Tensor:
    """int8 [N, K] in -8..7 of uint8 [N, K/2], even column in the low nibble."""
    nibbles = torch.stack([packed << 4, packed & 0xF0], dim=-1).flatten(-2)
    return nibbles.view(torch.int8) >> 4


def _int4_grid(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> CodeGrid:
    return _grid(weight, _group_scale(weight, fmt, calibration, scale_dtype))


def _grid(weight: Tensor, group_scale: Tensor) -> CodeGrid:
    levels = torch.arange(-8, 8, device=weight.device)
    return CodeGrid(
        levels=levels.float(),
        nibbles=levels.to(torch.uint8) & 0xF,
        step=group_scale.repeat_interleave(weight.shape[1] // group_scale.shape[1], dim=1),
    )


def _pack_int4(tensors: Tensors, _: Container) -> int4.INT4Tensor:
    return int4.pack(tensors["codes"], tensors["group_scale"])


def _pack_w4a8(tensors: Tensors, container: Container) -> int4.INT4Tensor | w4a8.W4A8Tensor:
    packed = _pack_int4(tensors, container)
    if container is Container.COMPRESSED_TENSORS:
        return packed
    return w4a8.W4A8Tensor(
        codes=packed.codes, group_scale=packed.group_scale, tensor_scale=tensors["tensor_scale"]
    )


def _fake_quantize_int4(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    if calibration.codes is not None:
        tensors = _quantize_int4(weight, fmt, calibration, scale_dtype)
        return int4.dequantize(_pack_int4(tensors, container), weight.dtype)
    group_scale = _group_scale(weight, fmt, calibration, scale_dtype)
    return int4.fake_quantize(weight, group_scale)


def _fake_quantize_w4a8(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    if container is Container.COMPRESSED_TENSORS:
        return _fake_quantize_int4(weight, fmt, calibration, scale_dtype, container)
    if calibration.codes is not None:
        tensors = _quantize_w4a8(weight, fmt, calibration, scale_dtype)
        packed = _pack_w4a8(tensors, container)
        assert isinstance(packed, w4a8.W4A8Tensor)
        return w4a8.dequantize(packed, weight.dtype)
    group_scale = _group_scale(weight, fmt, calibration, scale_dtype)
    tensor_scale = fp8.tensor_scale(calibration.weight_amax)
    return w4a8.fake_quantize(weight, group_scale, tensor_scale)


def _group_scale(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> Tensor:
    if calibration.block_scale is not None:
        return calibration.block_scale.to(weight.device)
    return int4_group_scale(weight, fmt, scale_dtype, calibration.importance)


def _int4_choices(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> ScaleChoices:
    taken = _group_scale(weight, fmt, calibration, scale_dtype)
    largest = int4_group_scale(weight, fmt, scale_dtype, None)
    shares = [(largest * factor).to(scale_dtype).float() for factor in _CHOSEN_FACTORS]
    step = torch.stack([taken, *(torch.where(share > 0, share, largest) for share in shares)])
    return ScaleChoices(nearest=_nearest_level, stored=step, step=step)


def _nearest_level(values: Tensor) -> Tensor:
    return values.round_().clamp_(-8, 7)


def int4_group_scale(
    weight: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype, importance: Tensor | None
) -> Tensor:
    """Scales of the groups of W / p, rounded to `scale_dtype`; see `LayerCalibration.importance`."""
    group_size = fmt.weight_block_size or weight.shape[-1]
    if importance is None:
        return int4.group_scale(weight, group_size, storage_dtype=scale_dtype)
    return int4.choose_group_scale(weight, importance, group_size, storage_dtype=scale_dtype)


def _linear_with_inputs_as_they_are(
    x: Tensor, weight: int4.INT4Tensor, bias: Tensor | None, *, input_scale: None
) -> Tensor:
    return int4.linear(x, weight, bias)


def _double_scales(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration
) -> int4_dq.QuantizedScales:
    scale = int4_group_scale(weight, fmt, torch.float32, calibration.importance)
    return int4_dq.quantize_scales(scale)


def _quantize_double(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, _: torch.dtype
) -> Tensors:
    scales = _double_scales(weight, fmt, calibration)
    if calibration.codes is None:
        codes = int4.quantize_plain(weight, scales.values())
    else:
        codes = _signed_nibbles(calibration.codes.to(weight.device))
    return {
        "codes": codes,
        "scale_codes": scales.codes,
        "second_scale": scales.second_scale,
        "mean_scale": scales.mean,
    }


def _pack_double(tensors: Tensors, _: Container) -> int4_dq.INT4DoubleTensor:
    names = ("scale_codes", "second_scale", "mean_scale")
    scales = int4_dq.QuantizedScales(*(tensors[name] for name in names))
    return int4_dq.pack(tensors["codes"], scales)


def _fake_quantize_double(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    if calibration.codes is not None:
        tensors = _quantize_double(weight, fmt, calibration, scale_dtype)
        return int4_dq.dequantize(_pack_double(tensors, container), weight.dtype)
    return int4.fake_quantize(weight, _double_scales(weight, fmt, calibration).values())


def _double_grid(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, _: torch.dtype
) -> CodeGrid:
    return _grid(weight, _double_scales(weight, fmt, calibration).values())


def _linear_of_double(
    x: Tensor, weight: int4_dq.INT4DoubleTensor, bias: Tensor | None, *, input_scale: None
) -> Tensor:
    return int4_dq.linear(x, weight, bias)


INT4 = Family(
    weights={
        (WeightElement.INT4, WeightScaling.DOUBLE_GROUP): WeightCodec(
            tensors=("codes", "scale_codes", "second_scale", "mean_scale"),
            quantize=_quantize_double,
            pack=_pack_double,
            fake_quantize=_fake_quantize_double,
            grid=_double_grid,
        ),
        (WeightElement.INT4, WeightScaling.GROUP): WeightCodec(
            tensors=("codes", "group_scale"),
            quantize=_quantize_int4,
            pack=_pack_int4,
            fake_quantize=_fake_quantize_int4,
            grid=_int4_grid,
            choices=_int4_choices,
        ),
        (WeightElement.INT4, WeightScaling.TWO_LEVEL_GROUP): WeightCodec(
            tensors=("codes", "group_scale", "tensor_scale"),
            quantize=_quantize_w4a8,
            pack=_pack_w4a8,
            fake_quantize=_fake_quantize_w4a8,
            grid=_int4_grid,
            choices=_int4_choices,
        ),
    },
    dequantizers={
        int4.INT4Tensor: int4.dequantize,
        int4_dq.INT4DoubleTensor: int4_dq.dequantize,
        w4a8.W4A8Tensor: w4a8.dequantize,
    },
    linears={
        (int4_dq.INT4DoubleTensor, ActivationScheme.NONE): _linear_of_double,
        (int4.INT4Tensor, ActivationScheme.NONE): _linear_with_inputs_as_they_are,
        (int4.INT4Tensor, ActivationScheme.FP8_DYNAMIC_TOKEN): w4a8.linear,
        (w4a8.W4A8Tensor, ActivationScheme.FP8_STATIC_TENSOR): w4a8.linear,
    },
)
