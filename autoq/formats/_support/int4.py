"""Where INT4 runs."""

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
    TURING,
    UNKNOWN_TO_SGLANG,
    UNKNOWN_TO_VLLM,
    VLLM,
    emulated,
    everywhere,
    records,
)

_W4A8 = FormatName("w4a8_awq")

_INT4_TIMES_FP8 = "multiplied by an INT4 x FP8 kernel"


def support() -> Iterator[Support]:
    """Of INT4."""
    yield from _with_fp8_inputs()


def _with_fp8_inputs() -> Iterator[Support]:
    yield from everywhere(_W4A8)
    yield from records(VLLM, MODELOPT, _W4A8, (GPUS, NO, UNKNOWN_TO_VLLM.format("W4A8_AWQ")))
    hopper_alone = (
        "vLLM's INT4 x FP8 kernel is for 9.0 (Hopper) alone, and nothing stands in for it"
    )
    yield from records(
        *(VLLM, COMPRESSED, _W4A8),
        (HOPPER, NATIVE, _INT4_TIMES_FP8),
        (TURING + AMPERE + ADA + BLACKWELL, NO, hopper_alone),
        out_features_multiple=128,
        counts_fused_rows=True,
    )
    yield from records(
        SGLANG, MODELOPT, _W4A8, (FROM_AMPERE, NO, UNKNOWN_TO_SGLANG.format("W4A8_AWQ"))
    )
    experts_only = (
        "SGLang multiplies INT4 by FP8 for experts only, and not in a checkpoint that mixes formats"
    )
    yield from records(SGLANG, COMPRESSED, _W4A8, (FROM_AMPERE, NO, experts_only))
    yield from records(
        *(TENSORRT, MODELOPT, _W4A8),
        (AMPERE, NO, "w4a8_awq needs FP8 matrix units, which begin with 8.9"),
        (ADA + HOPPER, NATIVE, _INT4_TIMES_FP8),
        (BLACKWELL, NO, "no engine has an INT4 x FP8 kernel for 10.0 and newer (Blackwell)"),
    )
    only_modelopt = "TensorRT-LLM reads no INT4 from compressed-tensors; its w4a8_awq is modelopt's"
    yield from records(TENSORRT, COMPRESSED, _W4A8, (FROM_AMPERE, NO, only_modelopt))
    yield from emulated(_W4A8)
