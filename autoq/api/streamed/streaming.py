"""Searching a model folder a block at a time, within a bound on memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from autoq.api._calibration_parts import CalibrationParts
from autoq.api._stored_calibration import CalibrationInStore
from autoq.api.config import ScoringConfig
from autoq.api.serialize import entry_without_arrays, key_of
from autoq.api.streamed.memory_bound import MemoryNeeds
from autoq.api.study_tables import CALIBRATION, SENSITIVITY
from autoq.api.task import PROBE_TOKENS, LoadedModel, ScoringTask, resolve_device
from autoq.errors import InputError, ModelError
from autoq.export import BlockCalibration, FolderWeights, SourceMatrices
from autoq.formats import FormatName
from autoq.kernels._torch.compiled import Policy, asking_for, policy
from autoq.layers import LayerCalibration
from autoq.models import ModelMap, SlotName
from autoq.models.block_stream import BlockStream, StreamedModel
from autoq.models.discovery import discover
from autoq.models.folder import storage_dtype
from autoq.models.kept_tensors import KeptTensors
from autoq.models.loading import model_fingerprint, unloaded_model, use_eager_experts
from autoq.progress import Progress
from autoq.search._projections import projection_dtype
from autoq.search.estimators import Estimator, make_estimator
from autoq.search.sensitivity import SensitivityScorer
from autoq.search.streamed import (
    StreamedScorer,
    refuse_outside_blocks,
    refuse_unstreamed_estimator,
)

if TYPE_CHECKING:
    from autoq.api.study import Study

_MOST_TOGETHER = 16
"""Batches that are scored side by side: so many are lost at most when a search is killed."""

_SUM_BYTES = 64 << 20
"""Bound on what batches that are scored side by side have summed up so far."""

_SHARE_OF_DISK = 0.5
"""Of the free disk, for what blocks give."""

_Key = tuple[SlotName, FormatName]


@dataclass(frozen=True, slots=True)
class _Room:
    """How a bound on memory is used, beyond what must be there."""

    kept_bytes: int  # of what blocks give; the rest goes to the disk
    error_bytes: int  # of quantisation errors of weights, of one block


class Streaming:
    """How a model on the meta device gets its weights, and how much memory there is."""

    def __init__(self, bound_bytes: int, device: torch.device) -> None:
        """
        Args:
            bound_bytes: what the process may take; on a GPU, of its memory likewise.
            device: to compute on.
        """
        self.bound_bytes, self.device = bound_bytes, device
        self._model: StreamedModel | None = None

    def model(self, loaded: LoadedModel, model_map: ModelMap) -> StreamedModel:
        """The model, ready to be run block by block.

        Raises:
            ModelError: its folder lacks weights.
        """
        if self._model is None:
            assert loaded.path is not None  # streamed models are read from folders
            everything = discover(loaded.model)  # what is not searched is read as well
            matrices = SourceMatrices.of(loaded.path, loaded.model, everything)
            weights = FolderWeights(loaded.model, everything, matrices)
            _refuse_missing(loaded.path, weights.missing())
            self._model = StreamedModel(loaded.model, model_map, weights, self.device)
        return self._model

    def room(self, loaded: LoadedModel, model_map: ModelMap, config: ScoringConfig) -> _Room:
        """What is left of the bound.

        Raises:
            InputError: less than nothing.
        """
        needs = MemoryNeeds.of(loaded, model_map, config)
        needs.refuse_less(self.bound_bytes)
        room = needs.room_of(self.bound_bytes)
        return _Room(kept_bytes=room, error_bytes=room)


@contextmanager
def compiling_nothing(loaded: LoadedModel) -> Iterator[None]:
    """Where memory is bounded, kernels stay as they are, to the same bits.

    Compiling them in the middle of a pass takes about 130 MB that no bound counts. Who asks for it
    by the environment variable gets it.
    """
    if loaded.stream is None or policy() is not Policy.AUTO:
        yield
        return
    with asking_for(Policy.NEVER):
        yield


def load_streamed(config: ScoringConfig, model: str | Path, bound_bytes: int) -> LoadedModel:
    """A model folder whose weights are read block by block, when they are needed.

    Raises:
        InputError: there is no such device.
        ModelError: as `load_model`, as far as it shows without reading weights.
    """
    path = Path(model)
    device = resolve_device(config.device)
    unloaded = unloaded_model(path, trust_remote_code=config.trust_remote_code)
    use_eager_experts(unloaded)
    stored: torch.dtype = getattr(torch, storage_dtype(path))
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else storage_dtype(path)
    _cast(unloaded, getattr(torch, name))
    return LoadedModel(
        unloaded,
        path,
        model_fingerprint(path),
        stored,
        config.trust_remote_code,
        Streaming(bound_bytes, device),
    )


def _refuse_missing(folder: Path, missing: list[str]) -> None:
    """
    Raises:
        ModelError: something is missing.
    """
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"a model that is read block by block must have every weight under the name that its "
            f"architecture gives it, and {folder} lacks {missing[0]}{more}; fetch the model again, or "
            "search it without a bound on memory"
        )


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As transformers loads a model in a dtype: buffers stay as they are."""
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    wide = any(getattr(model, name, None) for name in kept)
    if wide and dtype != torch.float32:
        raise InputError(
            f"{type(model).__name__} keeps some layers in float32, so within a bound on memory it is "
            "searched in float32; give --dtype float32"
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def prepare_streamed(loaded: LoadedModel, model_map: ModelMap, config: ScoringConfig) -> None:
    """Refuse what cannot be searched block by block, before any pass over data.

    Raises:
        InputError: the bound on memory is too small, or a layer lies in no block.
        ModelError: the model is no row of blocks.
    """
    streaming = _streaming(loaded)
    refuse_outside_blocks(streaming.model(loaded, model_map))
    streaming.room(loaded, model_map, config)


def check_stored_finite(loaded: LoadedModel, model_map: ModelMap) -> None:
    """As `autoq.models.weights.check_finite`, of the folder's tensors, one after the other.

    Raises:
        ModelError: names the first tensor with NaN or infinity, and how many it has.
    """
    assert loaded.path is not None  # streamed models are read from folders
    source = SourceMatrices.of(loaded.path, loaded.model, model_map).source
    for name in source.names:
        values = source.tensor(name)
        # No sum with NaN or Inf in it is finite, and few finite ones overflow.
        if not values.is_floating_point() or bool(torch.isfinite(values.sum(dtype=torch.float32))):
            continue
        broken = int((~torch.isfinite(values)).sum())
        if broken:
            raise ModelError(
                f"weights must be finite, and {name} has {broken} NaN or infinite of "
                f"{values.numel()} values; restore the weights from a good copy"
            )


@contextmanager
def workspace(study: Study, stage: str) -> Iterator[Path]:
    """A folder for what blocks give; see `fresh_folder`."""
    folder = fresh_folder(study, stage)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fresh_folder(study: Study, stage: str) -> Path:
    """An empty folder where temporary files are (TMPDIR), always the same for a study's stage.

    So what a killed search left there is removed, be it in a stage that has ended since. The study's
    lease must be held.
    """
    place = f"{study.store.described}|{study.id}|{study.record.model_fingerprint}"
    if ":memory:" in study.store.described:
        place += f"|{os.getpid()}"  # no other process has that store, and each calls its own so
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    temporary = Path(tempfile.gettempdir())
    for left in temporary.glob(f"autoq-{name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = temporary / f"autoq-{name}-{stage}"
    folder.mkdir(mode=0o700)  # what is in it follows from the calibration text
    return folder


class CalibrationByBlocks(Mapping[_Key, LayerCalibration]):
    """A study's calibration, read from its store: that of one block is in memory."""

    def __init__(self, study: Study) -> None:
        """
        Raises:
            InputError: the study is not calibrated.
        """
        self._stored = CalibrationInStore(study)
        self._keys = set(self._stored)
        self._block_of = {
            name: next((p for p in study.model_map.blocks if slot.module.startswith(f"{p}.")), "")
            for name, slot in study.model_map.slots.items()
        }
        self._block = ""
        self._entries: dict[_Key, LayerCalibration] = {}

    def __getitem__(self, key: _Key) -> LayerCalibration:
        block = self._block_of.get(key[0], "")
        if block != self._block:
            self._entries.clear()
            self._block = block
        if key not in self._entries:
            self._entries[key] = self._stored[key]
        return self._entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._keys)


def calibrate_streamed(
    study: Study, loaded: LoadedModel, task: ScoringTask, progress: Progress, *, fingerprint: str
) -> tuple[list[dict[str, Any]], Mapping[_Key, LayerCalibration]]:
    """Calibrate every slot in every format, block by block; the stage must have begun.

    Blocks that a killed search has calibrated are not calibrated again. What is in the store of
    them beside the arrays is of no use once the stage is finished.

    Args:
        fingerprint: of the calibration, see `autoq.api.reuse.calibration_fingerprint`.
    Returns:
        What the stage is to store beside the arrays, which are in the store, and the calibrations
        without their arrays.
    Raises:
        ModelError: an input holds NaN or Inf on calibration data, or the model cannot be run block
            by block.
    """
    streaming = _streaming(loaded)
    model_map, config = study.model_map, study.config
    model = streaming.model(loaded, model_map)
    room = streaming.room(loaded, model_map, config)
    small = task.batches[0][:1, :PROBE_TOKENS]
    found = CalibrationParts(study, fingerprint)
    steps = len(task.batches) * model.blocks
    with workspace(study, CALIBRATION) as folder, progress.task("calibrating", steps) as advance:
        found.take_up(progress, advance)
        stream = BlockStream(model, [*task.batches, small], folder, room.kept_bytes)
        BlockCalibration(
            formats=config.formats,
            container=config.container,
            scale_dtype=loaded.storage_dtype,
            method=config.calibration,
            moment_bytes=room.error_bytes,
            after_batch=advance,
        ).run(stream, model_map, len(task.batches), found, found.done)
        stream.check(len(task.batches))
        model.forget_outside()
    records = found.records
    return records, {key_of(record): entry_without_arrays(record) for record in records}


def streamed_estimator(
    name: str, *, study: Study, loaded: LoadedModel, task: ScoringTask
) -> Estimator:
    """The estimator called `name`, for a model that is read block by block.

    What blocks give is kept for as long as the estimator lives.

    Raises:
        InputError: it does not score so, or a layer lies in no block.
    """
    streaming = _streaming(loaded)
    model_map, config = study.model_map, study.config
    room = streaming.room(loaded, model_map, config)
    options: dict[str, Any] = {"row_fraction": config.row_fraction, "draws": config.draws}
    scorer = make_estimator(
        name,
        loaded.model,
        model_map,
        config.formats,
        CalibrationByBlocks(study),
        container=config.container,
        scale_dtype=loaded.storage_dtype,
        seed=config.seed,
        dtype=projection_dtype(loaded.model, streaming.device),
        **(options if name == config.estimator else {}),
    )
    if not isinstance(scorer, SensitivityScorer):
        refuse_unstreamed_estimator(name, False)
    folder = fresh_folder(study, SENSITIVITY)
    scored = StreamedScorer(
        cast("SensitivityScorer", scorer),
        streaming.model(loaded, model_map),
        task.batches,
        task.loss,
        together=_together(loaded, study, task.batches[0], folder),
        kept=KeptTensors(folder, room.kept_bytes),
        error_bytes=room.error_bytes,
    )
    weakref.finalize(scored, shutil.rmtree, folder, ignore_errors=True)
    # What an estimator has in its class, this one has in itself.
    return cast("Estimator", scored)


def _together(loaded: LoadedModel, study: Study, batch: Tensor, folder: Path) -> int:
    """How many batches are scored side by side."""
    needs = MemoryNeeds.of(loaded, study.model_map, study.config)
    on_disk = int(shutil.disk_usage(folder).free * _SHARE_OF_DISK) // max(needs.handed_on, 1)
    sums = 4 * len(study.model_map.groups) * len(study.config.formats) * batch.numel()
    return max(1, min(_MOST_TOGETHER, on_disk, _SUM_BYTES // max(sums, 1)))


def _streaming(loaded: LoadedModel) -> Streaming:
    assert loaded.stream is not None  # asked before
    return loaded.stream
