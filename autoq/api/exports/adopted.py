"""Checkpoints of a process that was killed after it gave the folder its name, and before it said so."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.export import ExportedFile
from autoq.export._folder import exported_files
from autoq.progress import Progress
from autoq.studies import PlanRecord, StudyStore
from autoq.studies.maintenance import file_of

if TYPE_CHECKING:
    from autoq.api.study import Study


def is_unrecorded(store: StudyStore | str, destination: Path) -> bool:
    """Whether the folder may be one that an export of this store did not live to record."""
    if not os.path.lexists(destination):
        return False
    if not isinstance(store, str):
        return bool(store.unfinished_exports(str(destination.resolve())))
    file = file_of(store)
    if file is not None and not file.exists():
        return False
    with StudyStore.open(store) as opened:
        return is_unrecorded(opened, destination)


def adopted_export(
    study: Study, plan: PlanRecord, name: str, destination: Path, progress: Progress
) -> dict[str, Any] | None:
    """Record the folder as what it is, if it is the plan's checkpoint, file by file; else None.

    Args:
        name: of the container, as exports are recorded.
    Returns:
        What `Study.export` gives.
    """
    started = time.perf_counter()
    found = [
        export
        for export in study.store.unfinished_exports(str(destination.resolve()))
        if (export.study_id, export.plan_id, export.container) == (study.id, plan.id, name)
    ]
    if not found or not destination.is_dir():
        return None
    written = recorded_files(exported_files(destination))
    export = found[-1]
    if written != [(file.path, file.size_bytes, file.sha256) for file in export.files]:
        return None
    study.store.finish_export(export.id, files=written, verification=export.verification)
    progress.note(
        f"{destination} was finished by an export that was killed before it was recorded; its files "
        "have the hashes that were noted then, and it is recorded now"
    )
    weights = [size for path, size, _ in written if path.endswith(".safetensors")]
    return {
        "study": study.name,
        "plan": plan.label,
        "path": str(destination),
        "container": name,
        "effective_bits": plan.effective_bits,
        "stored_bytes": sum(weights),
        "files": [{"path": p, "bytes": size, "sha256": sha256} for p, size, sha256 in written],
        "verification": export.verification,
        "seconds": time.perf_counter() - started,
    }


def recorded_files(files: Iterable[ExportedFile]) -> list[tuple[str, int, str]]:
    """(path, bytes, SHA-256), as the store wants them, sorted."""
    return sorted((file.path, file.size_bytes, file.sha256) for file in files)
