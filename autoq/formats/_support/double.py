"""Where INT4 with coded scales runs: nowhere, as no container has a place for them."""

from __future__ import annotations

from collections.abc import Iterator

from autoq.formats._container import Container
from autoq.formats._format import FormatName
from autoq.formats._places import Support
from autoq.formats._support._cells import (
    CPU,
    FROM_AMPERE,
    GPUS,
    NO,
    SGLANG,
    TENSORRT,
    TRANSFORMERS,
    VLLM,
    everywhere,
    records,
)

_INT4_DQ = FormatName("int4_dq")
_NO_PLACE = "{} has no place for scales in 8 bits under a second level of scales"


def support() -> Iterator[Support]:
    """Of double quantisation."""
    yield from everywhere(_INT4_DQ)
    for container in Container:
        reason = _NO_PLACE.format(container)
        for engine in (SGLANG, TENSORRT):
            yield from records(engine, container, _INT4_DQ, (FROM_AMPERE, NO, reason))
        yield from records(VLLM, container, _INT4_DQ, (GPUS, NO, reason))
        yield from records(TRANSFORMERS, container, _INT4_DQ, (CPU + GPUS, NO, reason))
