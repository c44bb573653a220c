"""Stages of a study and what they leave behind: arrays, score batches, sensitivity rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import ColumnElement, delete, func, insert, select
from sqlalchemy.orm import Session

from autoq.errors import StoreError, UnknownNameError
from autoq.studies._base import SCORING_STAGE, Repository, stage_row
from autoq.studies._blobs import blob_bytes, drop_unused, put_blob
from autoq.studies._encoding import (
    MAX_VALUE_BYTES,
    decode_array,
    encode_array,
    iso_time,
    json_clean,
    sha256_hex,
    utc_now,
)
from autoq.studies._schema import ArrayRow, BlobRow, ScoreBatchRow, SensitivityRow, StageRow
from autoq.studies._seals import sealed
from autoq.studies.records import SensitivityCell, StageRecord, WorkStatus

if TYPE_CHECKING:
    from numpy.typing import NDArray

Item = TypeVar("Item")

# Few statements, and only so many encoded arrays in memory at a time, beside those that are decoded.
_ROWS_PER_STATEMENT = 256
_BYTES_PER_STATEMENT = 1 << 26


class StageRepository(Repository):
    """The stages of all studies."""

    def begin_stage(self, study_id: int, stage: str) -> StageRecord:
        """Say that the stage runs. One that was interrupted or failed keeps what it stored.

        Raises:
            StoreError: the stage is done.
        """
        with self._database.write() as session:
            study = self._open_for_results(session, study_id, stage)
            study.status = WorkStatus.RUNNING
            row = stage_row(session, study_id, stage)
            if row is None:
                row = StageRow(study_id=study_id, name=stage)
                session.add(row)
            row.status = WorkStatus.RUNNING
            row.started, row.finished, row.seconds, row.payload = utc_now(), None, None, {}
            row.fingerprint = None
            return stage_record(row)

    def finish_stage(
        self,
        study_id: int,
        stage: str,
        seconds: float,
        payload: Mapping[str, Any] | None = None,
        *,
        fingerprint: str | None = None,
        arrays: Collection[str] | None = None,
    ) -> StageRecord:
        """Say that the stage is done; from then on it refuses change.

        Args:
            fingerprint: of all that the result depends on, for others to find it by; None keeps
                it to this study.
            arrays: names of those that are part of the result: others, which served to go on with
                the stage, are dropped with that. None keeps all.
        Raises:
            StoreError: the stage does not run.
        """
        with self._database.write() as session:
            record = self._ended(
                session, study_id, stage, WorkStatus.DONE, seconds, payload or {}, fingerprint
            )
            if arrays is not None:
                _drop_others(session, study_id, stage, arrays)
            return record

    def fail_stage(self, study_id: int, stage: str, seconds: float, reason: str) -> StageRecord:
        """Say that the stage, and the study with it, failed.

        Raises:
            StoreError: the stage does not run.
        """
        payload = {"reason": reason}
        with self._database.write() as session:
            return self._ended(session, study_id, stage, WorkStatus.FAILED, seconds, payload)

    def reset_stage(self, study_id: int, stage: str) -> None:
        """Forget the stage and everything it stored; nothing happens where there is none."""
        with self._database.write() as session:
            self._touched(session, study_id)
            _delete_arrays(session, ArrayRow.study_id == study_id, ArrayRow.stage == stage)
            if stage == SCORING_STAGE:
                session.execute(delete(ScoreBatchRow).where(ScoreBatchRow.study_id == study_id))
                session.execute(delete(SensitivityRow).where(SensitivityRow.study_id == study_id))
            of_study = (StageRow.study_id == study_id, StageRow.name == stage)
            session.execute(delete(StageRow).where(*of_study))  # unread: it may be damaged

    def stage(self, study_id: int, name: str) -> StageRecord | None:
        """The stage, None before it was begun."""
        with self._database.read() as session:
            row = stage_row(session, study_id, name)
            return None if row is None else stage_record(row)

    def stages(self, study_id: int) -> list[StageRecord]:
        """The stages that were begun, in that order."""
        query = select(StageRow).where(StageRow.study_id == study_id).order_by(StageRow.id)
        with self._database.read() as session:
            return [stage_record(row) for row in session.scalars(query)]

    def put_array(self, study_id: int, stage: str, name: str, array: NDArray[Any]) -> None:
        """Store one array; the same name again replaces it.

        Raises:
            StoreError: the stage is done, or the array cannot be stored.
        """
        self.put_arrays(study_id, stage, {name: array})

    def put_arrays(self, study_id: int, stage: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store all arrays or, if anything fails, none; names that exist are replaced.

        Raises:
            StoreError: the stage is done, or an array cannot be stored.
        """
        with self._database.write() as session:
            self._open_for_results(session, study_id, stage)
            of_stage = (ArrayRow.study_id == study_id, ArrayRow.stage == stage)
            replaced: set[str] = set()
            for chunk in _in_chunks(arrays):
                old = (*of_stage, ArrayRow.name.in_(chunk))
                replaced.update(session.scalars(select(ArrayRow.sha256).where(*old)))
                session.execute(delete(ArrayRow).where(*old))
                rows = [_put(session, study_id, stage, name, arrays[name]) for name in chunk]
                session.execute(insert(ArrayRow), rows)
            drop_unused(session, replaced)

    def get_array(self, study_id: int, stage: str, name: str) -> NDArray[Any]:
        """The array, bit for bit as it was stored.

        Raises:
            UnknownNameError: there is none of that name.
            StoreError: it is damaged.
        """
        query = _arrays_of(study_id, stage).where(ArrayRow.name == name)
        with self._database.read() as session:
            row = session.scalars(query).one_or_none()
            if row is None:
                raise UnknownNameError(f"stage {stage!r} of study {study_id} has no array {name!r}")
            return _decoded(row, dict(blob_bytes(session, [row.sha256])))

    def arrays(self, study_id: int, stage: str) -> dict[str, NDArray[Any]]:
        """All arrays of the stage, in the order they were stored.

        Raises:
            StoreError: one is damaged.
        """
        query = _arrays_of(study_id, stage).add_columns(BlobRow.size_bytes)
        joined = query.outerjoin(BlobRow, BlobRow.sha256 == ArrayRow.sha256)
        found: dict[str, NDArray[Any]] = {}
        with self._database.read() as session:
            known = session.execute(joined.order_by(ArrayRow.id)).all()
            for chunk in _in_chunks(known, lambda entry: entry[1] or 0):
                blobs = dict(blob_bytes(session, [row.sha256 for row, _ in chunk]))
                found.update((row.name, _decoded(row, blobs)) for row, _ in chunk)
        return found

    def put_score_batch(
        self, study_id: int, index: int, array: NDArray[Any], seconds: float
    ) -> None:
        """Store what one batch gave; the same batch with the same bits again changes nothing.

        Raises:
            StoreError: the batch is there with other bits, or scoring is done.
        """
        data = encode_array(array, most_bytes=MAX_VALUE_BYTES)
        with self._database.write() as session:
            row = _score_batch(session, study_id, index)
            if row is not None:
                _refuse_other_bits(row, sha256_hex(data))
                return
            self._open_for_results(session, study_id, SCORING_STAGE)
            session.add(
                ScoreBatchRow(
                    study_id=study_id,
                    batch_index=index,
                    data=data,
                    sha256=sha256_hex(data),
                    seconds=seconds,
                )
            )

    def score_batches(self, study_id: int) -> dict[int, NDArray[Any]]:
        """Batch index -> what the batch gave, in the order of the index.

        Raises:
            StoreError: one is damaged.
        """
        of_study = select(ScoreBatchRow).where(ScoreBatchRow.study_id == study_id)
        with self._database.read() as session:
            rows = session.scalars(of_study.order_by(ScoreBatchRow.batch_index)).all()
        return {
            row.batch_index: decode_array(row.data, row.sha256, f"score batch {row.batch_index}")
            for row in rows
        }

    def score_seconds(self, study_id: int) -> float:
        """What scoring the stored batches took, in seconds, over all runs."""
        query = select(func.sum(ScoreBatchRow.seconds)).where(ScoreBatchRow.study_id == study_id)
        with self._database.read() as session:
            return float(session.scalar(query) or 0.0)

    def put_sensitivity(self, study_id: int, cells: Iterable[SensitivityCell]) -> None:
        """Store the sensitivity table as rows, in place of those that were there.

        Raises:
            StoreError: scoring is done.
        """
        rows = (_sensitivity_values(study_id, cell) for cell in cells)
        with self._database.write() as session:
            self._open_for_results(session, study_id, SCORING_STAGE)
            session.execute(delete(SensitivityRow).where(SensitivityRow.study_id == study_id))
            for chunk in _in_chunks(rows):
                session.execute(insert(SensitivityRow), chunk)

    def sensitivity(self, study_id: int) -> list[SensitivityCell]:
        """The sensitivity table's cells, in the order they were stored."""
        of_study = select(SensitivityRow).where(SensitivityRow.study_id == study_id)
        with self._database.read() as session:
            return [
                SensitivityCell(
                    group=row.group_name,
                    format=row.format_name,
                    score=row.score,
                    standard_error=row.standard_error,
                )
                for row in session.scalars(of_study.order_by(SensitivityRow.id))
            ]

    def _ended(
        self,
        session: Session,
        study_id: int,
        stage: str,
        status: WorkStatus,
        seconds: float,
        payload: Mapping[str, Any],
        fingerprint: str | None = None,
    ) -> StageRecord:
        study = self._touched(session, study_id)
        row = stage_row(session, study_id, stage)
        if row is None or row.status != WorkStatus.RUNNING:
            state = "was not begun" if row is None else f"is {row.status}"
            raise StoreError(
                f"only a running stage ends, and {stage!r} of study {study.name!r} {state}; "
                "begin the stage first"
            )
        if status == WorkStatus.FAILED:
            study.status = WorkStatus.FAILED
        row.status, row.finished, row.seconds = status, utc_now(), float(seconds)
        row.payload, row.fingerprint = json_clean(payload), fingerprint
        return stage_record(row)


def stage_record(row: StageRow) -> StageRecord:
    """A snapshot of the row."""
    return StageRecord(
        study_id=row.study_id,
        name=row.name,
        status=WorkStatus(row.status),
        started=None if row.started is None else iso_time(row.started),
        finished=None if row.finished is None else iso_time(row.finished),
        seconds=row.seconds,
        payload=row.payload,
    )


def _arrays_of(study_id: int, stage: str) -> Any:
    return select(ArrayRow).where(ArrayRow.study_id == study_id, ArrayRow.stage == stage)


def _put(
    session: Session, study_id: int, stage: str, name: str, given: NDArray[Any]
) -> dict[str, object]:
    """Keep the array's bytes, and return its row."""
    import numpy as np

    array = np.asarray(given)
    values = {
        "study_id": study_id,
        "stage": stage,
        "name": name,
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "sha256": put_blob(session, encode_array(array)),
    }
    return sealed(ArrayRow, values)


def _delete_arrays(session: Session, *which: ColumnElement[bool]) -> None:
    """Remove arrays, and their bytes where no other row refers to them."""
    hashes = session.scalars(select(ArrayRow.sha256).where(*which)).all()
    session.execute(delete(ArrayRow).where(*which))
    drop_unused(session, hashes)


def _drop_others(session: Session, study_id: int, stage: str, kept: Collection[str]) -> None:
    """Remove the stage's arrays of other names."""
    of_stage = (ArrayRow.study_id == study_id, ArrayRow.stage == stage)
    names = session.scalars(select(ArrayRow.name).where(*of_stage)).all()
    for chunk in _in_chunks(name for name in names if name not in kept):
        _delete_arrays(session, *of_stage, ArrayRow.name.in_(chunk))


def _decoded(row: ArrayRow, blobs: Mapping[str, bytes]) -> NDArray[Any]:
    described = f"array {row.name!r} of stage {row.stage!r} of study {row.study_id}"
    return decode_array(blobs.get(row.sha256, b""), row.sha256, described)


def _score_batch(session: Session, study_id: int, index: int) -> ScoreBatchRow | None:
    of_study = select(ScoreBatchRow).where(ScoreBatchRow.study_id == study_id)
    return session.scalars(of_study.where(ScoreBatchRow.batch_index == index)).one_or_none()


def _refuse_other_bits(row: ScoreBatchRow, sha256: str) -> None:
    if row.sha256 != sha256:
        raise StoreError(
            f"a score batch never changes, and batch {row.batch_index} of study {row.study_id} is "
            "stored with other values; reset the stage to score anew, or run on the machine and "
            "versions that began the study"
        )


def _sensitivity_values(study_id: int, cell: SensitivityCell) -> dict[str, object]:
    values = {
        "study_id": study_id,
        "group_name": cell.group,
        "format_name": cell.format,
        "score": cell.score,
        "standard_error": cell.standard_error,
    }
    return sealed(SensitivityRow, values)


def _in_chunks(
    items: Iterable[Item], bytes_of: Callable[[Item], int] = lambda item: 0
) -> Iterator[list[Item]]:
    """Lists of as many items as one statement takes; one that is too large stands alone."""
    chunk: list[Item] = []
    taken = 0
    for item in items:
        size = bytes_of(item)
        if chunk and (len(chunk) == _ROWS_PER_STATEMENT or taken + size > _BYTES_PER_STATEMENT):
            yield chunk
            chunk, taken = [], 0
        chunk.append(item)
        taken += size
    if chunk:
        yield chunk
