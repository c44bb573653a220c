"""INT8: weights with a scale per row, inputs with a scale per token or as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.formats import ActivationScheme, Container, QuantFormat, WeightElement, WeightScaling
from autoq.kernels import int8
from autoq.layers._codecs._types import Family, InputCodec, Tensors, WeightCodec
from autoq.layers._types import LayerCalibration


def _quantize_int8(
    weight: Tensor, fmt: QuantFormat, _: LayerCalibration, scale_dtype: torch.dtype
) -> Tensors:
    return int8.quantize(weight, _row_scale(weight, fmt, scale_dtype)).tensors()


def _pack_int8(tensors: Tensors, _: Container) -> int8.INT8Tensor:
    return int8.INT8Tensor(tensors["codes"], tensors["scale"])


def _fake_quantize_int8(
    weight: Tensor,
    fmt: QuantFormat,
    _: LayerCalibration,
    scale_dtype: torch.dtype,
    __: Container,
) -> Tensor:
    return int8.fake_quantize(weight, _row_scale(weight, fmt, scale_dtype))


def _row_scale(weight: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype) -> Tensor:
    """Engines keep scales in float32 beside INT8 inputs, and in the model's dtype without them."""
    has_inputs = fmt.activation is not ActivationScheme.NONE
    return int8.row_scale(weight, storage_dtype=torch.float32 if has_inputs else scale_dtype)


def _fake_quantize_tokens(x: Tensor, _: float) -> Tensor:
    return int8.fake_quantize(x)


def _linear(
    x: Tensor, weight: int8.INT8Tensor, bias: Tensor | None, *, input_scale: None
) -> Tensor:
    return int8.linear(x, weight, bias)


def _linear_with_inputs_as_they_are(
    x: Tensor, weight: int8.INT8Tensor, bias: Tensor | None, *, input_scale: None
) -> Tensor:
    return int8.linear(x, weight, bias, quantize_input=False)


INT8 = Family(
    weights={
        (WeightElement.INT8, WeightScaling.ROW): WeightCodec(
            tensors=("codes", "scale"),
            quantize=_quantize_int8,
            pack=_pack_int8,
            fake_quantize=_fake_quantize_int8,
        ),
    },
    inputs={ActivationScheme.INT8_DYNAMIC_TOKEN: InputCodec(fake_quantize=_fake_quantize_tokens)},
    dequantizers={int8.INT8Tensor: int8.dequantize},
    linears={
        (int8.INT8Tensor, ActivationScheme.INT8_DYNAMIC_TOKEN): _linear,
        (int8.INT8Tensor, ActivationScheme.NONE): _linear_with_inputs_as_they_are,
    },
)
