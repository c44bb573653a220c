"""Quantising one layer's weight and input as its format says: codes and scales, or values.

What a format does to numbers is chosen by its `weight_element` and `activation` through the two
tables at the end of this module; a new element type or activation scheme adds a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import torch
from torch import Tensor

from autoq.errors import InputError, ModelError
from autoq.formats import FORMATS, ActivationScheme, QuantFormat, WeightElement
from autoq.kernels import fp8, int4, nvfp4, w4a8
from autoq.layers._types import LayerCalibration, QuantizedWeight


class Container(StrEnum):
    """The checkpoint container whose run-time numerics are meant.

    They differ for INT4 weights with FP8 activations only. Engines that load MODELOPT round
    code * scale once more to E4M3 under a per-tensor scale, and quantise the input under a static
    scale; those that load COMPRESSED_TENSORS multiply code by scale, and quantise each token of
    the input under its own scale.
    """

    MODELOPT = "modelopt"
    COMPRESSED_TENSORS = "compressed-tensors"


def quantize_weight(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, *, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """Codes and scales of W / p.

    Args:
        weight: float32, bfloat16 or float16 [out_features, in_features].
        fmt: the format; not `none`.
        calibration: of this slot in this format.
        scale_dtype: dtype to which INT4 group scales are rounded; the model's storage dtype.

    Raises:
        ModelError: the weight holds NaN or infinity.
        InputError: the shape, dtype or calibration does not fit, or the format is `none`.
    """
    codec = _codec(fmt)
    if not torch.isfinite(weight).all():
        raise ModelError("weights must be finite, got NaN or infinity; repair or exclude the layer")
    smoothed = _smoothed(weight, calibration.pre_quant_scale)
    return QuantizedWeight(
        format=fmt.name,
        tensors=codec.quantize(smoothed, fmt, calibration, scale_dtype),
        shape=(weight.shape[0], weight.shape[1]),
    )


def dequantize_weight(
    quantized: QuantizedWeight,
    *,
    container: Container = Container.MODELOPT,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight that the matrix unit sees, [out_features, in_features].

    It stands for W / p: the pre-quant scale is not multiplied back. Computed in float32 and
    rounded once to `dtype`.

    Raises:
        UnknownNameError: the format is not registered.
        InputError: the tensors do not belong to the format.
    """
    codec = _codec(FORMATS[quantized.format])
    missing = ", ".join(name for name in codec.tensors if name not in quantized.tensors)
    if missing:
        raise InputError(f"a weight in {quantized.format} needs the tensors {missing}; add them")
    return codec.dequantize(quantized.tensors, container, dtype)


def fake_quantize_weight(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    *,
    scale_dtype: torch.dtype,
    container: Container = Container.MODELOPT,
) -> Tensor:
    """`dequantize_weight(quantize_weight(...))` in the weight's dtype, bit for bit, but faster.

    No codes are stored, and NaN and infinity are not looked for. In the format `none` this is
    W / p itself. No gradient flows through the result. Args and errors are those of
    `quantize_weight`.
    """
    smoothed = _smoothed(weight, calibration.pre_quant_scale)
    if fmt.weight_element is None:
        return smoothed.to(weight.dtype)
    values = _codec(fmt).fake_quantize(smoothed, fmt, calibration, scale_dtype, container)
    return values.to(weight.dtype)


def fake_quantize_input(
    x: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    *,
    container: Container = Container.MODELOPT,
) -> Tensor:
    """What the layer's matrix unit sees of its input: x * p, quantised and dequantised.

    Args:
        x: float32, bfloat16 or float16 [..., in_features].
        fmt: the format; `none` quantises nothing.
        calibration: of the layer in this format.
        container: whose run time is meant.

    Returns:
        Shape and dtype of `x`; no gradient flows through it.

    Raises:
        InputError: the shape, dtype or calibration does not fit.
    """
    x = x.detach()
    if calibration.pre_quant_scale is not None:
        _require_pre_quant_scale(calibration.pre_quant_scale, x)
        x = x * calibration.pre_quant_scale.to(device=x.device, dtype=x.dtype)
    if (fmt.weight_element, container) in _PER_TOKEN_INPUTS:
        return fp8.fake_quantize(x, scaling=fp8.Scaling.ROW)
    return _INPUT_QUANTIZERS[fmt.activation](x, calibration.input_amax)


def _smoothed(weight: Tensor, pre_quant_scale: Tensor | None) -> Tensor:
    """W / p, in float32 where there is a p: there the powers of two divide exactly."""
    weight = weight.detach()
    if pre_quant_scale is None:
        return weight
    _require_pre_quant_scale(pre_quant_scale, weight)
    return weight.float() / pre_quant_scale.to(weight.device)


def _require_pre_quant_scale(pre_quant_scale: Tensor, operand: Tensor) -> None:
    if pre_quant_scale.shape != operand.shape[-1:]:
        raise InputError(
            f"pre_quant_scale must have shape {tuple(operand.shape[-1:])}, "
            f"got {tuple(pre_quant_scale.shape)}; calibrate this layer anew"
        )


def _codec(fmt: QuantFormat) -> _WeightCodec:
    if fmt.weight_element is None:
        raise InputError(f"the format {fmt.name} has no codes; leave the weight as it is")
    return _WEIGHT_CODECS[fmt.weight_element]


_Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _WeightCodec:
    """What one element type does to a weight [N, K] that is smoothed already.

    The arguments are those of the public functions, in their order.
    """

    tensors: tuple[str, ...]  # names in QuantizedWeight.tensors
    quantize: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype], _Tensors]
    dequantize: Callable[[_Tensors, Container, torch.dtype], Tensor]
    fake_quantize: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype, Container], Tensor]


def _quantize_e4m3(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> _Tensors:
    return fp8.quantize(weight, fp8.tensor_scale(calibration.weight_amax)).tensors()


def _dequantize_e4m3(tensors: _Tensors, _: Container, dtype: torch.dtype) -> Tensor:
    packed = fp8.FP8Tensor(tensors["codes"], tensors["scale"], fp8.Scaling.TENSOR)
    return fp8.dequantize(packed, dtype)


def _fake_quantize_e4m3(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype, ___: Container
) -> Tensor:
    return fp8.fake_quantize(weight, fp8.tensor_scale(calibration.weight_amax))


def _quantize_e2m1(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> _Tensors:
    scale = nvfp4.global_scale(calibration.weight_amax)
    return nvfp4.quantize(weight, scale).tensors()


def _dequantize_e2m1(tensors: _Tensors, container: Container, dtype: torch.dtype) -> Tensor:
    scale = _read_global_scale(tensors["global_scale"], container)
    packed = nvfp4.NVFP4Tensor(
        codes=tensors["codes"], block_scale=tensors["block_scale"], global_scale=scale
    )
    return nvfp4.dequantize(packed, dtype)


def _fake_quantize_e2m1(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    scale = nvfp4.global_scale(calibration.weight_amax)
    if torch.equal(_read_global_scale(scale, container), scale):
        return nvfp4.fake_quantize(weight, scale)
    tensors = _quantize_e2m1(weight, fmt, calibration, scale_dtype)
    return _dequantize_e2m1(tensors, container, weight.dtype)


def _read_global_scale(scale: Tensor, container: Container) -> Tensor:
    """The scale that a reader has: compressed-tensors stores its reciprocal.

    Two reciprocals change the last bit of about one scale in six.
    """
    if container is Container.COMPRESSED_TENSORS:
        return scale.reciprocal().reciprocal()
    return scale


def _quantize_int4(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> _Tensors:
    group_scale = _int4_group_scale(weight, fmt, scale_dtype)
    tensor_scale = fp8.tensor_scale(calibration.weight_amax)
    return {
        "codes": int4.unpack(int4.quantize(weight, group_scale)),
        "group_scale": group_scale,
        "tensor_scale": tensor_scale.to(weight.device),
    }


def _dequantize_int4(tensors: _Tensors, container: Container, dtype: torch.dtype) -> Tensor:
    packed = int4.pack(tensors["codes"], tensors["group_scale"])
    if container is Container.COMPRESSED_TENSORS:
        return int4.dequantize(packed, dtype)
    two_level = w4a8.W4A8Tensor(
        codes=packed.codes, group_scale=packed.group_scale, tensor_scale=tensors["tensor_scale"]
    )
    return w4a8.dequantize(two_level, dtype)


def _fake_quantize_int4(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    group_scale = _int4_group_scale(weight, fmt, scale_dtype)
    if container is Container.COMPRESSED_TENSORS:
        return int4.fake_quantize(weight, group_scale)
    tensor_scale = fp8.tensor_scale(calibration.weight_amax)
    return w4a8.fake_quantize(weight, group_scale, tensor_scale)


def _int4_group_scale(weight: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype) -> Tensor:
    group_size = fmt.weight_block_size or weight.shape[-1]
    return int4.group_scale(weight, group_size, storage_dtype=scale_dtype)


def _keep_input(x: Tensor, _: float) -> Tensor:
    return x


def _fake_quantize_fp8_input(x: Tensor, amax: float) -> Tensor:
    return fp8.fake_quantize(x, fp8.tensor_scale(amax))


def _fake_quantize_nvfp4_input(x: Tensor, amax: float) -> Tensor:
    return nvfp4.fake_quantize(x, nvfp4.global_scale(amax))


_WEIGHT_CODECS: Mapping[WeightElement, _WeightCodec] = {
    WeightElement.E4M3: _WeightCodec(
        tensors=("codes", "scale"),
        quantize=_quantize_e4m3,
        dequantize=_dequantize_e4m3,
        fake_quantize=_fake_quantize_e4m3,
    ),
    WeightElement.E2M1: _WeightCodec(
        tensors=("codes", "block_scale", "global_scale"),
        quantize=_quantize_e2m1,
        dequantize=_dequantize_e2m1,
        fake_quantize=_fake_quantize_e2m1,
    ),
    WeightElement.INT4: _WeightCodec(
        tensors=("codes", "group_scale", "tensor_scale"),
        quantize=_quantize_int4,
        dequantize=_dequantize_int4,
        fake_quantize=_fake_quantize_int4,
    ),
}

_INPUT_QUANTIZERS: Mapping[ActivationScheme, Callable[[Tensor, float], Tensor]] = {
    ActivationScheme.NONE: _keep_input,
    ActivationScheme.FP8_STATIC_TENSOR: _fake_quantize_fp8_input,
    ActivationScheme.NVFP4_DYNAMIC: _fake_quantize_nvfp4_input,
}

_PER_TOKEN_INPUTS = frozenset({(WeightElement.INT4, Container.COMPRESSED_TENSORS)})
"""Where a container's run time overrules the format's activation scheme."""
