"""FP8 with a scale per row or per block, and the microscaling formats."""

from __future__ import annotations

from autoq.formats._calibration import CalibrationAlgorithm
from autoq.formats._container import Container
from autoq.formats._format import (
    ActivationScheme,
    FormatName,
    QuantFormat,
    WeightElement,
    WeightScaling,
)

_FP8_PC_PT = QuantFormat(
    name=FormatName("fp8_pc_pt"),
    summary="E4M3 weights, a scale per row; E4M3 inputs, a scale per token",
    weight_element=WeightElement.E4M3,
    weight_scaling=WeightScaling.ROW,
    weight_bits=8,
    weight_block_size=None,
    block_scale_bits=32,
    tensor_scale_bits=0,
    activation=ActivationScheme.FP8_DYNAMIC_TOKEN,
    calibration=CalibrationAlgorithm.MAX,
    plain_calibration=CalibrationAlgorithm.MAX,
    peer_bits=8.0,
    portable=False,
    when_named=True,
    loads_in=(
        "vLLM on compute capability 8.9 and newer and TensorRT-LLM on 9.0, from both containers; "
        "SGLang on 8.9 and newer, and transformers, from compressed-tensors"
    ),
)

_FP8_BLOCK = QuantFormat(
    name=FormatName("fp8_block"),
    summary="E4M3 weights, a scale per 128 x 128; E4M3 inputs, a scale per 128 of a token",
    weight_element=WeightElement.E4M3,
    weight_scaling=WeightScaling.BLOCK,
    weight_bits=8,
    weight_block_size=128,
    block_scale_bits=32,
    tensor_scale_bits=0,
    activation=ActivationScheme.FP8_DYNAMIC_BLOCK,
    calibration=CalibrationAlgorithm.MAX,
    plain_calibration=CalibrationAlgorithm.MAX,
    peer_bits=8.0,
    portable=False,
    when_named=True,
    loads_in=(
        "the compressed-tensors container in vLLM and SGLang on compute capability 8.9 and newer, "
        "in TensorRT-LLM on 9.0, and in transformers; the modelopt container in vLLM on 8.9 and "
        "newer"
    ),
)

_MXFP8 = QuantFormat(
    name=FormatName("mxfp8"),
    summary="E4M3 weights and inputs, a power of two per 32 for a scale",
    weight_element=WeightElement.E4M3,
    weight_scaling=WeightScaling.MX,
    weight_bits=8,
    weight_block_size=32,
    block_scale_bits=8,
    tensor_scale_bits=0,
    activation=ActivationScheme.MXFP8_UP,
    container_activations=((Container.COMPRESSED_TENSORS, ActivationScheme.MXFP8_HALF),),
    calibration=CalibrationAlgorithm.MAX,
    plain_calibration=CalibrationAlgorithm.MAX,
    peer_bits=8.0,
    portable=False,
    when_named=True,
    loads_in=(
        "vLLM, natively on compute capability 10.0 and 10.3 and weight-only on other GPUs (modelopt "
        "from 8.0 on, compressed-tensors from 7.5 on); transformers"
    ),
)

_MXFP4 = QuantFormat(
    name=FormatName("mxfp4"),
    summary="E2M1 weights and inputs, a power of two per 32 for a scale",
    weight_element=WeightElement.E2M1,
    weight_scaling=WeightScaling.MX,
    weight_bits=4,
    weight_block_size=32,
    block_scale_bits=8,
    tensor_scale_bits=0,
    activation=ActivationScheme.MXFP4_HALF,
    calibration=CalibrationAlgorithm.AWQ_GPTQ,
    plain_calibration=CalibrationAlgorithm.MAX,
    peer_bits=4.0,
    portable=False,
    when_named=True,
    loads_in=(
        "the compressed-tensors container only, in vLLM natively on compute capability 10.0 and "
        "10.3 and weight-only on other GPUs from 8.0 on, and in transformers"
    ),
)

FP8_AND_MX_FORMATS = (_FP8_PC_PT, _FP8_BLOCK, _MXFP8, _MXFP4)
