"""Where formats run that leave inputs as they are."""

from __future__ import annotations

from collections.abc import Iterator

from autoq.formats._format import FormatName
from autoq.formats._places import Support
from autoq.formats._support._cells import (
    ADA,
    AMPERE,
    BLACKWELL,
    COMPRESSED,
    FROM_AMPERE,
    GPUS,
    HOPPER,
    MODELOPT,
    NATIVE,
    NO,
    SGLANG,
    TENSORRT,
    UNKNOWN_TO_SGLANG,
    UNKNOWN_TO_VLLM,
    VLLM,
    emulated,
    everywhere,
    records,
)
from autoq.formats._support.int8 import outside_compressed_tensors

_INT4, _INT8, _NVFP4 = FormatName("int4_awq"), FormatName("int8_wo"), FormatName("nvfp4_wo")

_WIDENED = "the weights are widened in the kernel and inputs stay 16-bit, as the format says"


def support() -> Iterator[Support]:
    """Of INT4, INT8 and NVFP4 weights."""
    yield from _int4()
    yield from outside_compressed_tensors(_INT8)
    # vLLM's method for experts asserts groups of columns in all kernels but Marlin's, and takes no
    # Marlin kernel for codes of eight bits where it was asked (9.0).
    yield from _compressed_in_vllm_and_sglang(_INT8, vllm_runs_experts=False)
    yield from emulated(_INT8)
    yield from _nvfp4()


def _int4() -> Iterator[Support]:
    yield from everywhere(_INT4)
    yield from records(VLLM, MODELOPT, _INT4, (GPUS, NO, UNKNOWN_TO_VLLM.format("W4A16_AWQ")))
    yield from records(
        SGLANG, MODELOPT, _INT4, (FROM_AMPERE, NO, UNKNOWN_TO_SGLANG.format("W4A16_AWQ"))
    )
    yield from _compressed_in_vllm_and_sglang(_INT4)
    undocumented = "TensorRT-LLM's documentation has W4A16_AWQ for 8.0, 8.9 and 9.0"
    yield from records(
        *(TENSORRT, MODELOPT, _INT4),
        (AMPERE + ADA + HOPPER, NATIVE, _WIDENED),
        (BLACKWELL, NO, undocumented),
    )
    only_modelopt = (
        "TensorRT-LLM reads no INT4 from compressed-tensors; its W4A16_AWQ is modelopt's"
    )
    yield from records(TENSORRT, COMPRESSED, _INT4, (FROM_AMPERE, NO, only_modelopt))
    yield from emulated(_INT4)


def _nvfp4() -> Iterator[Support]:
    yield from everywhere(_NVFP4)
    yield from records(VLLM, MODELOPT, _NVFP4, (GPUS, NATIVE, _WIDENED))
    yield from records(SGLANG, MODELOPT, _NVFP4, (FROM_AMPERE, NATIVE, _WIDENED))
    yield from _compressed_in_vllm_and_sglang(_NVFP4)
    unreleased = "W4A16_NVFP4 is in TensorRT-LLM's development sources, and in no release"
    yield from records(TENSORRT, MODELOPT, _NVFP4, (FROM_AMPERE, NO, unreleased))
    no_reader = "TensorRT-LLM reads no weight-only nvfp4 from compressed-tensors"
    yield from records(TENSORRT, COMPRESSED, _NVFP4, (FROM_AMPERE, NO, no_reader))
    yield from emulated(_NVFP4)


def _compressed_in_vllm_and_sglang(
    fmt: FormatName, vllm_runs_experts: bool = True
) -> Iterator[Support]:
    row = (GPUS, NATIVE, _WIDENED)
    yield from records(VLLM, COMPRESSED, fmt, row, runs_experts=vllm_runs_experts)
    yield from records(SGLANG, COMPRESSED, fmt, (FROM_AMPERE, NATIVE, _WIDENED))
