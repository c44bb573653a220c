"""Results by what they depend on, and arrays that one study takes over from another."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from autoq.errors import StoreError
from autoq.studies._base import Repository
from autoq.studies._blobs import blob_bytes
from autoq.studies._encoding import sha256_hex
from autoq.studies._schema import ArrayRow, StageRow, StudyRow
from autoq.studies._seals import DamagedRowError, sealed
from autoq.studies._stages import stage_record
from autoq.studies.records import StageRecord, WorkStatus

_BLOBS_AT_A_TIME = 16


class ReuseRepository(Repository):
    """Finished stages by fingerprint."""

    def results(self, stage: str, fingerprint: str) -> list[StageRecord]:
        """The finished stages of that name and fingerprint, of all studies, oldest first.

        Those whose rows are damaged are left out: they are another study's trouble.
        """
        query = select(StageRow.id).where(
            StageRow.name == stage,
            StageRow.fingerprint == fingerprint,
            StageRow.status == WorkStatus.DONE,
        )
        with self._database.read() as session:
            ids = session.scalars(query.order_by(StageRow.id)).all()
            found = (_intact_stage(session, stage_id) for stage_id in ids)
            return [stage for stage in found if stage is not None]

    def copy_arrays(
        self, source_id: int, study_id: int, stage: str, is_wanted: Callable[[str], bool]
    ) -> None:
        """Give a study's stage arrays of another study's; their bytes are verified, and kept once.

        Args:
            source_id: the study that has them.
            study_id: the study that gets them, in place of those that had their names.
            is_wanted: name of an array -> whether to copy it.
        Raises:
            StoreError: the stage is done, or an array is damaged, or the other study was removed in
                the meantime; nothing was copied.
        """
        with self._database.write() as session:
            self._open_for_results(session, study_id, stage)
            source = select(StudyRow.id).where(StudyRow.id == source_id)
            if session.scalar(source.with_for_update(read=True, key_share=True)) is None:
                raise StoreError("it was removed in the meantime")
            of_source = (ArrayRow.study_id == source_id, ArrayRow.stage == stage)
            found = session.scalars(select(ArrayRow).where(*of_source).order_by(ArrayRow.id))
            rows = [row for row in found if is_wanted(row.name)]
            hashes = sorted({row.sha256 for row in rows})
            for start in range(0, len(hashes), _BLOBS_AT_A_TIME):
                part = hashes[start : start + _BLOBS_AT_A_TIME]
                intact = {
                    sha256
                    for sha256, data in blob_bytes(session, part)
                    if sha256_hex(data) == sha256
                }
                damaged = [row.name for row in rows if row.sha256 in set(part) - intact]
                if damaged:
                    raise StoreError(f"its array {damaged[0]!r} is damaged")
            for row in rows:
                session.execute(
                    delete(ArrayRow).where(
                        ArrayRow.study_id == study_id,
                        ArrayRow.stage == stage,
                        ArrayRow.name == row.name,
                    )
                )
                values = {
                    "study_id": study_id,
                    "stage": stage,
                    "name": row.name,
                    "dtype": row.dtype,
                    "shape": row.shape,
                    "sha256": row.sha256,
                }
                session.execute(insert(ArrayRow), [sealed(ArrayRow, values)])


def _intact_stage(session: Session, stage_id: int) -> StageRecord | None:
    try:
        row = session.get(StageRow, stage_id)
    except DamagedRowError:
        return None
    return None if row is None else stage_record(row)
