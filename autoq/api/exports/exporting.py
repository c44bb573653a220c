"""Writing a plan's checkpoint: refused by name before work, recorded, and read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from autoq.api.exports.adopted import adopted_export, recorded_files
from autoq.api.exports.transformers_fp8 import compared_weights
from autoq.api.kv_cache import exported_cache
from autoq.api.task import PROBE_TOKENS
from autoq.calibration import without_unfolded_scales
from autoq.errors import StoreError
from autoq.export import (
    ExportedCache,
    ExportedFile,
    ExportResult,
    VerificationReport,
    export_checkpoint,
    is_held,
    refusals,
    verify_checkpoint,
    verify_logits,
    warnings_for,
)
from autoq.export._types import Spelling
from autoq.formats import NONE, FormatName, parse_target, reasons
from autoq.layers import Container, LayerCalibration
from autoq.layers.simulate import slot_formats_of
from autoq.models import GroupName, ModelMap, SlotKind, SlotName
from autoq.progress import Progress
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study import Study

Calibrations: TypeAlias = Mapping[tuple[SlotName, FormatName], LayerCalibration]

EXPORT = "export"
"""The stage of a study that writes a checkpoint, by name in the store."""


def inexpressible(
    model: nn.Module,
    model_map: ModelMap,
    formats: Sequence[FormatName],
    container: Container,
    *,
    together: bool = False,
) -> dict[tuple[GroupName, FormatName], str]:
    """Group and format -> why the container cannot hold that group in that format.

    Formats that no container holds are not asked about: nothing is lost by searching them.

    Args:
        together: a plan is to have one format wherever it can, so that the experts of all layers
            are in it or none; otherwise each group has to stand beside others that are not.
    """
    experts = [name for name, slot in model_map.slots.items() if slot.kind is SlotKind.EXPERT]
    of_experts: dict[FormatName, list[str]] = {}
    reasons = {}
    for group in model_map.groups:
        for fmt in formats:
            if fmt == NONE or not is_held(fmt):
                continue  # what no container holds is searched for its own sake
            if together and not set(group.slots).isdisjoint(experts):
                if fmt not in of_experts:
                    of_experts[fmt] = _refusals(model, model_map, experts, fmt, container)
                lines = of_experts[fmt]
            else:
                lines = _refusals(model, model_map, group.slots, fmt, container)
            if lines:
                reasons[group.name, fmt] = lines[0]
    return reasons


def _refusals(
    model: nn.Module,
    model_map: ModelMap,
    slots: Iterable[SlotName],
    fmt: FormatName,
    container: Container,
) -> list[str]:
    """Of a plan that has these slots alone in a format."""
    slot_formats = dict.fromkeys(slots, fmt)
    calibration = {
        (slot, fmt): LayerCalibration(weight_amax=1.0, input_amax=1.0) for slot in slot_formats
    }
    return refusals(model, model_map, slot_formats, calibration, container)


def export_plan(
    study: Study,
    plan: PlanRecord,
    destination: Path,
    container: Container,
    *,
    overwrite: bool,
    check_logits: bool,
    progress: Progress,
    spelling: Spelling = Spelling.OWN,
) -> dict[str, Any]:
    """Write, verify and record the checkpoint of `plan`; the study's lease must be held.

    Raises:
        ExportError: the container cannot express the plan, or the folder cannot be written.
        VerificationError: what was written does not read back bit for bit.
    """
    name = container.value if spelling is Spelling.OWN else spelling.value
    try:
        with study.repeated_stage(EXPORT):
            if not overwrite:
                adopted = adopted_export(study, plan, name, destination, progress)
                if adopted is not None:
                    return adopted
            return _export(
                study, plan, destination, container, overwrite, check_logits, progress, spelling
            )
    finally:
        # The plan stands whether or not a checkpoint of it could be written.
        study.store.set_status(study.id, WorkStatus.DONE)


def _export(
    study: Study,
    plan: PlanRecord,
    destination: Path,
    container: Container,
    overwrite: bool,
    check_logits: bool,
    progress: Progress,
    spelling: Spelling,
) -> dict[str, Any]:
    started = time.perf_counter()
    loaded = study.loaded()
    slot_formats = slot_formats_of(study.model_map, plan.to_plan().assignment)
    about = (study.model_map, slot_formats, container, study.storage_dtype, spelling)
    for line in (
        *warnings_for(loaded.model, *about),
        *target_warnings(study, slot_formats, container),
    ):
        progress.note(line)
    calibration = _storable_calibration(study, slot_formats, container, progress)
    name = container.value if spelling is Spelling.OWN else spelling.value
    export_id = study.store.begin_export(
        study.id, plan_id=plan.id, container=name, path=str(destination.resolve())
    )
    verification: dict[str, Any] = {}
    cache = exported_cache(study, plan)

    def verify(folder: Path) -> None:
        verification.update(
            _plain(
                _verify(
                    study, folder, slot_formats, calibration, container, progress, spelling, cache
                ),
                name,
            )
        )
        if check_logits and spelling is Spelling.TRANSFORMERS_FP8:
            verification.update(compared_weights(folder, progress))
        elif check_logits and _loads_in_transformers(loaded.model, container, progress):
            verification["transformers_logits"] = _compare_logits(study, folder, progress)

    try:
        result = _write(
            study,
            plan,
            slot_formats,
            calibration,
            destination,
            container,
            overwrite,
            verify,
            lambda files: study.store.prepare_export(
                export_id, files=recorded_files(files), verification=verification
            ),
            progress,
            spelling,
        )
    except BaseException as error:
        with suppress(StoreError):  # it may be the store that failed; then that is said
            study.store.fail_export(export_id, reason=f"{type(error).__name__}: {error}")
        raise
    study.store.finish_export(
        export_id,
        files=recorded_files(result.files),
        verification=verification,
    )
    return {
        "study": study.name,
        "plan": plan.label,
        "path": str(result.path),
        "container": name,
        "effective_bits": plan.effective_bits,
        "stored_bytes": result.stored_bytes,
        "files": [
            {"path": f.path, "bytes": f.size_bytes, "sha256": f.sha256} for f in result.files
        ],
        "verification": verification,
        "seconds": time.perf_counter() - started,
    }


def target_warnings(
    study: Study, slot_formats: Mapping[SlotName, FormatName], container: Container
) -> Iterator[str]:
    """What the study's target cannot run of this checkpoint; another container may be asked for."""
    if study.target is None:
        return
    used = sorted(set(slot_formats.values()))
    for fmt, reason in reasons(parse_target(study.target), container, used).items():
        yield (
            f"{study.target}, which the study was searched for, does not run {fmt} from "
            f"{container.value}: {reason}"
        )


def _storable_calibration(
    study: Study,
    slot_formats: Mapping[SlotName, FormatName],
    container: Container,
    progress: Progress,
) -> Calibrations:
    """The calibration, less the input scales that the container has no place for."""
    if container is not Container.COMPRESSED_TENSORS:
        return study.calibration
    plain, changed = without_unfolded_scales(
        study.loaded().model,
        study.model_map,
        slot_formats,
        study.calibration,
        study.storage_dtype,
    )
    if changed:
        progress.note(unfolded_note(changed, container))
    return plain


def unfolded_note(changed: Sequence[SlotName], container: Container) -> str:
    """What to say of layers that lose their input scale in a container."""
    return (
        f"{len(changed)} layers are written without their AWQ scale, which {container.value} "
        f"cannot store (the first is {changed[0]}); the predicted loss is with it: search with "
        f"--container {container.value} to score what is written"
    )


def _write(
    study: Study,
    plan: PlanRecord,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Calibrations,
    destination: Path,
    container: Container,
    overwrite: bool,
    verify: Callable[[Path], None],
    ready: Callable[[tuple[ExportedFile, ...]], None],
    progress: Progress,
    spelling: Spelling,
) -> ExportResult:
    loaded = study.loaded()
    with progress.task("exporting", 0) as advance:
        return export_checkpoint(
            loaded.model,
            study.model_map,
            slot_formats,
            calibration,
            source=loaded.path,
            destination=destination,
            container=container,
            scale_dtype=study.storage_dtype,
            kv_cache=exported_cache(study, plan),
            overwrite=overwrite,
            progress=lambda done, total: advance(1),
            provenance={
                "study": study.name,
                "plan": plan.label,
                "effective_bits": plan.effective_bits,
                "model_fingerprint": study.record.model_fingerprint,
            },
            verify=verify,
            ready=ready,
            spelling=spelling,
        )


def _verify(
    study: Study,
    folder: Path,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Calibrations,
    container: Container,
    progress: Progress,
    spelling: Spelling,
    kv_cache: ExportedCache | None,
) -> VerificationReport:
    with progress.task("reading back", 1) as advance:
        report = verify_checkpoint(
            folder,
            study.loaded().model,
            study.model_map,
            slot_formats,
            calibration,
            container,
            study.storage_dtype,
            spelling,
            kv_cache,
        )
        advance()
        return report


def _loads_in_transformers(model: nn.Module, container: Container, progress: Progress) -> bool:
    """Whether transformers can be asked to load the checkpoint; says so if something lacks."""
    if container is not Container.COMPRESSED_TENSORS:
        return False
    if getattr(getattr(model, "config", None), "auto_map", None):
        progress.note(
            "logits are not compared with transformers': the model's code lies in its folder, and "
            "is not copied; whoever loads the checkpoint needs it there"
        )
        return False
    if find_spec("compressed_tensors") is None:
        progress.note(
            "logits are not compared with transformers': that needs the package "
            "compressed-tensors; install autoq with its extra `export`"
        )
        return False
    return True


def _compare_logits(study: Study, folder: Path, progress: Progress) -> dict[str, float]:
    """How far transformers' logits are from the simulation's, and how far they may be."""
    vocabulary = study.loaded().vocabulary_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    with progress.task("loading with transformers", 1) as advance:
        difference = verify_logits(folder, ids)
        advance()
    return {"relative_difference": difference}


def _plain(report: VerificationReport, name: str) -> dict[str, Any]:
    return {**asdict(report), "container": name}
