"""Where INT8 runs."""

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
    VLLM,
    WIDENED,
    emulated,
    everywhere,
    records,
)

_SMOOTH, _WEIGHT_ONLY = FormatName("int8_sq"), FormatName("int8_wo")

_UNITS = "multiplied by INT8 matrix units"
_NO_INT8_ALGORITHM = (
    "{} knows no INT8 in modelopt checkpoints and would build the layer unquantised without an error"
)
_ENGINES_ONLY = (
    "TensorRT-LLM's PyTorch backend reads no INT8 weights; its engines took them from checkpoints "
    "of their own"
)
_NONSENSE = (
    "transformers has no reader of modelopt checkpoints: it loads INT8 without its scales and "
    "computes nonsense without an error"
)


def support() -> Iterator[Support]:
    """Of INT8."""
    yield from _nowhere_but_compressed(_SMOOTH)
    old = (AMPERE + ADA + HOPPER, NATIVE, _UNITS)
    documented = "vLLM's documentation has no INT8 for 10.0 and newer (Blackwell)"
    yield from records(
        VLLM, COMPRESSED, _SMOOTH, (TURING, NATIVE, _UNITS), old, (BLACKWELL, NO, documented)
    )
    unchecked = "whether SGLang has INT8 kernels for 10.0 and newer (Blackwell) was not looked into"
    yield from records(SGLANG, COMPRESSED, _SMOOTH, old, (BLACKWELL, NO, unchecked))
    yield from _nowhere_but_compressed(_WEIGHT_ONLY)
    yield from records(VLLM, COMPRESSED, _WEIGHT_ONLY, (GPUS, NATIVE, WIDENED))
    yield from records(SGLANG, COMPRESSED, _WEIGHT_ONLY, (FROM_AMPERE, NATIVE, WIDENED))


def _nowhere_but_compressed(fmt: FormatName) -> Iterator[Support]:
    yield from everywhere(fmt)
    yield from records(VLLM, MODELOPT, fmt, (GPUS, NO, _NO_INT8_ALGORITHM.format("vLLM")))
    yield from records(SGLANG, MODELOPT, fmt, (FROM_AMPERE, NO, _NO_INT8_ALGORITHM.format("SGLang")))
    yield from records(TENSORRT, MODELOPT, fmt, (FROM_AMPERE, NO, _ENGINES_ONLY))
    yield from records(TENSORRT, COMPRESSED, fmt, (FROM_AMPERE, NO, _ENGINES_ONLY))
    yield from emulated(fmt, _NONSENSE)
