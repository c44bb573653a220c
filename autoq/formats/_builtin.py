"""The formats that come with autoq."""

from __future__ import annotations

from autoq.formats._calibration import CalibrationAlgorithm
from autoq.formats._container import Container
from autoq.formats._format import (
    NONE,
    ActivationScheme,
    FormatName,
    QuantFormat,
    WeightElement,
    WeightScaling,
)
from autoq.formats._fp8_and_mx import FP8_AND_MX_FORMATS
from autoq.registry import Registry

FORMATS: Registry[QuantFormat] = Registry("format")

_NO_FORMAT = QuantFormat(
    name=NONE,
    summary="unquantised: the weights as the model stores them, counted at 16 bits",
    weight_element=None,
    weight_scaling=None,
    weight_bits=16,
    weight_block_size=None,
    block_scale_bits=0,
    tensor_scale_bits=0,
    activation=ActivationScheme.NONE,
    calibration=CalibrationAlgorithm.NONE,
    plain_calibration=CalibrationAlgorithm.NONE,
    peer_bits=16.0,
    portable=True,
    loads_in="everywhere",
)

_FP8 = QuantFormat(
    name=FormatName("fp8"),
    summary="E4M3 weights and activations, one scale per tensor, activations static",
    weight_element=WeightElement.E4M3,
    weight_scaling=WeightScaling.TENSOR,
    weight_bits=8,
    weight_block_size=None,
    block_scale_bits=0,
    tensor_scale_bits=64,  # weight scale and input scale, float32
    activation=ActivationScheme.FP8_STATIC_TENSOR,
    calibration=CalibrationAlgorithm.MAX,
    plain_calibration=CalibrationAlgorithm.MAX,
    peer_bits=8.0,
    portable=True,
    loads_in="vLLM, SGLang and TensorRT-LLM on compute capability 8.9 and newer; transformers",
)

_NVFP4 = QuantFormat(
    name=FormatName("nvfp4"),
    summary="E2M1 weights and activations, an E4M3 scale per 16, a float32 scale per tensor",
    weight_element=WeightElement.E2M1,
    weight_scaling=WeightScaling.TWO_LEVEL_GROUP,
    weight_bits=4,
    weight_block_size=16,
    block_scale_bits=8,
    tensor_scale_bits=64,  # second-level weight scale and input scale, float32
    activation=ActivationScheme.NVFP4_DYNAMIC,
    calibration=CalibrationAlgorithm.AWQ_GPTQ,
    plain_calibration=CalibrationAlgorithm.MAX,
    peer_bits=4.5,
    portable=True,
    loads_in=(
        "vLLM, SGLang and TensorRT-LLM, natively on compute capability 10.0 and newer and "
        "weight-only before; transformers"
    ),
)

_W4A8_AWQ = QuantFormat(
    name=FormatName("w4a8_awq"),
    summary="INT4 weights in groups of 128 with AWQ scales, E4M3 activations",
    weight_element=WeightElement.INT4,
    weight_scaling=WeightScaling.TWO_LEVEL_GROUP,
    weight_bits=4,
    weight_block_size=128,
    block_scale_bits=32,  # float32 group scales, as the ModelOpt container writes them
    tensor_scale_bits=64,  # second-level weight scale and input scale, float32
    activation=ActivationScheme.FP8_STATIC_TENSOR,
    calibration=CalibrationAlgorithm.AWQ_GPTQ,
    plain_calibration=CalibrationAlgorithm.AWQ_LITE,
    stores_input_scale=True,
    rows_per_byte=2,  # in the modelopt container
    container_activations=((Container.COMPRESSED_TENSORS, ActivationScheme.FP8_DYNAMIC_TOKEN),),
    peer_bits=4.0,
    portable=False,
    loads_in=(
        "the modelopt container in TensorRT-LLM on compute capability 8.9 and 9.0 only; the "
        "compressed-tensors container in vLLM on 9.0 only, and in transformers"
    ),
)

_INT8_SQ = QuantFormat(
    name=FormatName("int8_sq"),
    summary="INT8 weights, a scale per row; INT8 inputs, a scale per token, after SmoothQuant",
    weight_element=WeightElement.INT8,
    weight_scaling=WeightScaling.ROW,
    weight_bits=8,
    weight_block_size=None,
    block_scale_bits=32,
    tensor_scale_bits=0,
    activation=ActivationScheme.INT8_DYNAMIC_TOKEN,
    calibration=CalibrationAlgorithm.SMOOTH,
    plain_calibration=CalibrationAlgorithm.SMOOTH,
    peer_bits=8.0,
    portable=False,
    when_named=True,
    loads_in=(
        "the compressed-tensors container only, in vLLM on compute capability 7.5 to 9.0, in SGLang "
        "on 8.0 to 9.0, and in transformers"
    ),
)

_INT8_WO = QuantFormat(
    name=FormatName("int8_wo"),
    summary="INT8 weights, a scale per row; inputs as they are",
    weight_element=WeightElement.INT8,
    weight_scaling=WeightScaling.ROW,
    weight_bits=8,
    weight_block_size=None,
    block_scale_bits=16,  # in the model's dtype
    tensor_scale_bits=0,
    activation=ActivationScheme.NONE,
    calibration=CalibrationAlgorithm.MAX,
    plain_calibration=CalibrationAlgorithm.MAX,
    columns_per_word=4,
    peer_bits=8.0,
    portable=False,
    when_named=True,
    loads_in=(
        "the compressed-tensors container only, in vLLM on compute capability 7.5 and newer, in "
        "SGLang on 8.0 and newer, and in transformers"
    ),
)

_INT4_AWQ = QuantFormat(
    name=FormatName("int4_awq"),
    summary="INT4 weights in groups of 128 with AWQ scales; inputs as they are",
    weight_element=WeightElement.INT4,
    weight_scaling=WeightScaling.GROUP,
    weight_bits=4,
    weight_block_size=128,
    block_scale_bits=32,  # float32 group scales, as the ModelOpt container writes them
    tensor_scale_bits=0,
    activation=ActivationScheme.NONE,
    calibration=CalibrationAlgorithm.AWQ_GPTQ,
    plain_calibration=CalibrationAlgorithm.AWQ_LITE,
    stores_input_scale=True,
    stores_fused_input_scale=False,
    rows_per_byte=2,  # in the modelopt container
    peer_bits=4.0,
    portable=False,
    when_named=True,
    loads_in=(
        "the modelopt container in TensorRT-LLM on compute capability 8.0 to 9.0; the "
        "compressed-tensors container in vLLM on 7.5 and newer, in SGLang on 8.0 and newer, and in "
        "transformers"
    ),
)

_INT4_DQ = QuantFormat(
    name=FormatName("int4_dq"),
    summary="INT4 weights in groups of 64, scales in 8 bits (double quantisation); inputs as they are",
    weight_element=WeightElement.INT4,
    weight_scaling=WeightScaling.DOUBLE_GROUP,
    weight_bits=4,
    weight_block_size=64,
    block_scale_bits=8,
    tensor_scale_bits=32,  # the mean of the scales, float32
    scales_per_block=256,
    activation=ActivationScheme.NONE,
    calibration=CalibrationAlgorithm.AWQ_GPTQ,
    plain_calibration=CalibrationAlgorithm.AWQ_LITE,
    peer_bits=4.0,
    portable=False,
    when_named=True,
    loads_in="no engine, and stands in no checkpoint: it is searched and measured in simulation",
)

_NVFP4_WO = QuantFormat(
    name=FormatName("nvfp4_wo"),
    summary="NVFP4 weights; inputs as they are",
    weight_element=WeightElement.E2M1,
    weight_scaling=WeightScaling.TWO_LEVEL_GROUP,
    weight_bits=4,
    weight_block_size=16,
    block_scale_bits=8,
    tensor_scale_bits=32,  # the second-level weight scale, float32
    activation=ActivationScheme.NONE,
    calibration=CalibrationAlgorithm.AWQ_GPTQ,
    plain_calibration=CalibrationAlgorithm.MAX,
    peer_bits=4.5,
    portable=False,
    when_named=True,
    loads_in=(
        "vLLM on compute capability 7.5 and newer and SGLang on 8.0 and newer, from both "
        "containers; transformers; not in released TensorRT-LLM"
    ),
)

_NVFP4_SVDQUANT = QuantFormat(
    name=FormatName("nvfp4_svdquant"),
    summary="NVFP4 weights and inputs beside a branch of rank 32 in 16 bits (SVDQuant)",
    weight_element=WeightElement.E2M1,
    weight_scaling=WeightScaling.TWO_LEVEL_GROUP,
    weight_bits=4,
    weight_block_size=16,
    block_scale_bits=8,
    tensor_scale_bits=64,  # second-level weight scale and input scale, float32
    low_rank=32,
    activation=ActivationScheme.NVFP4_DYNAMIC,
    calibration=CalibrationAlgorithm.AWQ_GPTQ,
    plain_calibration=CalibrationAlgorithm.AWQ_LITE,
    stores_input_scale=True,
    peer_bits=4.5,
    portable=False,
    when_named=True,
    loads_in="autoq.load alone: the modelopt container holds it, and no engine that was read runs it",
)

for _format in (
    _FP8,
    _NVFP4,
    _W4A8_AWQ,
    _INT4_AWQ,
    _INT4_DQ,
    _INT8_SQ,
    _INT8_WO,
    _NVFP4_WO,
    _NVFP4_SVDQUANT,
    *FP8_AND_MX_FORMATS,
    _NO_FORMAT,
):
    FORMATS.register(_format.name, _format)


def portable_formats() -> tuple[FormatName, ...]:
    """The quantised formats that every engine loads: what a search offers when told nothing."""
    return tuple(entry.name for entry in FORMATS.values() if entry.portable and entry.name != NONE)
