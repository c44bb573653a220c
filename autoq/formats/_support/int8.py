"""Where INT8 weights with INT8 inputs run."""

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

_SMOOTH = FormatName("int8_sq")

_UNITS = "multiplied by INT8 matrix units"
_NO_INT8_IN_TENSORRT = (
    "TensorRT-LLM's PyTorch backend has no INT8 layers; its older engines took them from "
    "checkpoints of their own"
)
_NONSENSE = (
    "transformers has no reader of modelopt checkpoints: it loads INT8 without its scales and "
    "computes nonsense without an error"
)


def support() -> Iterator[Support]:
    """Of SmoothQuant."""
    yield from outside_compressed_tensors(_SMOOTH)
    old = (AMPERE + ADA + HOPPER, NATIVE, _UNITS)
    at_work = (
        "vLLM takes int8_sq for 10.0 and newer (Blackwell), and its INT8 product refuses there when "
        "it is first called"
    )
    yield from records(
        VLLM, COMPRESSED, _SMOOTH, (TURING, NATIVE, _UNITS), old, (BLACKWELL, NO, at_work)
    )
    refused = "SGLang's INT8 product refuses 10.0 and newer (Blackwell)"
    yield from records(SGLANG, COMPRESSED, _SMOOTH, old, (BLACKWELL, NO, refused))
    yield from emulated(_SMOOTH, _NONSENSE)


def outside_compressed_tensors(fmt: FormatName) -> Iterator[Support]:
    """Where a format with INT8 weights does not run: all of modelopt, all of TensorRT-LLM."""
    yield from everywhere(fmt)
    yield from records(VLLM, MODELOPT, fmt, (GPUS, NO, UNKNOWN_TO_VLLM.format("INT8")))
    yield from records(SGLANG, MODELOPT, fmt, (FROM_AMPERE, NO, UNKNOWN_TO_SGLANG.format("INT8")))
    for container in (MODELOPT, COMPRESSED):
        yield from records(TENSORRT, container, fmt, (FROM_AMPERE, NO, _NO_INT8_IN_TENSORRT))
