"""Exports that are no container of a search: the plan as they take it, and their record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autoq.errors import StoreError
from autoq.formats import FormatName
from autoq.layers.simulate import slot_formats_of
from autoq.models import GroupName
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study
    from autoq.export import ExportedFile
    from autoq.export._plan import ExportPlan


class Written(Protocol):
    """What an export tells when its folder is complete."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def files(self) -> tuple[ExportedFile, ...]:
        """Everything in it."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights' files."""

    @property
    def report(self) -> Any:
        """A dataclass of what was compared."""


def recorded_export(
    study: Study, plan: PlanRecord, name: str, destination: Path, write: Callable[[], Written]
) -> dict[str, Any]:
    """Write, and record it in the study under the name; what failed, too.

    Returns:
        What `Study.export` gives.
    """
    started = time.perf_counter()
    export_id = study.store.begin_export(
        study.id, plan_id=plan.id, container=name, path=str(destination.resolve())
    )
    try:
        written = write()
    except BaseException as error:
        with suppress(StoreError):  # it may be the store that failed; then that is said
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
        "container": name,
        "effective_bits": plan.effective_bits,
        "stored_bytes": written.stored_bytes,
        "files": [
            {"path": f.path, "bytes": f.size_bytes, "sha256": f.sha256} for f in written.files
        ],
        "verification": verification,
        "seconds": time.perf_counter() - started,
    }


def searched_plan(study: Study, plan: PlanRecord) -> ExportPlan:
    """The plan with the model and the calibration of its search, for the container searched for."""
    from autoq.export._plan import ExportPlan

    assignment = {GroupName(group): FormatName(fmt) for group, fmt in plan.assignment.items()}
    return ExportPlan(
        study.loaded().model,
        study.model_map,
        slot_formats_of(study.model_map, assignment),
        study.calibration,
        study.config.container,
        study.storage_dtype,
    )


def provenance(study: Study, plan: PlanRecord) -> Mapping[str, Any]:
    """What an export says of where it comes from."""
    return {
        "study": study.name,
        "plan": plan.label,
        "effective_bits": plan.effective_bits,
        "model_fingerprint": study.record.model_fingerprint,
    }
