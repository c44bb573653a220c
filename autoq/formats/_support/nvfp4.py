"""Where NVFP4 runs."""

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
    FP4_UNITS,
    FROM_AMPERE,
    HOPPER,
    MODELOPT,
    NATIVE,
    NO,
    NO_FP4_UNITS,
    SGLANG,
    TENSORRT,
    TURING,
    VLLM,
    WEIGHT_ONLY,
    emulated,
    everywhere,
    records,
)

_NVFP4 = FormatName("nvfp4")

_FP8_INPUTS = (
    "no FP4 matrix units before 10.0: the weights are widened in the kernel, Humming's, which by its "
    "source rounds inputs to FP8, with a scale for each token"
)


def support() -> Iterator[Support]:
    """Of NVFP4."""
    yield from everywhere(_NVFP4)
    native = (BLACKWELL, NATIVE, FP4_UNITS)
    for container in Container:
        old = (TURING + AMPERE + ADA, WEIGHT_ONLY, NO_FP4_UNITS)
        yield from records(VLLM, container, _NVFP4, old, (HOPPER, WEIGHT_ONLY, _FP8_INPUTS), native)
        yield from records(
            SGLANG, container, _NVFP4, (AMPERE + ADA + HOPPER, WEIGHT_ONLY, NO_FP4_UNITS), native
        )
    unreleased = (
        "released TensorRT-LLM runs nvfp4 from 10.0 on; weight-only on 8.9 and 9.0 is in its "
        "development sources alone"
    )
    yield from records(
        *(TENSORRT, MODELOPT, _NVFP4),
        (AMPERE, NO, "TensorRT-LLM runs nvfp4 from 10.0 on, where FP4 matrix units begin"),
        (ADA + HOPPER, NO, unreleased),
        native,
    )
    no_reader = (
        "released TensorRT-LLM reads no nvfp4 from compressed-tensors; its development sources do"
    )
    yield from records(TENSORRT, COMPRESSED, _NVFP4, (FROM_AMPERE, NO, no_reader))
    yield from emulated(_NVFP4)
