"""What a study leads to: plans, measurements, exports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from autoq.errors import StoreError, UnknownNameError
from autoq.studies._base import Repository
from autoq.studies._encoding import (
    canonical_json,
    iso_time,
    json_clean,
    sha256_hex,
    utc_now,
)
from autoq.studies._schema import ExportFileRow, ExportRow, MeasurementRow, PlanRow
from autoq.studies._seals import SEAL
from autoq.studies.records import (
    ExportFile,
    ExportRecord,
    ExportStatus,
    MeasurementRecord,
    PlanRecord,
)

if TYPE_CHECKING:
    from autoq.search import Plan


class ResultRepository(Repository):
    """Plans, measurements and exports of all studies."""

    def add_plan(
        self,
        study_id: int,
        plan: Plan,
        *,
        label: str,
        details: Mapping[str, Any] | None = None,
    ) -> int:
        """Store a plan and return its id; the same plan under the same label keeps its id.

        Args:
            details: plain data to keep beside the plan's own budgets and what it takes.
        """
        values = _plan_values(plan, label, details or {})
        content_sha256 = sha256_hex(canonical_json(values).encode())
        with self._database.write() as session:
            self._touched(session, study_id)
            query = select(PlanRow).where(PlanRow.study_id == study_id)
            row = session.scalars(query.where(PlanRow.content_sha256 == content_sha256)).first()
            if row is None:
                row = PlanRow(study_id=study_id, created=utc_now(), **{"details": {}, **values})
                row.content_sha256 = content_sha256
                session.add(row)
                session.flush()
            return row.id

    def plan(self, plan_id: int) -> PlanRecord:
        """The plan with this id.

        Raises:
            UnknownNameError: there is none.
        """
        with self._database.read() as session:
            row = session.get(PlanRow, plan_id)
        if row is None:
            raise UnknownNameError(f"no plan has id {plan_id}; `autoq show` lists a study's plans")
        return _plan_record(row)

    def plans(self, study_id: int) -> list[PlanRecord]:
        """The study's plans, oldest first."""
        query = select(PlanRow).where(PlanRow.study_id == study_id).order_by(PlanRow.id)
        with self._database.read() as session:
            return [_plan_record(row) for row in session.scalars(query)]

    def add_measurement(
        self,
        study_id: int,
        *,
        label: str,
        metric: str,
        value: float,
        plan_id: int | None = None,
        interval: tuple[float, float] | None = None,
        details: Mapping[str, Any] | None = None,
        tokens: int | None = None,
        data_sha256: str | None = None,
    ) -> int:
        """Store a measured number and return its id.

        Measuring the same again (same plan, label, metric and data) replaces the number.
        """
        return self.add_measurements(
            study_id,
            {metric: (value, interval)},
            label=label,
            plan_id=plan_id,
            details=details,
            tokens=tokens,
            data_sha256=data_sha256,
        )[0]

    def add_measurements(
        self,
        study_id: int,
        values: Mapping[str, tuple[float, tuple[float, float] | None]],
        *,
        label: str,
        plan_id: int | None = None,
        details: Mapping[str, Any] | None = None,
        details_by_metric: Mapping[str, Mapping[str, Any]] | None = None,
        tokens: int | None = None,
        data_sha256: str | None = None,
    ) -> list[int]:
        """Store all metrics of one run, or none, as (value, interval); return their ids.

        Other arguments are those of `add_measurement`; `details_by_metric` is what only one
        metric has, such as its values per sequence.
        """
        run = {"plan_id": plan_id, "label": label, "data_sha256": data_sha256}
        ids = []
        with self._database.write() as session:
            self._touched(session, study_id)
            for metric, (value, interval) in values.items():
                row = _measurement_like(session, study_id, {**run, "metric": metric})
                row.value = value
                row.interval_low, row.interval_high = interval or (None, None)
                own = (details_by_metric or {}).get(metric, {})
                row.details = json_clean({**(details or {}), **own})
                row.tokens, row.created = tokens, utc_now()
                session.flush()
                ids.append(row.id)
        return ids

    def measurements(self, study_id: int) -> list[MeasurementRecord]:
        """The study's measurements, oldest first."""
        of_study = select(MeasurementRow).where(MeasurementRow.study_id == study_id)
        with self._database.read() as session:
            rows = session.scalars(of_study.order_by(MeasurementRow.id))
            return [_measurement_record(row) for row in rows]

    def begin_export(self, study_id: int, *, plan_id: int, container: str, path: str) -> int:
        """Say that a checkpoint is being written, and return the export's id.

        An earlier export to the same path that never ended counts as failed from now on.
        """
        with self._database.write() as session:
            self._touched(session, study_id)
            _fail_interrupted_exports(session, study_id, str(path))
            row = ExportRow(
                study_id=study_id,
                plan_id=plan_id,
                container=container,
                path=str(path),
                status=ExportStatus.WRITING,
                verification={},
                started=utc_now(),
            )
            session.add(row)
            session.flush()
            return row.id

    def prepare_export(
        self,
        export_id: int,
        *,
        files: Iterable[tuple[str, int, str]],
        verification: Mapping[str, Any],
    ) -> None:
        """Say what the checkpoint will be, before its folder gets its name.

        A process that is killed between that and `finish_export` leaves a folder that the next one
        knows by these hashes; see `unfinished_exports`.

        Raises:
            StoreError: the export is not being written.
        """
        with self._database.write() as session:
            row = self._export_in_progress(session, export_id)
            row.files = _file_rows(files)
            row.verification = json_clean(verification)

    def unfinished_exports(self, path: str) -> list[ExportRecord]:
        """Exports of all studies to that path that were prepared and not finished, oldest first."""
        query = select(ExportRow).filter_by(path=path, status=str(ExportStatus.WRITING))
        with self._database.read() as session:
            rows = session.scalars(query.order_by(ExportRow.id))
            return [_export_record(row) for row in rows if row.files]

    def finish_export(
        self,
        export_id: int,
        *,
        files: Iterable[tuple[str, int, str]],
        verification: Mapping[str, Any],
    ) -> ExportRecord:
        """Say that the checkpoint is complete: its files as (relative path, bytes, SHA-256).

        Raises:
            StoreError: the export is not being written.
        """
        with self._database.write() as session:
            row = self._export_in_progress(session, export_id)
            if row.files:  # it was prepared
                session.execute(delete(ExportFileRow).where(ExportFileRow.export_id == row.id))
                session.expire(row, ["files"])
            row.files = _file_rows(files)
            row.bytes_written = sum(file.size_bytes for file in row.files)
            row.status, row.finished = ExportStatus.COMPLETE, utc_now()
            row.verification = json_clean(verification)
            return _export_record(row)

    def fail_export(self, export_id: int, reason: str) -> ExportRecord:
        """Say that the checkpoint could not be written.

        Raises:
            StoreError: the export is not being written.
        """
        with self._database.write() as session:
            row = self._export_in_progress(session, export_id)
            _fail(row, reason)
            return _export_record(row)

    def exports(self, study_id: int) -> list[ExportRecord]:
        """The study's exports with their files, oldest first."""
        query = select(ExportRow).where(ExportRow.study_id == study_id).order_by(ExportRow.id)
        with self._database.read() as session:
            return [_export_record(row) for row in session.scalars(query)]

    def _export_in_progress(self, session: Session, export_id: int) -> ExportRow:
        study_id = session.scalar(select(ExportRow.study_id).where(ExportRow.id == export_id))
        if study_id is None:
            raise UnknownNameError(f"no export has id {export_id}; begin the export first")
        self._touched(session, study_id)  # locks the study first, or two would seal half a row each
        row = session.get_one(ExportRow, export_id)
        if row.status != ExportStatus.WRITING:
            raise StoreError(
                f"only an export that is being written ends, and export {export_id} to "
                f"{row.path} is {row.status}; begin a new one"
            )
        return row


def _plan_values(plan: Plan, label: str, more: Mapping[str, Any]) -> dict[str, Any]:
    low, high = plan.predicted_loss_interval
    values = {
        "label": label,
        "budget_bits": plan.budget_bits,
        "effective_bits": plan.effective_bits,
        "peer_effective_bits": plan.peer_effective_bits,
        "stored_bits_per_weight": plan.stored_bits_per_weight,
        "stored_bytes": plan.stored_bytes,
        "predicted_loss": plan.predicted_loss,
        "predicted_loss_low": low,
        "predicted_loss_high": high,
        "bound": plan.bound,
        "gap": plan.gap,
        "assignment": plan.assignment,
    }
    cleaned = {name: json_clean(value) for name, value in values.items()}
    details = {**_plan_details(plan), **more}
    return plan_content({**cleaned, "details": json_clean(details)})


def plan_content(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan's hash is of: its columns, without times, and without details where it has none."""
    return {
        name: value
        for name, value in values.items()
        if name not in ("created", "content_sha256", SEAL) and (name != "details" or value)
    }


def is_plan_as_written(row: PlanRow) -> bool:
    """Whether the row is what its hash was made of."""
    columns = [column.key for column in PlanRow.__table__.columns]
    read = {name: getattr(row, name) for name in columns if name not in ("id", "study_id")}
    # A column of doubles gives 6.0 where the hash may have been made of 6.
    whole = [name for name in _MAY_BE_WHOLE if float(read[name] or 0).is_integer()]
    for exchanged in chain.from_iterable(combinations(whole, n) for n in range(len(whole) + 1)):
        values = {**read, **{name: read[name] and int(read[name]) for name in exchanged}}
        content = canonical_json(plan_content(values))
        if sha256_hex(content.encode()) == row.content_sha256:
            return True
    return False


_MAY_BE_WHOLE = (
    "budget_bits",
    "effective_bits",
    "peer_effective_bits",
    "stored_bits_per_weight",
    "predicted_loss",
    "predicted_loss_low",
    "predicted_loss_high",
    "bound",
    "gap",
)


def _plan_details(plan: Plan) -> dict[str, Any]:
    """What columns cannot hold; empty for plans with nothing of the kind."""
    details: dict[str, Any] = {}
    if plan.budgets:
        details["budgets"] = [asdict(budget) for budget in plan.budgets]
    if plan.takes:
        details["takes"] = dict(plan.takes)
    if plan.least is not None:
        details["least"] = asdict(plan.least)
    return details


def _plan_record(row: PlanRow) -> PlanRecord:
    return PlanRecord(
        id=row.id,
        study_id=row.study_id,
        label=row.label,
        created=iso_time(row.created),
        budget_bits=row.budget_bits,
        effective_bits=row.effective_bits,
        peer_effective_bits=row.peer_effective_bits,
        stored_bits_per_weight=row.stored_bits_per_weight,
        stored_bytes=row.stored_bytes,
        predicted_loss=row.predicted_loss,
        predicted_loss_interval=(row.predicted_loss_low, row.predicted_loss_high),
        bound=row.bound,
        gap=row.gap,
        assignment=row.assignment,
        details=row.details,
    )


def _measurement_like(
    session: Session, study_id: int, identity: Mapping[str, object]
) -> MeasurementRow:
    query = select(MeasurementRow).filter_by(study_id=study_id, **identity)
    row = session.scalars(query).first()
    if row is None:
        row = MeasurementRow(study_id=study_id, **identity)
        session.add(row)
    return row


def _measurement_record(row: MeasurementRow) -> MeasurementRecord:
    interval = None
    if row.interval_low is not None and row.interval_high is not None:
        interval = (row.interval_low, row.interval_high)
    return MeasurementRecord(
        id=row.id,
        study_id=row.study_id,
        plan_id=row.plan_id,
        label=row.label,
        metric=row.metric,
        value=row.value,
        interval=interval,
        details=row.details,
        tokens=row.tokens,
        data_sha256=row.data_sha256,
        created=iso_time(row.created),
    )


def _file_rows(files: Iterable[tuple[str, int, str]]) -> list[ExportFileRow]:
    return [
        ExportFileRow(path=path, size_bytes=size, sha256=sha256)
        for path, size, sha256 in sorted(files)
    ]


def _fail_interrupted_exports(session: Session, study_id: int, path: str) -> None:
    query = select(ExportRow).filter_by(
        study_id=study_id, path=path, status=str(ExportStatus.WRITING)
    )
    for row in session.scalars(query):
        _fail(row, "interrupted before it was complete")


def _fail(row: ExportRow, reason: str) -> None:
    row.status, row.finished = ExportStatus.FAILED, utc_now()
    row.verification = {"reason": reason}


def _export_record(row: ExportRow) -> ExportRecord:
    return ExportRecord(
        id=row.id,
        study_id=row.study_id,
        plan_id=row.plan_id,
        container=row.container,
        path=row.path,
        status=ExportStatus(row.status),
        bytes_written=row.bytes_written,
        verification=row.verification,
        started=iso_time(row.started),
        finished=None if row.finished is None else iso_time(row.finished),
        files=tuple(
            ExportFile(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in sorted(row.files, key=lambda file: file.path)
        ),
    )
