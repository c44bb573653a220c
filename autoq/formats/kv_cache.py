"""Formats of the key/value cache: what each one is, and which container and engine hold it.

The cache is decided on apart from the weights: its cost is memory per cached token, not checkpoint
bytes, and every container states one format for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoq.formats._container import Container
from autoq.formats._format import NONE, FormatName
from autoq.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheFormat:
    """How keys and values are kept: with one calibrated scale each per layer, and blocks or none."""

    name: FormatName
    summary: str
    bits: float  # per cached element, block scales counted
    largest_code: float  # the calibrated scale is amax divided by it
    stored_divisor: float  # what amax is divided by in the scale that checkpoints hold
    block_size: int | None = None  # elements of a head that share a scale found at run time
    modelopt_name: str | None = None  # in kv_cache_quant_algo; None: no reader of modelopt has it


KV_CACHE_FORMATS: Registry[KVCacheFormat] = Registry("key/value cache format")

for _format in (
    KVCacheFormat(
        name=FormatName("fp8"),
        summary="E4M3, one calibrated scale amax / 448 for a layer's keys and one for its values",
        bits=8.0,
        largest_code=448.0,
        stored_divisor=448.0,
        modelopt_name="FP8",
    ),
    KVCacheFormat(
        name=FormatName("int8"),
        summary="INT8, one calibrated scale amax / 127 for a layer's keys and one for its values",
        bits=8.0,
        largest_code=127.0,
        stored_divisor=127.0,
    ),
    KVCacheFormat(
        name=FormatName("nvfp4"),
        summary="E2M1, an E4M3 scale per 16 elements of a head found as they are cached, under a "
        "calibrated scale amax / 2688 for keys and for values",
        bits=4.5,
        largest_code=6.0 * 448.0,
        # ModelOpt divides by 448 here, too; readers that want amax / 2688 divide by 6 themselves.
        stored_divisor=448.0,
        block_size=16,
        modelopt_name="NVFP4",
    ),
    KVCacheFormat(
        name=NONE,
        summary="as the model computes them, counted at 16 bits",
        bits=16.0,
        largest_code=1.0,
        stored_divisor=1.0,
    ),
):
    KV_CACHE_FORMATS.register(_format.name, _format)


def kv_cache_refusal(fmt: FormatName, container: Container) -> str | None:
    """Why checkpoints of a container cannot state a format of the cache; None where they can.

    Raises:
        UnknownNameError: nothing has the format's name.
    """
    entry = KV_CACHE_FORMATS[fmt]
    if fmt == NONE:
        return None
    if container is Container.MODELOPT and entry.modelopt_name is None:
        return (
            f"no engine reads a key/value cache in {fmt} from modelopt checkpoints; compressed-tensors "
            "holds it, for transformers alone"
        )
    if container is Container.COMPRESSED_TENSORS and entry.block_size is not None:
        return (
            f"no engine reads a key/value cache in {fmt} from compressed-tensors checkpoints; "
            "modelopt holds it"
        )
    return None
