"""A study as one file: a zip of plain JSON and npy arrays, each with its hash.

`study.json` holds the rows, `blobs/SHA256.npy` the arrays, `manifest.json` says what they are.
Nothing in it depends on the store: rows are numbered by their order, so a study that went through
other databases comes back as the same bytes. Rows' own seals stay behind, as they are of the store's
numbers: they are verified before the file is written, `study.json` has a hash as a whole, and rows
are sealed anew where it is read. Nothing is compressed, so no file is larger than it
says, and nothing is ever unpickled.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from autoq.errors import InputError, UnknownNameError
from autoq.studies._blobs import blob_bytes
from autoq.studies._database import Database
from autoq.studies._encoding import canonical_json, iso_time, sha256_hex
from autoq.studies._schema import (
    ArrayRow,
    Base,
    ExportFileRow,
    ExportRow,
    MeasurementRow,
    PlanRow,
    ScoreBatchRow,
    SensitivityRow,
    StageRow,
    StudyRow,
)
from autoq.studies._seals import SEAL

KIND = "autoq study"
FILE_VERSION = 1
MANIFEST, STUDY = "manifest.json", "study.json"
BLOB = re.compile(r"blobs/([0-9a-f]{64})\.npy")

TABLES: dict[str, type[Base]] = {
    "stages": StageRow,
    "arrays": ArrayRow,
    "score_batches": ScoreBatchRow,
    "sensitivity": SensitivityRow,
    "plans": PlanRow,
    "measurements": MeasurementRow,
    "exports": ExportRow,
}
"""Parts of `study.json` -> the rows of a study that they are made of."""

PLAN_KEYS = ("plan_id", "refined_from", "of_plan")
"""Keys of plain data that hold a plan's number."""

PLAN_STAGE = re.compile(r"(refined plan )(\d+)")
"""Names of stages that hold one."""

# A zip has times in it; this is the earliest.
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_LEFT_OUT = ("id", "study_id", "data", SEAL)


def export_study(database: Database, study_id: int, path: Path) -> int:
    """Write the study's file, and return its size in bytes.

    Leases and trials of refinements (which are Optuna's) stay behind; what refinement found, plans
    and measurements, comes along.

    Raises:
        InputError: the path is taken.
        StoreError: the database failed, or something in the study is damaged.
    """
    if path.exists():
        raise InputError(f"{path} exists; name another file or remove it")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with database.read() as session, zipfile.ZipFile(partial, "x") as archive:
            _write(session, study_id, archive)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _write(session: Session, study_id: int, archive: zipfile.ZipFile) -> None:
    study = session.get(StudyRow, study_id)
    if study is None:
        raise UnknownNameError(f"no study has id {study_id}; `autoq list` shows those there are")
    tables = _tables_of(session, study_id)
    text = canonical_json({"study": _plain(study), **tables}).encode()
    hashes = {row["sha256"] for part in ("arrays", "score_batches") for row in tables[part]}
    manifest = {
        "kind": KIND,
        "version": FILE_VERSION,
        "name": study.name,
        "study_sha256": sha256_hex(text),
        "blobs": len(hashes),
    }
    _add(archive, MANIFEST, canonical_json(manifest).encode())
    _add(archive, STUDY, text)
    batches = _score_batches(session, study_id)
    for sha256 in sorted(hashes):
        data = batches.get(sha256)
        if data is None:
            data = dict(blob_bytes(session, [sha256])).get(sha256, b"")
        _refuse_damaged(data, sha256, f"study {study.name}")
        _add(archive, f"blobs/{sha256}.npy", data)


def _tables_of(session: Session, study_id: int) -> dict[str, list[dict[str, Any]]]:
    plan_ids = select(PlanRow.id).where(PlanRow.study_id == study_id).order_by(PlanRow.id)
    numbers = {plan_id: n for n, plan_id in enumerate(session.scalars(plan_ids), start=1)}
    found: dict[str, list[dict[str, Any]]] = {}
    for part, table in TABLES.items():
        columns: Any = table
        of_study = select(table).where(columns.study_id == study_id).order_by(columns.id)
        rows = [with_plans(_plain(row), numbers) for row in session.scalars(of_study)]
        found[part] = rows
    ids = select(ExportRow.id).where(ExportRow.study_id == study_id).order_by(ExportRow.id)
    for export, export_id in zip(found["exports"], session.scalars(ids).all(), strict=True):
        files = session.scalars(select(ExportFileRow).where(ExportFileRow.export_id == export_id))
        rows = [_plain(row) for row in sorted(files, key=lambda file: file.path)]
        export["files"] = [{k: v for k, v in row.items() if k != "export_id"} for row in rows]
    for plan in found["plans"]:
        del plan["content_sha256"]  # it follows from the rest, plans' numbers included
    return found


def _plain(row: Any) -> dict[str, Any]:
    values = {
        column.name: getattr(row, column.name)
        for column in row.__table__.columns
        if column.name not in _LEFT_OUT
    }
    return {k: iso_time(v) if isinstance(v, datetime) else v for k, v in values.items()}


def with_plans(value: Any, numbers: Mapping[int, int]) -> Any:
    """The same plain data with other numbers of plans; what names no plan stays."""
    if isinstance(value, list):
        return [with_plans(item, numbers) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: with_plans(item, numbers) for key, item in value.items()}
    for key in PLAN_KEYS:
        if isinstance(changed.get(key), int):
            changed[key] = numbers.get(changed[key], changed[key])
    name = changed.get("name")
    if isinstance(name, str) and (found := PLAN_STAGE.fullmatch(name)):
        changed["name"] = f"{found[1]}{numbers.get(int(found[2]), int(found[2]))}"
    return changed


def _score_batches(session: Session, study_id: int) -> dict[str, bytes]:
    query = select(ScoreBatchRow.sha256, ScoreBatchRow.data)
    rows = session.execute(query.where(ScoreBatchRow.study_id == study_id))
    return {sha256: bytes(data) for sha256, data in rows}


def _refuse_damaged(data: bytes, sha256: str, described: str) -> None:
    if sha256_hex(data) != sha256:
        raise InputError(
            f"{described} is damaged: blob {sha256} does not match its SHA-256; `autoq store check` "
            "names what it belongs to"
        )


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _TIMESTAMP)
    entry.external_attr = 0o644 << 16
    entry.create_system = 3  # else it tells the machine that wrote it
    archive.writestr(entry, data, zipfile.ZIP_STORED)


def blob_names(names: Iterable[str]) -> set[str]:
    """The hashes that the names of a file's blobs say."""
    return {found[1] for name in names if (found := BLOB.fullmatch(name))}
