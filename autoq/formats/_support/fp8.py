"""Where FP8 runs."""

from __future__ import annotations

from collections.abc import Iterator

from autoq.formats._container import Container
from autoq.formats._format import FormatName
from autoq.formats._places import Support
from autoq.formats._support._cells import (
    ADA,
    AMPERE,
    BLACKWELL,
    COMPRESSED,
    FP8_UNITS,
    FROM_ADA,
    FROM_AMPERE,
    HOPPER,
    MODELOPT,
    NATIVE,
    NO,
    NO_FP8_UNITS,
    SGLANG,
    TENSORRT,
    TURING,
    VLLM,
    WEIGHT_ONLY,
    emulated,
    everywhere,
    records,
)

_FP8 = FormatName("fp8")
_PER_CHANNEL, _BLOCK = FormatName("fp8_pc_pt"), FormatName("fp8_block")

_TOO_OLD = (
    "vLLM takes modelopt checkpoints that are FP8 alone from 8.0 on; beside other formats it widens "
    "the weights here"
)
_WIDENED_BESIDE_OTHERS = (WEIGHT_ONLY, NO_FP8_UNITS)
_NONSENSE = (
    "transformers has no reader of modelopt checkpoints: it loads {} without its scales and "
    "computes nonsense without an error"
)


def support() -> Iterator[Support]:
    """Of FP8."""
    yield from _per_tensor()
    yield from _per_channel_and_token()
    yield from _in_blocks()


def _per_tensor() -> Iterator[Support]:
    yield from everywhere(_FP8)
    native = (FROM_ADA, NATIVE, FP8_UNITS)
    yield from records(
        *(VLLM, MODELOPT, _FP8),
        (TURING, NO, _TOO_OLD),
        (AMPERE, WEIGHT_ONLY, NO_FP8_UNITS),
        native,
        mixed=_WIDENED_BESIDE_OTHERS,
    )
    yield from records(
        *(VLLM, COMPRESSED, _FP8), (TURING + AMPERE, WEIGHT_ONLY, NO_FP8_UNITS), native
    )
    too_old_alone = (
        "SGLang takes modelopt checkpoints that are fp8 alone from 8.9 on; beside nvfp4, and from "
        "compressed-tensors, it widens the weights here"
    )
    yield from records(
        *(SGLANG, MODELOPT, _FP8),
        (AMPERE, NO, too_old_alone),
        native,
        mixed=_WIDENED_BESIDE_OTHERS,
    )
    yield from records(SGLANG, COMPRESSED, _FP8, (AMPERE, WEIGHT_ONLY, NO_FP8_UNITS), native)
    too_old = "TensorRT-LLM runs fp8 from 8.9 on, where FP8 matrix units begin"
    yield from records(TENSORRT, MODELOPT, _FP8, (AMPERE, NO, too_old), native)
    other_scales = (
        "TensorRT-LLM takes fp8 with scales per channel or block from compressed-tensors, not with "
        "one per tensor"
    )
    yield from records(TENSORRT, COMPRESSED, _FP8, (FROM_AMPERE, NO, other_scales))
    yield from emulated(_FP8, _NONSENSE.format("fp8"))


def _per_channel_and_token() -> Iterator[Support]:
    fmt = _PER_CHANNEL
    yield from everywhere(fmt)
    native = (FROM_ADA, NATIVE, FP8_UNITS)
    for container in Container:
        is_too_old = container is MODELOPT
        yield from records(
            *(VLLM, container, fmt),
            (TURING, NO if is_too_old else WEIGHT_ONLY, _TOO_OLD if is_too_old else NO_FP8_UNITS),
            (AMPERE, WEIGHT_ONLY, NO_FP8_UNITS),
            native,
            runs_experts=container is not MODELOPT,
            mixed=_WIDENED_BESIDE_OTHERS,
        )
        too_old_for_tensorrt = (AMPERE, NO, "FP8 matrix units begin with 8.9")
        hopper_alone = "TensorRT-LLM multiplies with scales per channel and token on 9.0 alone"
        yield from records(
            *(TENSORRT, container, fmt),
            too_old_for_tensorrt,
            (ADA + BLACKWELL, NO, hopper_alone),
            (HOPPER, NATIVE, FP8_UNITS),
        )
    unknown = (
        "SGLang knows no FP8_PER_CHANNEL_PER_TOKEN in modelopt checkpoints and would build the "
        "layer unquantised without an error; it takes it from compressed-tensors"
    )
    yield from records(SGLANG, MODELOPT, fmt, (FROM_AMPERE, NO, unknown))
    yield from records(SGLANG, COMPRESSED, fmt, (AMPERE, WEIGHT_ONLY, NO_FP8_UNITS), native)
    yield from emulated(fmt, _NONSENSE.format(fmt))


def _in_blocks() -> Iterator[Support]:
    fmt = _BLOCK
    yield from everywhere(fmt)
    widened = (
        "vLLM multiplies FP8 blocks as they are from 9.0 on; here the weights are widened in the "
        "kernel and inputs stay 16-bit"
    )
    for container in Container:
        is_too_old = container is MODELOPT
        yield from records(
            *(VLLM, container, fmt),
            (TURING, NO if is_too_old else WEIGHT_ONLY, _TOO_OLD if is_too_old else widened),
            (AMPERE + ADA, WEIGHT_ONLY, widened),
            (HOPPER + BLACKWELL, NATIVE, FP8_UNITS),
            out_features_multiple=128,
            runs_experts=container is not MODELOPT,
            mixed=_WIDENED_BESIDE_OTHERS,
        )
    other_name = (
        "SGLang wants the scales of blocks under another name than vLLM does in modelopt "
        "checkpoints"
    )
    yield from records(SGLANG, MODELOPT, fmt, (FROM_AMPERE, NO, other_name))
    fused = (
        "SGLang knows the size of blocks in compressed-tensors only where a group is for every "
        "Linear, and without it stops at the scales of fused layers"
    )
    yield from records(SGLANG, COMPRESSED, fmt, (FROM_AMPERE, NO, fused))
    only_uniform = (
        "TensorRT-LLM knows fp8_pb_wo, as vLLM reads it, in checkpoints of that one format only; it "
        "takes blocks from compressed-tensors"
    )
    yield from records(TENSORRT, MODELOPT, fmt, (FROM_AMPERE, NO, only_uniform))
    other_recipe = (
        "TensorRT-LLM runs FP8 blocks as they are on 9.0 alone; on 10.0 and newer it rounds their "
        "scales to powers of two"
    )
    yield from records(
        *(TENSORRT, COMPRESSED, fmt),
        (AMPERE + ADA, NO, "TensorRT-LLM runs FP8 blocks from 9.0 on"),
        (HOPPER, NATIVE, FP8_UNITS),
        (BLACKWELL, NO, other_recipe),
        out_features_multiple=128,
    )
    yield from emulated(fmt, _NONSENSE.format(fmt))
