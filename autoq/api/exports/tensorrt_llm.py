"""Writing a plan as an engine checkpoint of TensorRT-LLM: refused before work, recorded, read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.api.exports._recorded import provenance, recorded_export, searched_plan
from autoq.api.exports.exporting import EXPORT
from autoq.api.kv_cache import exported_cache
from autoq.errors import InputError
from autoq.progress import Progress
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study import Study

TENSORRT_LLM = "tensorrt-llm"
"""What `export` calls the engine checkpoint, among the names of containers."""


def refuse_parallel(container: str | None, tp_size: int, pp_size: int) -> None:
    """Refuse ranks where a container knows none.

    Raises:
        InputError: there are several ranks, and the container is another.
    """
    if container != TENSORRT_LLM and (tp_size, pp_size) != (1, 1):
        raise InputError(
            f"only the container {TENSORRT_LLM} is split over ranks, and engines split the others "
            f"themselves; leave tp_size {tp_size} and pp_size {pp_size} out"
        )


def export_tensorrt_llm_plan(
    study: Study,
    plan: PlanRecord,
    destination: Path,
    *,
    tp_size: int,
    pp_size: int,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write, read back and record the checkpoint; the study's lease must be held.

    Raises:
        ExportError: the checkpoint cannot hold the plan, the model cannot be split over so many
            ranks, or the folder cannot be written.
        VerificationError: what was written does not read back bit for bit.
    """
    try:
        with study.repeated_stage(EXPORT):
            return _export(study, plan, destination, (tp_size, pp_size), overwrite, progress)
    finally:
        # The plan stands whether or not a checkpoint of it could be written.
        study.store.set_status(study.id, WorkStatus.DONE)


def _export(
    study: Study,
    plan: PlanRecord,
    destination: Path,
    sizes: tuple[int, int],
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    from autoq.export.tensorrt_llm import (
        Parallel,
        TensorRtLlmExport,
        export_tensorrt_llm,
        refuse_tensorrt_llm,
        tensorrt_llm_warnings,
    )

    searched = replace(searched_plan(study, plan), kv_cache=exported_cache(study, plan))
    parallel = Parallel(*sizes)
    refuse_tensorrt_llm(searched, parallel)
    for line in tensorrt_llm_warnings(searched):
        progress.note(line)

    def write() -> TensorRtLlmExport:
        with progress.task("exporting", len(searched.model_map.blocks)) as advance:
            return export_tensorrt_llm(
                searched,
                source=study.loaded().path,
                destination=destination,
                parallel=parallel,
                overwrite=overwrite,
                provenance=provenance(study, plan),
                progress=lambda: advance(1),
            )

    return recorded_export(study, plan, TENSORRT_LLM, destination, write)
