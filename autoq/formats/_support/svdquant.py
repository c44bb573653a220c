"""Where NVFP4 beside a branch of low rank runs: in no engine's language models yet."""

from __future__ import annotations

from collections.abc import Iterator

from autoq.formats._format import FormatName
from autoq.formats._places import Support
from autoq.formats._support._cells import (
    COMPRESSED,
    CPU,
    FROM_AMPERE,
    GPUS,
    MODELOPT,
    NO,
    NO_PACKED_READER,
    SGLANG,
    TENSORRT,
    TRANSFORMERS,
    VLLM,
    everywhere,
    records,
)

_SVDQUANT = FormatName("nvfp4_svdquant")

_UNKNOWN = (
    "{} knows no NVFP4_SVD in modelopt checkpoints: it refuses a checkpoint of that alone, and in a "
    "mixed one builds the layer unquantised and stops while it loads"
)
_NO_BRANCH = "compressed-tensors has no place for a branch of low rank"


def support() -> Iterator[Support]:
    """Of SVDQuant."""
    yield from everywhere(_SVDQUANT)
    yield from records(VLLM, MODELOPT, _SVDQUANT, (GPUS, NO, _UNKNOWN.format("vLLM")))
    yield from records(SGLANG, MODELOPT, _SVDQUANT, (FROM_AMPERE, NO, _UNKNOWN.format("SGLang")))
    diffusion = (
        "TensorRT-LLM knows no NVFP4_SVD of language models; for diffusion models it is proposed"
    )
    yield from records(TENSORRT, MODELOPT, _SVDQUANT, (FROM_AMPERE, NO, diffusion))
    for engine, capabilities in ((VLLM, GPUS), (SGLANG, FROM_AMPERE), (TENSORRT, FROM_AMPERE)):
        yield from records(engine, COMPRESSED, _SVDQUANT, (capabilities, NO, _NO_BRANCH))
    yield from records(TRANSFORMERS, MODELOPT, _SVDQUANT, (CPU + GPUS, NO, NO_PACKED_READER))
    yield from records(TRANSFORMERS, COMPRESSED, _SVDQUANT, (CPU + GPUS, NO, _NO_BRANCH))
