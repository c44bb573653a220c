"""Calibrating the model that `compress` quantises, on data, a block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from autoq.api.streamed.block_caches import CacheRecordingStream
from autoq.api.task import PROBE_TOKENS, LoadedModel, load_data, token_batches
from autoq.errors import InputError
from autoq.export import (
    BlockCalibration,
    FolderWeights,
    SourceMatrices,
    StoredCalibration,
    sibling_folder,
)
from autoq.export.block_calibration import outside_blocks
from autoq.formats import NONE, Calibration, Container, FormatName
from autoq.layers import LayerCalibration
from autoq.layers.cached_layer import CachedLayer
from autoq.memory import large_blocks_given_back_at_once
from autoq.models import ModelMap, SlotName
from autoq.models.block_stream import StreamedModel
from autoq.models.folder import storage_dtype
from autoq.models.loading import unloaded_model, use_eager_experts
from autoq.progress import Progress

_CPU = torch.device("cpu")
__all__ = ["CalibratedByBlocks", "CalibrationData", "calibrated_by_blocks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationData:
    """What to calibrate on; the defaults are those of a search."""

    source: str | None = None  # None: the bundled text
    sequences: int = 128
    sequence_length: int = 512  # tokens
    batch_size: int = 4  # sequences
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequences", "sequence_length", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}; give a larger number")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedByBlocks:
    """The calibration of every quantised layer, and the data that it is from."""

    table: Mapping[tuple[SlotName, FormatName], LayerCalibration]
    description: str
    cached: tuple[CachedLayer, ...] = ()  # where caches were to be recorded


@contextmanager
def calibrated_by_blocks(
    source: Path,
    destination: Path,
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    data: CalibrationData,
    *,
    method: Calibration,
    container: Container,
    trust_remote_code: bool,
    records_caches: bool = False,
    progress: Progress,
) -> Iterator[CalibratedByBlocks]:
    """What `calibrate` gives of the model in float32, which is never in memory as a whole.

    What blocks give, and the codes that are found, wait in a folder beside the destination, which
    is removed when the context ends.

    Args:
        model_map: everything that discovery found.
        slot_formats: layers that are not in it or are "none" are not calibrated.
        records_caches: note the largest keys and values of every layer that caches them, too.
    Raises:
        InputError: a group lies in a block in part.
        DataError: the data cannot be read, or are too few.
        ModelError: an input holds NaN or Inf on the data, or the model cannot be run block by block.
        ExportError: the disk is full or cannot be written.
    """
    model = unloaded_model(source, trust_remote_code=trust_remote_code).to(torch.float32)
    use_eager_experts(model)
    scale_dtype: torch.dtype = getattr(torch, storage_dtype(source))
    loaded = LoadedModel(model, source, "", scale_dtype, trust_remote_code)
    tokens = load_data(
        loaded,
        data.source,
        sequences=data.sequences,
        sequence_length=data.sequence_length,
        split="calibration",
        seed=data.seed,
    )
    batches = token_batches(tokens, data.batch_size, _CPU)
    chosen = _quantised_part(model_map, slot_formats)
    stages = len(model_map.blocks) + bool(outside_blocks(chosen).groups)
    with (
        sibling_folder(destination) as folder,
        progress.task("calibrating", len(batches) * stages) as advance,
    ):
        stored = StoredCalibration(folder)
        matrices = SourceMatrices.of(source, model, model_map)
        small = batches[0][:1, :PROBE_TOKENS]
        weights = FolderWeights(model, model_map, matrices)
        streamed = StreamedModel(model, model_map, weights)
        stream = CacheRecordingStream(streamed, [*batches, small], folder)
        if records_caches:
            stream.record(model, model_map.blocks, len(batches))
        calibration = BlockCalibration(
            formats=sorted(set(slot_formats.values()) - {NONE}),
            container=container,
            scale_dtype=scale_dtype,
            method=method,
            after_batch=advance,
            takes_outside=True,
        )
        with large_blocks_given_back_at_once():
            calibration.run(stream, chosen, len(batches), stored)
        yield CalibratedByBlocks(
            table=stored,
            description=tokens.description,
            cached=stream.layers() if records_caches else (),
        )


def _quantised_part(model_map: ModelMap, slot_formats: Mapping[SlotName, FormatName]) -> ModelMap:
    groups = tuple(
        group for group in model_map.groups if slot_formats.get(group.slots[0], NONE) != NONE
    )
    slots = {name: model_map.slots[name] for group in groups for name in group.slots}
    return replace(model_map, slots=slots, groups=groups)
