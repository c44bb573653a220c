"""What a format computes, as ONNX operators: Q/DQ nodes round codes and scales.

Codes stand as [in_features, out_features], the second operand of MatMul, so that nothing has to be
transposed and onnxruntime finds the pairs of DequantizeLinear and MatMul that it fuses. Every value
is float32 and equal to the simulation's bit for bit; only sums are added in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from autoq.formats import (
    FORMATS,
    NONE,
    ActivationScheme,
    Container,
    FormatName,
    QuantFormat,
    WeightElement,
    WeightScaling,
)
from autoq.kernels import fp8, int8
from autoq.kernels._checks import LARGEST_FLOAT16, SMALLEST_SCALE
from autoq.layers import LayerCalibration, QuantizedWeight
from autoq.layers.quantize import input_scale

Constants: TypeAlias = Mapping[str, ir.TensorProtocol]
"""What is stored of a weight, by the end of its name."""

_INPUT_BLOCK = 128  # of FP8_DYNAMIC_BLOCK

_NO_ELEMENT: Mapping[WeightElement, str] = {
    WeightElement.E2M1: (
        "onnxruntime 1.31 has no DequantizeLinear of E2M1 codes for CPUs, so that what is written "
        "could not be run and compared"
    ),
}
_NO_SCALING: Mapping[WeightScaling, str] = {
    WeightScaling.MX: (
        "ONNX has no operator that finds the power of two above a magnitude, which its inputs are "
        "scaled by"
    ),
}


def onnx_formats() -> tuple[FormatName, ...]:
    """The formats that ONNX can hold, `none` aside."""
    held = (fmt for fmt in FORMATS.values() if onnx_refusal(fmt) is None)
    return tuple(fmt.name for fmt in held if fmt.name != NONE)


def onnx_refusal(fmt: QuantFormat) -> str | None:
    """Why ONNX cannot hold a format, or None if it can."""
    element, scaling = fmt.weight_element, fmt.weight_scaling
    if element is None or scaling is None:
        return None
    for reason in (_NO_ELEMENT.get(element), _NO_SCALING.get(scaling)):
        if reason is not None:
            return reason
    activations = {fmt.activation, *dict(fmt.container_activations).values()}
    if (element, scaling) not in _WEIGHTS or not activations <= _INPUTS.keys():
        return "no chain of Q/DQ nodes is known to autoq that computes what it does"
    return None


# Weights


def stored_constants(
    weight: QuantizedWeight, calibration: LayerCalibration, container: Container
) -> Constants:
    """Codes and scales of a weight [out_features, in_features] as the graph's initialisers.

    Returns:
        "codes" of FLOAT8E4M3FN, INT8 or INT4 [in_features, out_features], and FLOAT scales, along
        the same axes; "input_scale" where it is static. What two levels of scales are for is
        stored as it is searched: "scale" per group and "tensor_scale".
    """
    fmt = FORMATS[weight.format]
    constants = dict(_weight(fmt).constants(weight, fmt))
    if not _has_second_level(fmt, container):
        constants.pop("tensor_scale", None)
    static = input_scale(fmt, calibration, container=container)
    if static is not None:
        constants["input_scale"] = _float_tensor(static)
    return constants


def dequantized(
    tape: Tape, values: Mapping[str, ir.Value], fmt: QuantFormat, container: Container, name: str
) -> ir.Value:
    """The weight [in_features, out_features], float32, of its constants' values."""
    out = ir.Value(name=name)
    if not _has_second_level(fmt, container):
        options = _weight(fmt).options(fmt)
        return tape.op("DequantizeLinear", [values["codes"], values["scale"]], options, output=out)
    # Code * rate is rounded to E4M3, which is what the matrix unit multiplies.
    rate = _rate(tape, values["scale"], values["tensor_scale"])
    wide = tape.op("DequantizeLinear", [values["codes"], rate], _weight(fmt).options(fmt))
    rounded = tape.op("QuantizeLinear", [wide, _constant(tape, torch.tensor(1.0))], _to_e4m3())
    return tape.op("DequantizeLinear", [rounded, values["tensor_scale"]], output=out)


def _rate(tape: Tape, group_scale: ir.Value, tensor_scale: ir.Value) -> ir.Value:
    """What a code counts under the second level, with the engine's two roundings to float16."""
    quotient = tape.op("Div", [_through_float16(tape, group_scale), tensor_scale])
    bounded = tape.op("Min", [quotient, _constant(tape, torch.tensor(LARGEST_FLOAT16))])
    return _through_float16(tape, bounded)


def _through_float16(tape: Tape, value: ir.Value) -> ir.Value:
    half = tape.op("Cast", [value], {"to": ir.DataType.FLOAT16.value})
    return tape.op("Cast", [half], {"to": ir.DataType.FLOAT.value})


@dataclass(frozen=True, slots=True)
class _Weight:
    """How weights of an element and a scaling are stored, and what DequantizeLinear is told."""

    constants: Callable[[QuantizedWeight, QuantFormat], Constants]
    options: Callable[[QuantFormat], dict[str, Any]]


def _tensor_constants(weight: QuantizedWeight, _: QuantFormat) -> Constants:
    return {
        "codes": _e4m3_tensor(weight.tensors["codes"].t()),
        "scale": _float_tensor(weight.tensors["scale"].reshape(())),
    }


def _row_constants(weight: QuantizedWeight, fmt: QuantFormat) -> Constants:
    made = _e4m3_tensor if fmt.weight_element is WeightElement.E4M3 else _int8_tensor
    return {
        "codes": made(weight.tensors["codes"].t()),
        "scale": _float_tensor(weight.tensors["scale"].reshape(-1)),
    }


def _block_constants(weight: QuantizedWeight, fmt: QuantFormat) -> Constants:
    assert fmt.weight_block_size is not None
    # ONNX knows blocks along one axis: a square's scale is repeated for each of its rows.
    scale = weight.tensors["scale"].repeat_interleave(fmt.weight_block_size, dim=0)
    return {
        "codes": _e4m3_tensor(weight.tensors["codes"].t()),
        "scale": _float_tensor(scale[: weight.shape[0]].t()),
    }


def _group_constants(weight: QuantizedWeight, _: QuantFormat) -> Constants:
    constants = {
        "codes": _int4_tensor(weight.tensors["codes"].t()),
        "scale": _float_tensor(weight.tensors["group_scale"].t()),
    }
    if "tensor_scale" in weight.tensors:
        constants["tensor_scale"] = _float_tensor(weight.tensors["tensor_scale"])
    return constants


def _no_options(_: QuantFormat) -> dict[str, Any]:
    return {}


def _per_row(_: QuantFormat) -> dict[str, Any]:
    return {"axis": 1}


def _per_block(fmt: QuantFormat) -> dict[str, Any]:
    assert fmt.weight_block_size is not None
    return {"axis": 0, "block_size": fmt.weight_block_size}


_WEIGHTS: Mapping[tuple[WeightElement, WeightScaling], _Weight] = {
    (WeightElement.E4M3, WeightScaling.TENSOR): _Weight(_tensor_constants, _no_options),
    (WeightElement.E4M3, WeightScaling.ROW): _Weight(_row_constants, _per_row),
    (WeightElement.E4M3, WeightScaling.BLOCK): _Weight(_block_constants, _per_block),
    (WeightElement.INT8, WeightScaling.ROW): _Weight(_row_constants, _per_row),
    (WeightElement.INT4, WeightScaling.GROUP): _Weight(_group_constants, _per_block),
    (WeightElement.INT4, WeightScaling.TWO_LEVEL_GROUP): _Weight(_group_constants, _per_block),
}


def _weight(fmt: QuantFormat) -> _Weight:
    assert fmt.weight_element is not None and fmt.weight_scaling is not None
    return _WEIGHTS[fmt.weight_element, fmt.weight_scaling]


def _has_second_level(fmt: QuantFormat, container: Container) -> bool:
    """Whether the run time that was searched for rounds INT4 weights to E4M3 once more."""
    is_two_level = fmt.weight_scaling is WeightScaling.TWO_LEVEL_GROUP
    return is_two_level and container is Container.MODELOPT


# Inputs


def quantized_input(
    tape: Tape,
    x: ir.Value,
    static_scale: ir.Value | None,
    fmt: QuantFormat,
    container: Container,
) -> ir.Value:
    """What the matrix unit sees of x [..., in_features], float32."""
    return _INPUTS[fmt.activation_in(container)](tape, x, static_scale)


def _as_it_is(_: Tape, x: ir.Value, __: ir.Value | None) -> ir.Value:
    return x


def _static_fp8(tape: Tape, x: ir.Value, scale: ir.Value | None) -> ir.Value:
    assert scale is not None
    codes = tape.op("QuantizeLinear", [x, scale], _to_e4m3())
    return tape.op("DequantizeLinear", [codes, scale])


def _fp8_tokens(tape: Tape, x: ir.Value, _: ir.Value | None) -> ir.Value:
    scale = _scale(tape, tape.op("Abs", [x]), fp8.LARGEST, keepdims=1)
    return _under_scales(tape, x, scale, _columns(x), _to_e4m3())


def _int8_tokens(tape: Tape, x: ir.Value, _: ir.Value | None) -> ir.Value:
    scale = _scale(tape, tape.op("Abs", [x]), int8.LARGEST, keepdims=1)
    return _under_scales(tape, x, scale, _columns(x), {"output_dtype": ir.DataType.INT8.value})


def _fp8_blocks(tape: Tape, x: ir.Value, _: ir.Value | None) -> ir.Value:
    assert x.shape is not None
    shape = torch.tensor([0] * (len(x.shape) - 1) + [-1, _INPUT_BLOCK])  # 0: as it is
    blocks = tape.op("Reshape", [tape.op("Abs", [x]), _constant(tape, shape)])
    scale = _scale(tape, blocks, fp8.LARGEST, keepdims=0)
    return _under_scales(tape, x, scale, _INPUT_BLOCK, _to_e4m3())


def _scale(tape: Tape, magnitudes: ir.Value, largest: float, *, keepdims: int) -> ir.Value:
    """Largest magnitude / largest code. Of zeros alone the kernels say 1; their codes are 0 anyway."""
    last = _constant(tape, torch.tensor([-1]))
    amax = tape.op("ReduceMax", [magnitudes, last], {"keepdims": keepdims})
    quotient = tape.op("Div", [amax, _constant(tape, torch.tensor(float(largest)))])
    return tape.op("Max", [quotient, _constant(tape, torch.tensor(SMALLEST_SCALE))])


def _under_scales(
    tape: Tape, x: ir.Value, scale: ir.Value, block: int, codes: Mapping[str, Any]
) -> ir.Value:
    along = {"axis": -1, "block_size": block}
    quantized = tape.op("QuantizeLinear", [x, scale], {**along, **codes})
    return tape.op("DequantizeLinear", [quantized, scale], along)


_INPUTS: Mapping[ActivationScheme, Callable[[Tape, ir.Value, ir.Value | None], ir.Value]] = {
    ActivationScheme.NONE: _as_it_is,
    ActivationScheme.FP8_STATIC_TENSOR: _static_fp8,
    ActivationScheme.FP8_DYNAMIC_TOKEN: _fp8_tokens,
    ActivationScheme.FP8_DYNAMIC_BLOCK: _fp8_blocks,
    ActivationScheme.INT8_DYNAMIC_TOKEN: _int8_tokens,
}


def _columns(x: ir.Value) -> int:
    assert x.shape is not None
    columns = x.shape[-1]
    assert isinstance(columns, int)  # every product knows its in_features
    return columns


def _to_e4m3() -> dict[str, Any]:
    return {"output_dtype": ir.DataType.FLOAT8E4M3FN.value}


def runtime_options(formats: Iterable[QuantFormat], container: Container) -> dict[str, str]:
    """Entries of onnxruntime's session configuration under which CPUs compute what the graph says.

    Left to itself, version 1.31 rounds the inputs of products with weights of few bits to INT8, and
    refuses graphs whose FP8 inputs meet FP8 weights (microsoft/onnxruntime, issue 22269).
    """
    options = {"session.qdq_matmulnbits_accuracy_level": "1"}  # inputs in float32
    if any(fmt.activation_in(container) in _FP8_INPUTS for fmt in formats):
        options["session.disable_quant_qdq"] = "1"
    return options


_FP8_INPUTS = (
    ActivationScheme.FP8_STATIC_TENSOR,
    ActivationScheme.FP8_DYNAMIC_TOKEN,
    ActivationScheme.FP8_DYNAMIC_BLOCK,
)


# Tensors


def float_tensor(tensor: Tensor) -> ir.TensorProtocol:
    """A tensor of any dtype as FLOAT."""
    return _float_tensor(tensor)


def _float_tensor(tensor: Tensor) -> ir.TensorProtocol:
    return ir.tensor(tensor.float().cpu().contiguous().numpy())


def _int8_tensor(codes: Tensor) -> ir.TensorProtocol:
    return ir.tensor(codes.cpu().contiguous().numpy())


def _e4m3_tensor(codes: Tensor) -> ir.TensorProtocol:
    stored = codes.cpu().contiguous().view(torch.uint8).numpy()
    return ir.tensor(stored.view(ir.DataType.FLOAT8E4M3FN.numpy()))


def _int4_tensor(codes: Tensor) -> ir.TensorProtocol:
    return ir.tensor(codes.cpu().contiguous().numpy().astype(ir.DataType.INT4.numpy()))


def _constant(tape: Tape, tensor: Tensor) -> ir.Value:
    made = ir.tensor(tensor.numpy())
    return tape.op("Constant", [], {"value": made})
