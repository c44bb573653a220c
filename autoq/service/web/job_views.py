"""Jobs and their events, as the service shows them."""

from __future__ import annotations

from collections.abc import Sequence

from autoq.service.pagination import decode_cursor, encode_cursor
from autoq.service.problems import shown, without_folders
from autoq.service.web.events import Topic
from autoq.studies import JobEventRecord, JobRecord, StudyStore
from autoq.wire import Event, EventKind, Job, JobKind, JobPage, JobProgress, JobStatus, Problem

_LISTED = "jobs"
_LOG_PAGE = 1_000


def job_view(record: JobRecord) -> Job:
    """A job without what only its runner needs."""
    return Job(
        id=record.id,
        kind=JobKind(record.kind),
        status=JobStatus(record.status.value),
        study=record.study,
        request=record.request,
        created=record.created,
        started=record.started,
        finished=record.finished,
        attempts=record.attempts,
        worker=record.worker,
        progress=None if record.progress is None else JobProgress(**record.progress),
        problem=None if record.problem is None else Problem(**shown(record.problem)),
        result=None if record.result is None else shown(record.result),
    )


def event_view(record: JobEventRecord) -> Event:
    """An event without the folders of this machine."""
    return Event(
        id=record.id,
        job=record.job,
        time=record.time,
        kind=EventKind(record.kind),
        data=shown(record.data),
    )


def job_page(
    store: StudyStore,
    limit: int,
    cursor: str | None,
    *,
    status: JobStatus | None,
    study: str | None,
    kind: JobKind | None,
) -> JobPage:
    """Jobs, the newest first.

    Raises:
        InputError: no page ever gave the cursor.
    """
    before = None if cursor is None else decode_cursor(_LISTED, cursor, int)[0]
    records = store.jobs(limit=limit + 1, before=before, status=status, study=study, kind=kind)
    page, rest = records[:limit], records[limit:]
    return JobPage(
        items=tuple(job_view(record) for record in page),
        next_cursor=encode_cursor(_LISTED, page[-1].number) if rest else None,
    )


def job_log(store: StudyStore, job: str) -> str:
    """What the job's process printed, as far as it is kept.

    Raises:
        UnknownNameError: there is no such job.
    """
    store.job(job)
    lines: list[str] = []
    after = 0
    while records := store.events_after(after, job=job, kind=EventKind.LOG, limit=_LOG_PAGE):
        lines.extend(without_folders(str(record.data.get("text", ""))) for record in records)
        after = records[-1].id
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


class StoreEvents:
    """Events of a store, for who listens."""

    def __init__(self, store: StudyStore) -> None:
        self._store = store

    def events_after(self, topic: Topic, after: int, limit: int) -> Sequence[Event]:
        """See `EventSource`."""
        records = self._store.events_after(after, job=topic.job, study=topic.study, limit=limit)
        return [event_view(record) for record in records]

    def newest_event(self) -> int:
        """See `EventSource`."""
        return self._store.newest_event()

    def has_ended(self, topic: Topic) -> bool:
        """See `EventSource`; a study may always have another job."""
        return topic.job is not None and self._store.job(topic.job).status.is_ended
