"""Where the microscaling formats run."""

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
    WEIGHT_ONLY,
    emulated,
    everywhere,
    records,
)

_MXFP8, _MXFP4 = FormatName("mxfp8"), FormatName("mxfp4")

_BEFORE = AMPERE + ADA + HOPPER
_SCALED_UNITS = "multiplied by matrix units that take a power of two per 32"
_WIDENED = (
    "vLLM multiplies microscaled weights as they are from 10.0 on; here they are widened in the "
    "kernel and inputs stay 16-bit"
)
_NONSENSE = (
    "transformers has no reader of modelopt checkpoints: it loads mxfp8 without its scales and "
    "computes nonsense without an error"
)


def support() -> Iterator[Support]:
    """Of MXFP8 and MXFP4."""
    yield from _mxfp8()
    yield from _mxfp4()


def _mxfp8() -> Iterator[Support]:
    yield from everywhere(_MXFP8)
    native = (BLACKWELL, NATIVE, _SCALED_UNITS)
    too_old = (
        "vLLM takes modelopt checkpoints that are mxfp8 alone from 8.0 on; beside other formats it "
        "widens the weights here"
    )
    yield from records(
        *(VLLM, MODELOPT, _MXFP8),
        (TURING, NO, too_old),
        (_BEFORE, WEIGHT_ONLY, _WIDENED),
        native,
        mixed=(WEIGHT_ONLY, _WIDENED),
    )
    yield from records(
        *(VLLM, COMPRESSED, _MXFP8), (TURING + _BEFORE, WEIGHT_ONLY, _WIDENED), native
    )
    other_name = (
        "SGLang reads mxfp8 in modelopt checkpoints of that one format only: in mixed ones it wants "
        "the scales under another name than vLLM does"
    )
    yield from records(SGLANG, MODELOPT, _MXFP8, (AMPERE + ADA + HOPPER + (120,), NO, other_name))
    yield from records(
        *(SGLANG, MODELOPT, _MXFP8), ((100, 103), NO, other_name), alone=(NATIVE, _SCALED_UNITS)
    )
    no_scheme = "SGLang has no mxfp8 scheme for compressed-tensors checkpoints"
    yield from records(SGLANG, COMPRESSED, _MXFP8, (FROM_AMPERE, NO, no_scheme))
    unreleased = "released TensorRT-LLM has no mxfp8 layers; its development sources do"
    yield from records(TENSORRT, MODELOPT, _MXFP8, (FROM_AMPERE, NO, unreleased))
    no_reader = "TensorRT-LLM reads no mxfp8 from compressed-tensors"
    yield from records(TENSORRT, COMPRESSED, _MXFP8, (FROM_AMPERE, NO, no_reader))
    yield from emulated(_MXFP8, _NONSENSE)


def _mxfp4() -> Iterator[Support]:
    yield from everywhere(_MXFP4)
    experts_only = "{} has MXFP4 for experts only, and not in checkpoints of this container"
    yield from records(VLLM, MODELOPT, _MXFP4, (GPUS, NO, UNKNOWN_TO_VLLM.format("MXFP4")))
    yield from records(
        *(VLLM, COMPRESSED, _MXFP4),
        (TURING, NO, "vLLM widens mxfp4 weights from 8.0 on"),
        (_BEFORE, WEIGHT_ONLY, _WIDENED),
        (BLACKWELL, NATIVE, _SCALED_UNITS),
    )
    yield from records(
        *(SGLANG, MODELOPT, _MXFP4), (FROM_AMPERE, NO, UNKNOWN_TO_SGLANG.format("MXFP4"))
    )
    yield from records(
        *(SGLANG, COMPRESSED, _MXFP4),
        (FROM_AMPERE, NO, "SGLang has mxfp4 for experts only, not for other linears"),
    )
    for container in (MODELOPT, COMPRESSED):
        reason = experts_only.format("TensorRT-LLM")
        yield from records(TENSORRT, container, _MXFP4, (FROM_AMPERE, NO, reason))
    yield from emulated(_MXFP4)
