"""Where FP8 runs."""

from __future__ import annotations

from collections.abc import Iterator

from autoq.formats._format import FormatName
from autoq.formats._places import Support
from autoq.formats._support._cells import (
    AMPERE,
    COMPRESSED,
    FP8_UNITS,
    FROM_ADA,
    FROM_AMPERE,
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


def support() -> Iterator[Support]:
    """Of FP8."""
    yield from _per_tensor()


def _per_tensor() -> Iterator[Support]:
    yield from everywhere(_FP8)
    native = (FROM_ADA, NATIVE, FP8_UNITS)
    yield from records(
        *(VLLM, MODELOPT, _FP8),
        (TURING, NO, "vLLM takes fp8 from modelopt checkpoints from 8.0 on"),
        (AMPERE, WEIGHT_ONLY, NO_FP8_UNITS),
        native,
    )
    yield from records(
        *(VLLM, COMPRESSED, _FP8), (TURING + AMPERE, WEIGHT_ONLY, NO_FP8_UNITS), native
    )
    only_compressed = (
        "SGLang takes fp8 from modelopt checkpoints from 8.9 on; from compressed-tensors ones it "
        "runs weight-only here"
    )
    yield from records(SGLANG, MODELOPT, _FP8, (AMPERE, NO, only_compressed), native)
    yield from records(SGLANG, COMPRESSED, _FP8, (AMPERE, WEIGHT_ONLY, NO_FP8_UNITS), native)
    too_old = "TensorRT-LLM runs fp8 from 8.9 on, where FP8 matrix units begin"
    yield from records(TENSORRT, MODELOPT, _FP8, (AMPERE, NO, too_old), native)
    other_scales = (
        "TensorRT-LLM takes fp8 with scales per channel or block from compressed-tensors, not with "
        "one per tensor"
    )
    yield from records(TENSORRT, COMPRESSED, _FP8, (FROM_AMPERE, NO, other_scales))
    yield from emulated(_FP8, _NONSENSE.format("fp8"))


_NONSENSE = (
    "transformers has no reader of modelopt checkpoints: it loads {} without its scales and "
    "computes nonsense without an error"
)
