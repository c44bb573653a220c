"""The key/value cache of a model of which one block at a time is in memory, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autoq.calibration.kv_cache import CacheMagnitudes
from autoq.errors import InputError
from autoq.export import ExportedCache, FolderWeights, SourceMatrices
from autoq.formats import NONE, Container, FormatName
from autoq.formats.kv_cache import KV_CACHE_FORMATS, kv_cache_refusal
from autoq.layers.cached_layer import CachedLayer
from autoq.layers.kv_cache import attention_modules, cached_layers, refuse_other_caches
from autoq.models import ModelMap
from autoq.models.block_stream import BlockStream, StreamedModel
from autoq.models.forward import forward_logits
from autoq.models.loading import unloaded_model, use_eager_experts

_PROBE_TOKENS = 4
WITHOUT_SCALE = FormatName("fp8")
"""The format that engines take with scales of 1 where a checkpoint was not calibrated: E4M3 reaches
448, and what models cache is mostly far below that."""


def cache_format(
    name: str | None, container: Container, *, argument: str = "--kv-format"
) -> FormatName:
    """The format that is asked for, "none" where nobody asked.

    Args:
        argument: what the user calls it.
    Raises:
        InputError: the container cannot hold it.
        UnknownNameError: it is not known.
    """
    if name is None:
        return NONE
    fmt = KV_CACHE_FORMATS[name].name
    reason = None if fmt == NONE else kv_cache_refusal(fmt, container)
    if reason is not None:
        raise InputError(f"{argument} {name} does not go with {container}: {reason}")
    return fmt


class CacheRecordingStream(BlockStream):
    """A stream that records the largest keys and values of each block, batch by batch."""

    _magnitudes: CacheMagnitudes | None = None
    _paths: Sequence[str] = ()
    _batches = 0

    def record(self, model: nn.Module, blocks: Sequence[str], batches: int) -> None:
        """Begin.

        Args:
            model: the one that is streamed.
            blocks: their paths, in the stream's order.
            batches: how many of the stream's first inputs count; behind them is the input on which
                folding is tried, with norms that are changed.
        Raises:
            ModelError: it keeps no cache of keys and values.
        """
        refuse_other_caches(model)
        self._magnitudes = CacheMagnitudes(model, attention_modules(model))
        self._paths, self._batches = blocks, batches

    def run(self, number: int, index: int, *, keep: bool) -> Tensor:
        """See `BlockStream`."""
        if self._magnitudes is None or index >= self._batches:
            return super().run(number, index, keep=keep)
        with self._magnitudes.recorded(f"{self._paths[number]}."):
            return super().run(number, index, keep=keep)

    def layers(self) -> tuple[CachedLayer, ...]:
        """What was recorded, in the order in which the layers ran.

        Raises:
            ModelError: no keys and values were seen.
        """
        assert self._magnitudes is not None
        return self._magnitudes.layers()


def uncalibrated_cache(
    source: Path, model_map: ModelMap, fmt: FormatName, *, trust_remote_code: bool
) -> tuple[CachedLayer, ...]:
    """The layers that cache, with magnitudes that make every scale 1.

    Which they are is seen from a few tokens; each block is in memory once for that.

    Raises:
        InputError: the format cannot do without data.
        ModelError: the model keeps no cache of keys and values, or cannot be run block by block.
    """
    if fmt != WITHOUT_SCALE:
        raise InputError(
            f"a key/value cache in {fmt} needs scales from data, and none are named; name some "
            f"(--calib), or take --kv-format {WITHOUT_SCALE}, which engines run with scales of 1"
        )
    model = unloaded_model(source, trust_remote_code=trust_remote_code).to(torch.float32)
    use_eager_experts(model)
    refuse_other_caches(model)
    matrices = SourceMatrices.of(source, model, model_map)
    streamed = StreamedModel(model, model_map, FolderWeights(model, model_map, matrices))
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.int64)
    with streamed.loading_blocks():
        layers = cached_layers(model, lambda: forward_logits(model, ids))
    reach = KV_CACHE_FORMATS[fmt].stored_divisor
    return tuple(replace(layer, key_amax=reach, value_amax=reach) for layer in layers)


def exported(
    layers: Sequence[CachedLayer], fmt: FormatName, *, argument: str = "--kv-format"
) -> ExportedCache:
    """All layers in one format, as a checkpoint holds it.

    Args:
        argument: what the user calls the format.
    Raises:
        InputError: a layer cannot take it.
    """
    for layer in layers:
        reason = layer.misfit(fmt)
        if reason is not None:
            raise InputError(f"{argument} {fmt} cannot be had: {reason}; take another")
    return ExportedCache(tuple(layers), dict.fromkeys((layer.name for layer in layers), fmt))
