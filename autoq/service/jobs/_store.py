"""The study store as a job opens it: it tells what a search writes into it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self

from autoq.errors import StudyLockedError
from autoq.service.jobs._speech import Speech
from autoq.studies import (
    LEASE_SECONDS,
    StageRecord,
    StudyLease,
    StudyRecord,
    StudyStore,
    WorkStatus,
)
from autoq.wire import EventKind

PATIENCE_SECONDS = 7 * 86_400.0
"""How long a job waits for another process on its study, such as somebody's command line."""


class TellingStore(StudyStore):
    """Says the study's name as soon as there is one, and when stages begin and end.

    So the search itself knows nothing of jobs. A study that another process works on is waited for.
    """

    _speech: Speech

    @classmethod
    def telling(cls, url: str, speech: Speech) -> Self:
        """Open the store.

        Raises:
            StoreError: as `StudyStore.open`.
        """
        store = cls.open(url)
        store._speech = speech
        return store

    def create_or_get(self, **arguments: Any) -> StudyRecord:
        """See `StudyStore.create_or_get`."""
        record = super().create_or_get(**arguments)
        self._speech.study(record.name)
        return record

    def begin_stage(self, study_id: int, stage: str) -> StageRecord:
        """See `StudyStore.begin_stage`."""
        record = super().begin_stage(study_id, stage)
        self._speech.event(EventKind.STAGE, name=stage, status=WorkStatus.RUNNING, seconds=None)
        return record

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
        """See `StudyStore.finish_stage`."""
        record = super().finish_stage(
            study_id, stage, seconds, payload, fingerprint=fingerprint, arrays=arrays
        )
        self._speech.event(EventKind.STAGE, name=stage, status=WorkStatus.DONE, seconds=seconds)
        return record

    def fail_stage(self, study_id: int, stage: str, seconds: float, reason: str) -> StageRecord:
        """See `StudyStore.fail_stage`."""
        record = super().fail_stage(study_id, stage, seconds, reason)
        self._speech.event(EventKind.STAGE, name=stage, status=WorkStatus.FAILED, seconds=seconds)
        return record

    def lease(
        self, study_id: int, *, wait_seconds: float = 0.0, lease_seconds: float = LEASE_SECONDS
    ) -> StudyLease:
        """See `StudyStore.lease`; it waits, and says for whom."""
        try:
            with super().lease(study_id):
                pass
        except StudyLockedError as error:
            self._speech.event(EventKind.NOTE, text=f"waiting: {error}")
        return super().lease(
            study_id,
            wait_seconds=max(wait_seconds, PATIENCE_SECONDS),
            lease_seconds=lease_seconds,
        )
