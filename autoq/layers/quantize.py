"""Quantising one layer's weight and input as its format says: codes and scales, or values.

What a format does to numbers is chosen by its `weight_element`, `weight_scaling` and
`activation` through the tables of `autoq.layers._codecs`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.errors import InputError, ModelError
from autoq.formats import FORMATS, QuantFormat
from autoq.kernels._packed import PackedTensor
from autoq.kernels.scoring import Scheme
from autoq.layers._codecs import (
    DEQUANTIZERS,
    INPUT_CODECS,
    WEIGHT_CODECS,
    CodeGrid,
    ScaleChoices,
    WeightCodec,
    int4_group_scale,
)
from autoq.layers._types import Container, LayerCalibration, QuantizedWeight
from autoq.layers.low_rank import no_branch

__all__ = [
    "CodeGrid",
    "Container",
    "ScaleChoices",
    "branch_product",
    "code_grid",
    "coded_weight",
    "dequantize_weight",
    "fake_quantize_input",
    "fake_quantize_weight",
    "input_scale",
    "int4_group_scale",
    "packed_weight",
    "quantize_weight",
    "scale_choices",
    "weight_scheme",
]


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
    if not _is_finite(weight):
        raise ModelError("weights must be finite, got NaN or infinity; repair or exclude the layer")
    tensors = codec.quantize(coded_weight(weight, calibration), fmt, calibration, scale_dtype)
    return QuantizedWeight(
        format=fmt.name,
        tensors={**tensors, **_branch_tensors(weight, fmt, calibration)},
        shape=(weight.shape[0], weight.shape[1]),
    )


def dequantize_weight(
    quantized: QuantizedWeight,
    *,
    container: Container = Container.MODELOPT,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight that the matrix unit sees, [out_features, in_features].

    It stands for W / p: the pre-quant scale is not multiplied back; with a branch of low rank for
    W / p - L, the branch not added. Computed in float32 and rounded once to `dtype`.

    Raises:
        UnknownNameError: the format is not registered.
        InputError: the tensors do not belong to the format.
    """
    packed = packed_weight(quantized, container=container)
    return DEQUANTIZERS[type(packed)](packed, dtype)


def packed_weight(
    quantized: QuantizedWeight, *, container: Container = Container.MODELOPT
) -> PackedTensor:
    """The weight as the kernels take it; dequantised it is `dequantize_weight`'s, bit for bit.

    Returns:
        The record of the format's family; it may share memory with `quantized`.

    Raises:
        UnknownNameError: the format is not registered.
        InputError: the tensors do not belong to the format.
    """
    codec = _codec(FORMATS[quantized.format])
    missing = ", ".join(name for name in codec.tensors if name not in quantized.tensors)
    if missing:
        raise InputError(f"a weight in {quantized.format} needs the tensors {missing}; add them")
    return codec.pack(quantized.tensors, container)


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
    coded = coded_weight(weight, calibration)
    if fmt.weight_element is None:
        return coded.to(weight.dtype)
    values = _codec(fmt).fake_quantize(coded, fmt, calibration, scale_dtype, container)
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
    codec = INPUT_CODECS[fmt.activation_in(container)]
    return codec.fake_quantize(_scaled(x, calibration.pre_quant_scale), calibration.input_amax)


def branch_product(x: Tensor, calibration: LayerCalibration) -> Tensor | None:
    """What the layer's branch of low rank adds to its output, (x * p) @ L.T.

    Args:
        x: float32, bfloat16 or float16 [..., in_features]: the layer's input, as it is.
        calibration: of the layer in its format.

    Returns:
        [..., out_features] in the dtype of `x`; None where there is no branch. No gradient flows
        through it.

    Raises:
        InputError: the shape does not fit.
    """
    if calibration.low_rank is None:
        return None
    return calibration.low_rank.product(_scaled(x, calibration.pre_quant_scale))


def code_grid(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, *, scale_dtype: torch.dtype
) -> CodeGrid | None:
    """The values of codes of W / p, for those who choose `LayerCalibration.codes`.

    Args are those of `quantize_weight`; the calibration has an `importance`.

    Returns:
        None of formats whose weights are not coded in 4 bits.
    """
    grid = _codec(fmt).grid
    if grid is None:
        return None
    return grid(coded_weight(weight, calibration), fmt, calibration, scale_dtype)


def scale_choices(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, *, scale_dtype: torch.dtype
) -> ScaleChoices | None:
    """The block scales that W / p can take, for those who choose `LayerCalibration.block_scale`.

    Args are those of `quantize_weight`.

    Returns:
        None of formats whose weights have no block scales of their own to choose.
    """
    choices = _codec(fmt).choices
    if choices is None:
        return None
    return choices(coded_weight(weight, calibration), fmt, calibration, scale_dtype)


def input_scale(
    fmt: QuantFormat, calibration: LayerCalibration, *, container: Container = Container.MODELOPT
) -> Tensor | None:
    """The scale under which `fake_quantize_input` quantises, for kernels that do it themselves.

    Returns:
        float32 scalar; None where inputs are not quantised, or each row under its own scale.

    Raises:
        InputError: the calibration's `input_amax` is negative, NaN or infinite.
    """
    scale_of = INPUT_CODECS[fmt.activation_in(container)].scale
    return None if scale_of is None else scale_of(calibration.input_amax)


def weight_scheme(
    fmt: QuantFormat, calibration: LayerCalibration, *, container: Container = Container.MODELOPT
) -> tuple[Scheme, Tensor] | None:
    """How `fake_quantize_weight` rounds, for `kernels.scoring`, which can do it on the way.

    Returns:
        The scheme and its scale, float32 scalar; None where it takes more than that.

    Raises:
        InputError: the calibration's `weight_amax` is negative, NaN or infinite.
    """
    changes = calibration.pre_quant_scale is not None or calibration.low_rank is not None
    if changes or fmt.weight_element is None:
        return None
    scheme_of = _codec(fmt).scheme
    return None if scheme_of is None else scheme_of(calibration, container)


def _is_finite(weight: Tensor) -> bool:
    """Forty times as fast as looking at every value; NaN is its own extreme."""
    extremes = torch.stack(weight.aminmax()) if weight.numel() else weight
    return bool(torch.isfinite(extremes).all())


def coded_weight(weight: Tensor, calibration: LayerCalibration) -> Tensor:
    """What codes stand for: W / p, less the branch of low rank where there is one.

    Returns:
        In float32 where there is a p, whose powers of two divide exactly there, or a branch.

    Raises:
        InputError: a shape does not fit.
    """
    smoothed = _smoothed(weight, calibration.pre_quant_scale)
    branch = calibration.low_rank
    if branch is None:
        return smoothed
    shape = (len(branch.up), branch.down.shape[1])
    if tuple(weight.shape) != shape:
        raise InputError(
            f"the branch of low rank must be of the weight's shape {tuple(weight.shape)}, got "
            f"{shape}; calibrate this layer anew"
        )
    return smoothed.float() - branch.values().to(weight.device)


def _branch_tensors(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration
) -> dict[str, Tensor]:
    rows, columns = weight.shape
    rank = fmt.branch_rank(rows, columns)
    if not rank:
        return {}
    branch = calibration.low_rank or no_branch(rows, columns, rank, weight.device)
    return {name: factor.to(weight.device) for name, factor in branch.tensors().items()}


def _scaled(x: Tensor, pre_quant_scale: Tensor | None) -> Tensor:
    """x * p."""
    x = x.detach()
    if pre_quant_scale is None:
        return x
    _require_pre_quant_scale(pre_quant_scale, x)
    return x * pre_quant_scale.to(device=x.device, dtype=x.dtype)


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


def _codec(fmt: QuantFormat) -> WeightCodec:
    if fmt.weight_element is None or fmt.weight_scaling is None:
        raise InputError(f"the format {fmt.name} has no codes; leave the weight as it is")
    return WEIGHT_CODECS[fmt.weight_element, fmt.weight_scaling]
