"""The tables. `migrations/versions` creates them; a change here needs a new revision there."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

from autoq.studies._encoding import finite_or_none, json_clean
from autoq.studies._seals import DamagedRowError, Sealed

# Optuna keeps an Alembic version table in this database too. Under a shared name each side
# would take the other's schema version for its own.
VERSION_TABLE = "autoq_alembic_version"

SCHEMA_REVISION = "0005"
"""The newest of the migrations; databases that have it are opened without Alembic."""

SCHEMA_VERSION = 3
"""Written into every study, so that an exported row says which layout it had."""

_SHOWN = 60  # characters of a value that cannot be read

# SQLite counts up only a column that is spelled INTEGER.
Identifier = BigInteger().with_variant(Integer(), "sqlite")


class _Guarded:
    """A column's type that says what is wrong when the bytes in it are no such value."""

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        """The type's own, with its errors as ours."""
        processor: Callable[[Any], Any] | None = super().result_processor(dialect, coltype)  # type: ignore[misc]
        return None if processor is None else _with_errors_of_ours(processor)


def _with_errors_of_ours(processor: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def process(value: Any) -> Any:
        try:
            return processor(value)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedRowError(
                f"a row is damaged: {str(value)[:_SHOWN]!r} cannot be read ({error}); "
                "`autoq store check` names it, so restore the store from a copy"
            ) from error

    return process


class UtcDateTime(_Guarded, TypeDecorator[datetime]):
    """An aware time in UTC; SQLite drops the zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a time without zone, and convert to UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"times in the store carry a time zone, got {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class FiniteDouble(_Guarded, TypeDecorator[float]):
    """A double; NaN and Inf become NULL, because databases differ in what they do with them."""

    impl = Double()
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        """NULL unless finite."""
        return finite_or_none(value)


class StrictJson(_Guarded, TypeDecorator[dict[str, Any]]):
    """Plain data as JSON that every reader accepts; see `json_clean`."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """NaN and Inf become null."""
        return json_clean(value)


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  read once, by the base class
        str: String(),
        int: BigInteger(),
        float: FiniteDouble(),
        bytes: LargeBinary(),
        datetime: UtcDateTime(),
        dict[str, Any]: StrictJson(),
    }


class StudyRow(Sealed, Base):
    """One search: what was asked, of which model, by which versions."""

    __tablename__ = "study"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    key: Mapped[str] = mapped_column(unique=True)
    status: Mapped[str]
    created: Mapped[datetime]
    updated: Mapped[datetime]
    model_path: Mapped[str]
    model_fingerprint: Mapped[str]
    architecture: Mapped[str]
    configuration: Mapped[dict[str, Any]]
    versions: Mapped[dict[str, Any]]
    seed: Mapped[int]
    schema_version: Mapped[int]


class StageRow(Sealed, Base):
    """One step of a study."""

    __tablename__ = "stage"
    __table_args__ = (UniqueConstraint("study_id", "name"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    name: Mapped[str]
    status: Mapped[str]
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]
    seconds: Mapped[float | None]
    payload: Mapped[dict[str, Any]]
    fingerprint: Mapped[str | None] = mapped_column(index=True)


class BlobRow(Base):
    """Bytes that rows refer to by their hash; equal bytes are kept once."""

    __tablename__ = "blob"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    size_bytes: Mapped[int]


class BlobChunkRow(Base):
    """A piece of a blob: no database takes values of any size."""

    __tablename__ = "blob_chunk"
    __table_args__ = (UniqueConstraint("blob_id", "position"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    blob_id: Mapped[int] = mapped_column(ForeignKey("blob.id", ondelete="CASCADE"))
    position: Mapped[int]
    data: Mapped[bytes]


class ArrayRow(Sealed, Base):
    """One named array of a stage; its npy bytes are a blob."""

    __tablename__ = "stored_array"
    __table_args__ = (UniqueConstraint("study_id", "stage", "name"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    stage: Mapped[str]
    name: Mapped[str]
    dtype: Mapped[str]
    shape: Mapped[list[int]] = mapped_column(StrictJson())
    sha256: Mapped[str] = mapped_column(ForeignKey("blob.sha256"), index=True)


class ScoreBatchRow(Sealed, Base):
    """What one batch of sequences says of every cell, as npy bytes."""

    __tablename__ = "score_batch"
    __table_args__ = (UniqueConstraint("study_id", "batch_index"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    batch_index: Mapped[int]
    data: Mapped[bytes]
    sha256: Mapped[str]
    seconds: Mapped[float]


class SensitivityRow(Sealed, Base):
    """One cell of the sensitivity table; NULL where a group cannot take the format."""

    __tablename__ = "sensitivity"
    __table_args__ = (UniqueConstraint("study_id", "group_name", "format_name"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    group_name: Mapped[str]
    format_name: Mapped[str]
    score: Mapped[float | None]
    standard_error: Mapped[float | None]


class PlanRow(Sealed, Base):
    """One solved assignment with its costs and its proof."""

    __tablename__ = "plan"
    __table_args__ = (UniqueConstraint("study_id", "content_sha256"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"))
    label: Mapped[str]
    created: Mapped[datetime]
    budget_bits: Mapped[float]
    effective_bits: Mapped[float]
    peer_effective_bits: Mapped[float]
    stored_bits_per_weight: Mapped[float]
    stored_bytes: Mapped[int]
    predicted_loss: Mapped[float | None]
    predicted_loss_low: Mapped[float | None]
    predicted_loss_high: Mapped[float | None]
    bound: Mapped[float | None]
    gap: Mapped[float | None]
    assignment: Mapped[dict[str, Any]]
    details: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    content_sha256: Mapped[str]


class MeasurementRow(Sealed, Base):
    """One number that was measured, and on what."""

    __tablename__ = "measurement"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"), index=True)
    plan_id: Mapped[int | None] = mapped_column(ForeignKey("plan.id", ondelete="CASCADE"))
    label: Mapped[str]
    metric: Mapped[str]
    value: Mapped[float | None]
    interval_low: Mapped[float | None]
    interval_high: Mapped[float | None]
    details: Mapped[dict[str, Any]]
    tokens: Mapped[int | None]
    data_sha256: Mapped[str | None]
    created: Mapped[datetime]


class ExportRow(Sealed, Base):
    """One checkpoint that was written, or was being written."""

    __tablename__ = "export"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"), index=True)
    plan_id: Mapped[int] = mapped_column(ForeignKey("plan.id", ondelete="CASCADE"))
    container: Mapped[str]
    path: Mapped[str]
    status: Mapped[str]
    bytes_written: Mapped[int | None]
    verification: Mapped[dict[str, Any]]
    started: Mapped[datetime]
    finished: Mapped[datetime | None]
    files: Mapped[list[ExportFileRow]] = relationship()  # in no order: databases sort by language


class ExportFileRow(Sealed, Base):
    """One file of a finished export."""

    __tablename__ = "export_file"
    __table_args__ = (UniqueConstraint("export_id", "path"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    export_id: Mapped[int] = mapped_column(ForeignKey("export.id", ondelete="CASCADE"))
    path: Mapped[str]
    size_bytes: Mapped[int]
    sha256: Mapped[str]


class LeaseColumns:
    """Which process holds something, and until when by each clock."""

    owner: Mapped[str]
    host: Mapped[str]
    pid_namespace: Mapped[str]
    pid: Mapped[int]
    process_started: Mapped[float]
    acquired: Mapped[datetime]
    heartbeat: Mapped[datetime]
    expires: Mapped[datetime]
    boot_id: Mapped[str | None]
    expires_uptime: Mapped[float | None]


class LeaseRow(LeaseColumns, Base):
    """Which process works on a study; no row: none."""

    __tablename__ = "lease"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.id", ondelete="CASCADE"), unique=True)


class JobRow(Base):
    """Something that the service was asked to do."""

    __tablename__ = "job"
    __table_args__ = (UniqueConstraint("created_by", "idempotency_key"),)

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    # Not a key of the study's row: a search's name is known before its study is there.
    study_name: Mapped[str | None] = mapped_column(index=True)
    request: Mapped[dict[str, Any]]
    request_sha256: Mapped[str]
    created_by: Mapped[str]
    idempotency_key: Mapped[str | None]
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    finished: Mapped[datetime | None]
    attempts: Mapped[int]
    deaths: Mapped[int]  # attempts that ended with the death of a process
    worker: Mapped[str | None]
    progress: Mapped[dict[str, Any] | None]
    problem: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]


class JobEventRow(Base):
    """Something that happened to a job."""

    __tablename__ = "job_event"
    __table_args__ = (Index(None, "job_id", "kind"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    time: Mapped[datetime]
    kind: Mapped[str]
    data: Mapped[dict[str, Any]]


class JobLeaseRow(LeaseColumns, Base):
    """Which process runs a job; no row: none."""

    __tablename__ = "job_lease"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), unique=True)


class RunnerRow(LeaseColumns, Base):
    """A process that runs jobs, or waits for some."""

    __tablename__ = "runner"

    id: Mapped[int] = mapped_column(Identifier, primary_key=True)
