"""FP8: E4M3 weights and inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.formats import ActivationScheme, Container, QuantFormat, WeightElement, WeightScaling
from autoq.kernels import fp8
from autoq.kernels.scoring import Scheme
from autoq.layers._codecs._types import Family, InputCodec, Tensors, WeightCodec
from autoq.layers._types import LayerCalibration


def _quantize_e4m3(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> Tensors:
    return fp8.quantize(weight, fp8.tensor_scale(calibration.weight_amax)).tensors()


def _pack_e4m3(tensors: Tensors, _: Container) -> fp8.FP8Tensor:
    return fp8.FP8Tensor(tensors["codes"], tensors["scale"], fp8.Scaling.TENSOR)


def _fake_quantize_e4m3(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype, ___: Container
) -> Tensor:
    return fp8.fake_quantize(weight, fp8.tensor_scale(calibration.weight_amax))


def _fake_quantize_fp8_input(x: Tensor, amax: float) -> Tensor:
    return fp8.fake_quantize(x, fp8.tensor_scale(amax))


def _fake_quantize_tokens(x: Tensor, _: float) -> Tensor:
    return fp8.fake_quantize(x, scaling=fp8.Scaling.ROW)


def _e4m3_scheme(calibration: LayerCalibration, _: Container) -> tuple[Scheme, Tensor]:
    return Scheme.FP8_TENSOR, fp8.tensor_scale(calibration.weight_amax)


FP8 = Family(
    weights={
        (WeightElement.E4M3, WeightScaling.TENSOR): WeightCodec(
            tensors=("codes", "scale"),
            quantize=_quantize_e4m3,
            pack=_pack_e4m3,
            fake_quantize=_fake_quantize_e4m3,
            scheme=_e4m3_scheme,
        ),
    },
    inputs={
        ActivationScheme.FP8_STATIC_TENSOR: InputCodec(
            fake_quantize=_fake_quantize_fp8_input, scale=fp8.tensor_scale
        ),
        ActivationScheme.FP8_DYNAMIC_TOKEN: InputCodec(fake_quantize=_fake_quantize_tokens),
    },
    dequantizers={fp8.FP8Tensor: fp8.dequantize},
    linears={(fp8.FP8Tensor, ActivationScheme.FP8_STATIC_TENSOR): fp8.linear},
)
