"""FP8: E4M3 weights and inputs."""

from __future__ import annotations

from functools import partial

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


def _quantize_own(
    scaling: fp8.Scaling,
    weight: Tensor,
    _: QuantFormat,
    __: LayerCalibration,
    ___: torch.dtype,
) -> Tensors:
    return fp8.quantize(weight, scaling=scaling).tensors()


def _pack_own(scaling: fp8.Scaling, tensors: Tensors, _: Container) -> fp8.FP8Tensor:
    return fp8.FP8Tensor(tensors["codes"], tensors["scale"], scaling)


def _fake_quantize_own(
    scaling: fp8.Scaling,
    weight: Tensor,
    _: QuantFormat,
    __: LayerCalibration,
    ___: torch.dtype,
    ____: Container,
) -> Tensor:
    return fp8.fake_quantize(weight, scaling=scaling)


def _under_own_scales(scaling: fp8.Scaling) -> WeightCodec:
    """Of weights whose scales follow from them alone."""
    return WeightCodec(
        tensors=("codes", "scale"),
        quantize=partial(_quantize_own, scaling),
        pack=partial(_pack_own, scaling),
        fake_quantize=partial(_fake_quantize_own, scaling),
    )


def _fake_quantize_fp8_input(x: Tensor, amax: float) -> Tensor:
    return fp8.fake_quantize(x, fp8.tensor_scale(amax))


def _fake_quantize_tokens(x: Tensor, _: float) -> Tensor:
    return fp8.fake_quantize(x, scaling=fp8.Scaling.ROW)


def _fake_quantize_blocks(x: Tensor, _: float) -> Tensor:
    return fp8.fake_quantize(x, scaling=fp8.Scaling.BLOCK_1X128)


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
        (WeightElement.E4M3, WeightScaling.ROW): _under_own_scales(fp8.Scaling.ROW),
        (WeightElement.E4M3, WeightScaling.BLOCK): _under_own_scales(fp8.Scaling.BLOCK_128X128),
    },
    inputs={
        ActivationScheme.FP8_STATIC_TENSOR: InputCodec(
            fake_quantize=_fake_quantize_fp8_input, scale=fp8.tensor_scale
        ),
        ActivationScheme.FP8_DYNAMIC_TOKEN: InputCodec(fake_quantize=_fake_quantize_tokens),
        ActivationScheme.FP8_DYNAMIC_BLOCK: InputCodec(fake_quantize=_fake_quantize_blocks),
    },
    dequantizers={fp8.FP8Tensor: fp8.dequantize},
    linears={
        (fp8.FP8Tensor, ActivationScheme.FP8_STATIC_TENSOR): fp8.linear,
        (fp8.FP8Tensor, ActivationScheme.FP8_DYNAMIC_TOKEN): fp8.linear,
        (fp8.FP8Tensor, ActivationScheme.FP8_DYNAMIC_BLOCK): fp8.linear,
    },
)
