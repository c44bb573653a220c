"""Where unquantised layers run."""

from __future__ import annotations

from collections.abc import Iterator

from autoq.formats._container import Container
from autoq.formats._format import NONE
from autoq.formats._places import Support
from autoq.formats._support._cells import (
    CPU,
    FROM_AMPERE,
    GPUS,
    NATIVE,
    SGLANG,
    TENSORRT,
    TRANSFORMERS,
    VLLM,
    everywhere,
    records,
)

_PLACES = (
    (VLLM, GPUS),
    (SGLANG, FROM_AMPERE),
    (TENSORRT, FROM_AMPERE),
    (TRANSFORMERS, CPU + GPUS),
)


def support() -> Iterator[Support]:
    """Of `none`."""
    yield from everywhere(NONE)
    for container in Container:
        for engine, capabilities in _PLACES:
            row = (capabilities, NATIVE, "left as the model stores it")
            yield from records(engine, container, NONE, row)
