"""A study's portable file, from anybody: checked whole before a row is written."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import DateTime, Integer, select
from sqlalchemy.orm import Session

from autoq.errors import InputError
from autoq.studies._blobs import put_blob
from autoq.studies._database import Database
from autoq.studies._encoding import PLAIN_DTYPE_KINDS, canonical_json, sha256_hex
from autoq.studies._portable import (
    FILE_VERSION,
    KIND,
    MANIFEST,
    STUDY,
    TABLES,
    blob_names,
    with_plans,
)
from autoq.studies._results import plan_content
from autoq.studies._schema import (
    SCHEMA_VERSION,
    ArrayRow,
    ExportFileRow,
    ExportRow,
    MeasurementRow,
    PlanRow,
    ScoreBatchRow,
    SensitivityRow,
    StageRow,
    StrictJson,
    StudyRow,
)
from autoq.studies._seals import SEAL
from autoq.studies._studies import check_name, refuse_taken_name
from autoq.studies.records import ExportStatus, WorkStatus

MOST_JSON_BYTES = 1 << 30
MOST_BLOB_BYTES = 1 << 36
_SHOWN = 100  # characters of what a file says


def import_study(database: Database, path: Path, name: str | None = None) -> str:
    """Put the study of a portable file into the store, whole or not at all; return its name.

    Args:
        name: another than the file says.
    Raises:
        InputError: not such a file, damaged, of a newer version, or the store has the study or its
            name already.
        StoreError: the database failed.
    """
    with _opened(path) as archive:
        document = _checked_document(archive, path)
        with _as_input_error(path):
            chosen = name or str(document["study"]["name"])
        check_name(chosen)
        with database.write() as session:
            _refuse_known(session, document["study"])
            refuse_taken_name(session, chosen)
            with _as_input_error(path):
                _insert(session, archive, document, chosen, path)
    return chosen


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} must be a file that `autoq store export` wrote, and cannot be read: {error}"
        ) from error
    with archive:
        yield archive


def _checked_document(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    """What `study.json` says, once names, sizes, version and hash are known to be right."""
    names = [entry.filename for entry in archive.infolist()]
    _expect({MANIFEST, STUDY} <= set(names), path, f"it has no {MANIFEST} and {STUDY}")
    _expect(len(set(names)) == len(names), path, "a name is in it twice")
    hashes = blob_names(names)
    odd = set(names) - {MANIFEST, STUDY} - {f"blobs/{sha256}.npy" for sha256 in hashes}
    _expect(not odd, path, f"it holds {sorted(odd)[:1]}, which is no part of a study")
    for entry in archive.infolist():
        is_plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        _expect(is_plain, path, f"{entry.filename} is compressed or encrypted")
        most = MOST_JSON_BYTES if entry.filename in (MANIFEST, STUDY) else MOST_BLOB_BYTES
        _expect(entry.file_size <= most, path, f"{entry.filename} is larger than {most} bytes")
    manifest = _json(archive, MANIFEST, path)
    _expect(manifest.get("kind") == KIND, path, f"it is not an {KIND}")
    version = manifest.get("version")
    if version != FILE_VERSION:
        raise InputError(
            f"{path} is of version {str(version)[:_SHOWN]!r}, and this version of autoq reads "
            f"{FILE_VERSION}; upgrade autoq"
        )
    text = _bytes(archive, STUDY, path)
    _expect(sha256_hex(text) == manifest.get("study_sha256"), path, f"{STUDY} is damaged")
    document = _json(archive, STUDY, path)
    parts = {"study", *TABLES}
    _expect(set(document) == parts, path, f"its parts must be {', '.join(sorted(parts))}")
    with _as_input_error(path):
        used = {row["sha256"] for part in ("arrays", "score_batches") for row in document[part]}
    _expect(used == hashes, path, "its blobs are not those that its arrays name")
    return document


def _insert(
    session: Session,
    archive: zipfile.ZipFile,
    document: Mapping[str, Any],
    name: str,
    path: Path,
) -> None:
    study = StudyRow(**{**_values(StudyRow, document["study"]), "name": name})
    WorkStatus(study.status)
    study.schema_version = SCHEMA_VERSION
    session.add(study)
    session.flush()
    _refuse_unknown_plans(document)
    numbers: dict[int, int] = {}
    for number, entry in enumerate(document["plans"], start=1):
        values = _values(PlanRow, with_plans(entry, numbers))
        plan = PlanRow(study_id=study.id, **values)
        plan.content_sha256 = sha256_hex(canonical_json(plan_content(values)).encode())
        session.add(plan)
        session.flush()
        numbers[number] = plan.id
    for entry in document["stages"]:
        values = _values(StageRow, with_plans(entry, numbers))
        WorkStatus(values["status"])
        session.add(StageRow(study_id=study.id, **values))
        session.flush()
    for entry in document["arrays"]:
        values = _values(ArrayRow, entry)
        data, dtype, shape = _blob(archive, values["sha256"], path)
        if (values["dtype"], values["shape"]) != (dtype, shape):
            raise ValueError(f"array {values['name']} is not the array that its blob holds")
        put_blob(session, data)
        session.add(ArrayRow(study_id=study.id, **values))
        session.flush()
    for entry in document["score_batches"]:
        data, _, _ = _blob(archive, entry["sha256"], path)
        session.add(ScoreBatchRow(study_id=study.id, data=data, **_values(ScoreBatchRow, entry)))
    session.add_all(
        SensitivityRow(study_id=study.id, **_values(SensitivityRow, entry))
        for entry in document["sensitivity"]
    )
    for entry in document["measurements"]:
        values = _values(MeasurementRow, with_plans(entry, numbers))
        session.add(MeasurementRow(study_id=study.id, **values))
        session.flush()
    for entry in document["exports"]:
        _insert_export(session, study.id, with_plans(entry, numbers))
    session.flush()


def _insert_export(session: Session, study_id: int, entry: Mapping[str, Any]) -> None:
    files = entry["files"]
    values = _values(ExportRow, {k: v for k, v in entry.items() if k != "files"})
    ExportStatus(values["status"])
    row = ExportRow(study_id=study_id, **values)
    row.files = [ExportFileRow(**_values(ExportFileRow, file)) for file in files]
    session.add(row)
    session.flush()


_NOT_IN_FILE = {"id", "study_id", "export_id", "data", "content_sha256", SEAL}


def _values(table: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A row's columns, all of them and no others, times read.

    Raises:
        ValueError, TypeError: something is missing, too much, or of another type.
    """
    columns = [column for column in table.__table__.columns if column.name not in _NOT_IN_FILE]
    if not isinstance(entry, Mapping) or set(entry) != {column.name for column in columns}:
        raise ValueError(f"a row of {table.__tablename__} has other columns")
    return {column.name: _value(column, entry[column.name]) for column in columns}


def _value(column: Any, value: Any) -> Any:
    if value is None:
        if not column.nullable:
            raise ValueError(f"{column.name} is missing")
        return None
    kind = getattr(column.type, "impl_instance", column.type)
    if isinstance(kind, DateTime):
        return _time(column.name, value)
    if isinstance(column.type, StrictJson):
        return _plain_data(column, value)
    expected: Any = kind.python_type
    if expected is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, expected) or isinstance(value, bool):
        raise TypeError(f"{column.name} must be a {expected.__name__}")
    if expected is float and not math.isfinite(value):
        raise ValueError(f"{column.name} is not finite")
    if isinstance(kind, Integer) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{column.name} is out of range")
    return value


def _time(name: str, value: Any) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"{name} has no time zone")
    return moment.astimezone(UTC)


def _plain_data(column: Any, value: Any) -> Any:
    expected = list if column.name == "shape" else dict
    if not isinstance(value, expected):
        raise TypeError(f"{column.name} must be {'a list' if expected is list else 'an object'}")
    return value


def _refuse_unknown_plans(document: Mapping[str, Any]) -> None:
    """In the store, the number of no plan of this study may be that of another's."""
    known = range(1, len(document["plans"]) + 1)
    for entry in (*document["measurements"], *document["exports"]):
        number = entry["plan_id"]
        if number is not None and number not in known:
            raise ValueError(f"there is no plan {number}")


def _blob(archive: zipfile.ZipFile, sha256: str, path: Path) -> tuple[bytes, str, list[int]]:
    """An array's npy bytes, its dtype and its shape; no more is allocated than the file has bytes."""
    data = _bytes(archive, f"blobs/{sha256}.npy", path)
    _expect(sha256_hex(data) == sha256, path, f"blob {sha256} does not match its SHA-256")
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    held = len(data) - file.tell()
    is_plain = dtype.kind in PLAIN_DTYPE_KINDS
    _expect(
        is_plain and math.prod(shape) * dtype.itemsize == held, path, f"blob {sha256} is no array"
    )
    return data, dtype.str, list(shape)


def _bytes(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    try:
        return archive.read(name)
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise InputError(f"{path} is damaged: {name} cannot be read: {error}") from error


def _json(archive: zipfile.ZipFile, name: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_bytes(archive, name, path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {name} is not JSON ({error})") from error
    _expect(isinstance(value, dict), path, f"{name} must hold an object")
    return dict(value)


@contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{path} holds no study: its parts are nested too deeply") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        line = " ".join(str(error).split())[:_SHOWN]
        raise InputError(
            f"{path} does not hold a study as this version of autoq writes it: {line}"
        ) from error


def _refuse_known(session: Session, study: Any) -> None:
    key = study.get("key") if isinstance(study, dict) else None
    query = select(StudyRow.name).where(StudyRow.key == str(key))
    known = session.scalars(query).first()
    if known is not None:
        raise InputError(
            f"the store has this study already, as {known!r}; what it has since found stays, "
            "so import into another store"
        )


def _expect(holds: bool, path: Path, fault: str) -> None:
    if not holds:
        raise InputError(
            f"{path} must be a file that `autoq store export` wrote, and {fault}; export it again"
        )
