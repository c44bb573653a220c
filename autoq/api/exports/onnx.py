"""Writing a plan as an ONNX graph with Q/DQ nodes: refused by name before work, recorded, run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.api.exports._recorded import provenance, recorded_export, searched_plan
from autoq.api.exports.exporting import EXPORT
from autoq.errors import InputError
from autoq.progress import Progress
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study import Study

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


def refuse_past(container: str | None, with_past: bool) -> None:
    """Refuse a cache as inputs and outputs where a container has none.

    Raises:
        InputError: it is asked for, and the container is another.
    """
    if with_past and container != ONNX:
        raise InputError(
            f"only the container {ONNX} takes the keys and values of earlier tokens, and engines of "
            f"{container or 'the others'} keep them themselves; leave with_past out"
        )


def export_onnx_plan(
    study: Study,
    plan: PlanRecord,
    destination: Path,
    *,
    overwrite: bool,
    progress: Progress,
    with_past: bool = False,
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
            return _export(study, plan, destination, overwrite, progress, with_past)
    finally:
        # The plan stands whether or not a graph of it could be written.
        study.store.set_status(study.id, WorkStatus.DONE)


def _export(
    study: Study,
    plan: PlanRecord,
    destination: Path,
    overwrite: bool,
    progress: Progress,
    with_past: bool,
) -> dict[str, Any]:
    from autoq.export.onnx import OnnxExport, export_onnx, onnx_warnings, refuse_onnx

    searched = searched_plan(study, plan)
    refuse_onnx(searched)
    for line in onnx_warnings(searched):
        progress.note(line)

    def write() -> OnnxExport:
        with progress.task("exporting", len(searched.quantized_slots)) as advance:
            return export_onnx(
                searched,
                source=study.loaded().path,
                destination=destination,
                overwrite=overwrite,
                progress=lambda: advance(1),
                provenance=provenance(study, plan),
                with_past=with_past,
            )

    return recorded_export(study, plan, ONNX, destination, write)
