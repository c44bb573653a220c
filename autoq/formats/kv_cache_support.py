"""Which engine keeps the key/value cache in which format, read from which container.

The records are of the same kind as those of weights, and name formats of `KV_CACHE_FORMATS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from autoq.formats._container import Container
from autoq.formats._format import NONE, FormatName
from autoq.formats._places import ENGINES, HARDWARE, Support, Verdict
from autoq.formats._support._cells import (
    AMPERE,
    BLACKWELL,
    COMPRESSED,
    CPU,
    EMULATED,
    FROM_ADA,
    FROM_AMPERE,
    GPUS,
    MODELOPT,
    NATIVE,
    NO,
    SGLANG,
    TENSORRT,
    TRANSFORMERS,
    TURING,
    VLLM,
    everywhere,
    records,
)
from autoq.formats._targets import Target
from autoq.formats.kv_cache import KV_CACHE_FORMATS, kv_cache_refusal

_FP8, _INT8, _NVFP4 = FormatName("fp8"), FormatName("int8"), FormatName("nvfp4")

_KEPT = "kept so, under the stored scales"
_BEFORE_ADA = (
    "whether {}'s attention keeps FP8 before 8.9 depends on its backend and was not looked into"
)


def kv_cache_support(target: Target, container: Container, fmt: FormatName) -> Support:
    """What is known of a cache format on a target; of what has no record, that nothing is.

    Raises:
        UnknownNameError: nothing has the format's name.
    """
    KV_CACHE_FORMATS[fmt]
    capability = target.hardware.capability
    record = _BY_CELL.get((target.engine.name, container, fmt, capability))
    verdict, reason = NO, f"nothing is known of a key/value cache in {fmt} in {target.engine.title}"
    if fmt == NONE:
        verdict, reason = NATIVE, "the cache stays in the model's dtype"
    return record or Support(
        engine=target.engine.name,
        container=container,
        format=fmt,
        capabilities=(capability,),
        verdict=verdict,
        reason=kv_cache_refusal(fmt, container) or reason,
        source="no record",
    )


def all_kv_cache_supports() -> Iterator[tuple[Target, Support]]:
    """Every cell of the matrix of engines, hardware, containers and formats of the cache."""
    for engine, container, hardware in product(ENGINES.values(), Container, HARDWARE.values()):
        target = Target(engine, hardware)
        for fmt in KV_CACHE_FORMATS.values():
            yield target, kv_cache_support(target, container, fmt.name)


def _records() -> Iterator[Support]:
    for fmt in (_FP8, _INT8, _NVFP4):
        yield from everywhere(fmt)
    yield from _fp8()
    yield from _int8()
    yield from _nvfp4()


def _fp8() -> Iterator[Support]:
    native = (FROM_ADA, NATIVE, _KEPT)
    for container in Container:
        yield from records(
            VLLM, container, _FP8, (TURING + AMPERE, NO, _BEFORE_ADA.format("vLLM")), native
        )
        yield from records(
            SGLANG, container, _FP8, (AMPERE, NO, _BEFORE_ADA.format("SGLang")), native
        )
    of_one = (
        "kept so, but under a scale of 1 whatever is stored: magnitudes above 448 saturate, and the "
        "measured loss is that of the stored scales"
    )
    yield from records(TENSORRT, MODELOPT, _FP8, (FROM_AMPERE, NATIVE, of_one))
    unread = (
        "whether TensorRT-LLM of about 1.2 takes a cache's format from compressed-tensors checkpoints "
        "was not looked into; it takes it from modelopt"
    )
    yield from records(TENSORRT, COMPRESSED, _FP8, (FROM_AMPERE, NO, unread))
    yield from _emulated(_FP8)


def _int8() -> Iterator[Support]:
    alone = "{} takes no key/value cache in INT8 from checkpoints; offer fp8"
    for engine, title, gpus in (
        (VLLM, "vLLM", GPUS),
        (SGLANG, "SGLang", FROM_AMPERE),
        (TENSORRT, "TensorRT-LLM's PyTorch backend", FROM_AMPERE),
    ):
        for container in Container:
            yield from records(engine, container, _INT8, (gpus, NO, alone.format(title)))
    yield from _emulated(_INT8)


def _nvfp4() -> Iterator[Support]:
    before = tuple(capability for capability in GPUS if capability not in BLACKWELL)
    too_old = "caches in NVFP4 begin with 10.0"
    turing = "vLLM keeps caches in NVFP4 from 8.0 on"
    flashinfer = (
        "kept so by FlashInfer's attention alone, which was read and not run; in checkpoints of "
        "several formats under a scale of 1, whatever is stored"
    )
    yield from records(
        *(("vllm", "vLLM 0.33's source: read, not run"), MODELOPT, _NVFP4),
        (TURING, NO, turing),
        (FROM_AMPERE, NATIVE, flashinfer),
    )
    silent = (
        "SGLang keeps caches that checkpoints state in NVFP4 in the model's dtype, without a word; "
        "offer fp8"
    )
    yield from records(SGLANG, MODELOPT, _NVFP4, (FROM_AMPERE, NO, silent))
    after_turing = tuple(capability for capability in before if capability not in TURING)
    six = (
        "kept so; versions of about 1.2 take six times the stored scale, newer ones the stored one"
    )
    yield from records(
        TENSORRT, MODELOPT, _NVFP4, (after_turing, NO, too_old), (BLACKWELL, NATIVE, six)
    )
    refusal = kv_cache_refusal(_NVFP4, COMPRESSED)
    assert refusal is not None
    for engine, gpus in ((VLLM, GPUS), (SGLANG, FROM_AMPERE), (TENSORRT, FROM_AMPERE)):
        yield from records(engine, COMPRESSED, _NVFP4, (gpus, NO, refusal))
    yield from records(TRANSFORMERS, MODELOPT, _NVFP4, (CPU + GPUS, NO, _NO_READER))
    yield from records(TRANSFORMERS, COMPRESSED, _NVFP4, (CPU + GPUS, NO, refusal))


_NO_READER = "transformers has no reader of modelopt checkpoints"


def _emulated(fmt: FormatName) -> Iterator[Support]:
    rounded = "keys and values are rounded as the format says, and kept in the model's dtype"
    yield from records(TRANSFORMERS, MODELOPT, fmt, (CPU + GPUS, NO, _NO_READER))
    yield from records(TRANSFORMERS, COMPRESSED, fmt, (CPU + GPUS, EMULATED, rounded))


_BY_CELL: dict[tuple[str, Container, FormatName, int | None], Support] = {
    (record.engine, record.container, record.format, capability): record
    for record in _records()
    for capability in record.capabilities
}


def kv_cache_reason(target: Target, container: Container, fmt: FormatName) -> str | None:
    """Why a target does not keep its cache in a format; None where it does.

    Raises:
        UnknownNameError: nothing has the format's name.
    """
    found = kv_cache_support(target, container, fmt)
    return found.reason if found.verdict is Verdict.NO else None
