"""Writing a plan as an ONNX graph with Q/DQ nodes: refused by name before work, recorded, run."""

from __future__ import annotations

import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.api.exporting import EXPORT
from autoq.errors import InputError
from autoq.layers.simulate import slot_formats_of
from autoq.progress import Progress
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study import Study
    from autoq.export._plan import ExportPlan
    from autoq.export.onnx import OnnxExport

ONNX = "onnx"
"""What `export` calls the graph, among the names of containers."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def refuse_missing_packages() -> None:
    """Refuse to write ONNX where it cannot be written or run.

    Raises:
        InputError: names the packages, and the extra that brings them.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX needs the packages {', '.join(missing)}; install autoq with its extra `onnx`"
        )


def export_onnx_plan(
    study: Study, plan: PlanRecord, destination: Path, *, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Write, run and record the graph of `plan`; the study's lease must be held.

    Raises:
        ExportError: ONNX cannot hold the plan, torch cannot trace the model, or the folder cannot
            be written.
        VerificationError: what was written does not read back bit for bit, or computes something
            else in onnxruntime.
    """
    try:
        with study.repeated_stage(EXPORT):
            return _export(study, plan, destination, overwrite, progress)
    finally:
        # The plan stands whether or not a graph of it could be written.
        study.store.set_status(study.id, WorkStatus.DONE)


def _export(
    study: Study, plan: PlanRecord, destination: Path, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    from autoq.export.onnx import refuse_onnx

    started = time.perf_counter()
    export_plan = _export_plan(study, plan)
    refuse_onnx(export_plan)
    export_id = study.store.begin_export(
        study.id, plan_id=plan.id, container=ONNX, path=str(destination.resolve())
    )
    try:
        written = _write(study, plan, export_plan, destination, overwrite, progress)
    except BaseException as error:
        study.store.fail_export(export_id, reason=f"{type(error).__name__}: {error}")
        raise
    verification = asdict(written.report)
    study.store.finish_export(
        export_id,
        files=[(file.path, file.size_bytes, file.sha256) for file in written.files],
        verification=verification,
    )
    return {
        "study": study.name,
        "plan": plan.label,
        "path": str(written.path),
        "container": ONNX,
        "effective_bits": plan.effective_bits,
        "stored_bytes": written.stored_bytes,
        "files": [
            {"path": f.path, "bytes": f.size_bytes, "sha256": f.sha256} for f in written.files
        ],
        "verification": verification,
        "seconds": time.perf_counter() - started,
    }


def _export_plan(study: Study, plan: PlanRecord) -> ExportPlan:
    from autoq.export._plan import ExportPlan

    return ExportPlan(
        study.loaded().model,
        study.model_map,
        slot_formats_of(study.model_map, plan.to_plan().assignment),
        study.calibration,
        study.config.container,
        study.storage_dtype,
    )


def _write(
    study: Study,
    plan: PlanRecord,
    export_plan: ExportPlan,
    destination: Path,
    overwrite: bool,
    progress: Progress,
) -> OnnxExport:
    from autoq.export.onnx import export_onnx

    with progress.task("exporting", len(export_plan.quantized_slots)) as advance:
        return export_onnx(
            export_plan,
            source=study.loaded().path,
            destination=destination,
            overwrite=overwrite,
            progress=lambda: advance(1),
            provenance={
                "study": study.name,
                "plan": plan.label,
                "effective_bits": plan.effective_bits,
                "model_fingerprint": study.record.model_fingerprint,
            },
        )
