"""Exporting a study's plan with the calibration that is stored, of a model that no memory holds."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autoq.api._stored_calibration import CalibrationInStore
from autoq.api.exports._recorded import provenance, recorded_export
from autoq.api.exports.exporting import EXPORT, target_warnings, unfolded_note
from autoq.api.kv_cache import exported_cache
from autoq.calibration import plain_entries
from autoq.errors import ExportError, InputError, ModelError
from autoq.export import (
    ExportedFile,
    SourceMatrices,
    VerificationReport,
    verify_written,
    warnings_for,
    write_checkpoint,
)
from autoq.export._source import storage_dtypes
from autoq.export._types import Spelling
from autoq.export.study_streaming import OrderedStreamedPlan
from autoq.formats import Container, FormatName
from autoq.layers import LayerCalibration
from autoq.layers.simulate import slot_formats_of
from autoq.memory import large_blocks_given_back_at_once
from autoq.models import SlotName
from autoq.models.loading import model_fingerprint, unloaded_model
from autoq.progress import Progress
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study import Study

STREAMED_CONTAINERS = ("modelopt", "compressed-tensors", "transformers-fp8")

SHARD_BYTES = 256 << 20
"""Of a file of weights, as `compress` writes them."""

_Table = Mapping[tuple[SlotName, FormatName], LayerCalibration]


def refuse_unstreamed_container(container: str | None) -> None:
    """
    Raises:
        InputError: the container is written from a model in memory only.
    """
    if container is not None and container not in STREAMED_CONTAINERS:
        raise InputError(
            f"--streamed writes {', '.join(STREAMED_CONTAINERS)}, and {container} is written from a "
            "model in memory; leave --streamed out"
        )


def export_plan_streamed(
    study: Study,
    plan: PlanRecord,
    destination: Path,
    container: Container,
    *,
    overwrite: bool,
    progress: Progress,
    spelling: Spelling = Spelling.OWN,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write, verify and record the checkpoint of `plan`; the study's lease must be held.

    Every tensor is, bit for bit, what `export_plan` writes, and so is every file, byte for byte, where
    shards have the same size: those of this are smaller, because one is in memory. Weights come from the
    model's folder a matrix at a time, scales and codes from the study's store. What was written is
    read back and compared; its logits are not compared with the simulation's.

    Args:
        max_shard_bytes: size at which the next file is started, and about what is in memory.
    Returns:
        As `export_plan`.
    Raises:
        ExportError: the container cannot express the plan, the folder cannot be written, or the
            model's folder keeps a layer otherwise than as one matrix by name.
        ModelError: the model has no folder, or another content than when it was searched.
        VerificationError: what was written does not read back bit for bit.
    """
    try:
        with study.repeated_stage(EXPORT), large_blocks_given_back_at_once():
            name = container.value if spelling is Spelling.OWN else spelling.value
            streamed = _streamed_plan(study, plan, container, spelling, progress)
            write = partial(
                _write, study, plan, streamed, destination, overwrite, max_shard_bytes, progress
            )
            written = recorded_export(study, plan, name, destination, write)
            return {**written, "verification": {**written["verification"], "container": name}}
    finally:
        # The plan stands whether or not a checkpoint of it could be written.
        study.store.set_status(study.id, WorkStatus.DONE)


def _streamed_plan(
    study: Study,
    plan: PlanRecord,
    container: Container,
    spelling: Spelling,
    progress: Progress,
) -> OrderedStreamedPlan:
    source = _unchanged_source(study)
    _refuse_narrowed(study, source)
    model = unloaded_model(source, trust_remote_code=study.trusts_remote_code)
    slot_formats = slot_formats_of(study.model_map, plan.to_plan().assignment)
    about = (study.model_map, slot_formats, container, study.storage_dtype, spelling)
    warnings = warnings_for(model, *about)
    for line in (*warnings, *target_warnings(study, slot_formats, container)):
        progress.note(line)
    matrices = SourceMatrices.of(source, model, study.model_map)
    calibration = _storable(study, matrices, slot_formats, container, progress)
    return OrderedStreamedPlan(
        model,
        study.model_map,
        slot_formats,
        calibration,
        container,
        study.storage_dtype,
        matrices=matrices,
        spelling=spelling,
        kv_cache=exported_cache(study, plan),
    )


def _unchanged_source(study: Study) -> Path:
    """
    Raises:
        ModelError: there is no folder, or it does not hold the model that was searched.
    """
    path = study.record.model_path
    if not path:
        raise ModelError(
            f"study {study.name} was made from a model in memory, and a streamed export reads a "
            "folder; export it without --streamed"
        )
    if model_fingerprint(path) != study.record.model_fingerprint:
        raise ModelError(
            f"{path} has changed since study {study.name} was made (fingerprints differ); search it "
            "again"
        )
    return Path(path)


def _refuse_narrowed(study: Study, source: Path) -> None:
    """
    Raises:
        ExportError: the search rounded weights when it loaded them, and the folder's are not so.
    """
    dtype = study.config.dtype
    if dtype in ("auto", "float32"):
        return
    others = set(storage_dtypes(source).values()) - {getattr(torch, dtype)}
    if others:
        stored = str(others.pop()).removeprefix("torch.")
        raise ExportError(
            f"a streamed export quantises the weights as they are stored, and study {study.name} "
            f"rounded {stored} ones to {dtype} first; export it without --streamed, or search "
            "without --dtype"
        )


def _storable(
    study: Study,
    matrices: SourceMatrices,
    slot_formats: Mapping[SlotName, FormatName],
    container: Container,
    progress: Progress,
) -> _Table:
    """The calibration, less the input scales that the container has no place for."""
    stored = CalibrationInStore(study)
    if container is not Container.COMPRESSED_TENSORS:
        return stored
    changed = plain_entries(
        matrices.matrix, study.model_map, slot_formats, stored, study.storage_dtype
    )
    if changed:
        progress.note(unfolded_note([slot for slot, _ in changed], container))
    return ChainMap(changed, stored)  # type: ignore[arg-type]  # the second is never written to


@dataclass(frozen=True, slots=True)
class _Written:
    """See `_recorded.Written`."""

    path: Path
    files: tuple[ExportedFile, ...]
    stored_bytes: int
    report: VerificationReport


def _write(
    study: Study,
    plan: PlanRecord,
    streamed: OrderedStreamedPlan,
    destination: Path,
    overwrite: bool,
    max_shard_bytes: int,
    progress: Progress,
) -> _Written:
    reports: list[VerificationReport] = []

    def verify(folder: Path, names: Collection[str]) -> None:
        with progress.task("reading back", 1) as advance:
            reports.append(verify_written(streamed, folder, names))
            advance()

    with progress.task("exporting", 0) as advance:
        result = write_checkpoint(
            streamed,
            source=Path(study.record.model_path),
            destination=destination,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            progress=lambda done, total: advance(1),
            provenance=provenance(study, plan),
            verify=verify,
        )
    return _Written(result.path, result.files, result.stored_bytes, reports[0])
