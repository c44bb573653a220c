"""Jobs: looked at, cancelled, queued again, listened to."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import PlainTextResponse, Response

from autoq.service.pagination import STORABLE, Cursor, Limit
from autoq.service.replies import not_found, problem_responses, reply
from autoq.service.web.access import CanRead, CanRun
from autoq.service.web.context import InContext
from autoq.service.web.events import Topic
from autoq.service.web.job_views import job_log, job_page, job_view
from autoq.service.web.streams import EVENT_RESPONSES, After, LastEventId, stream
from autoq.wire import Job, JobKind, JobPage, JobStatus

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=problem_responses(404))

JobId = Annotated[str, Path(min_length=1, max_length=64, pattern=STORABLE)]

_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("", response_model=JobPage, dependencies=[CanRead])
def list_jobs(
    context: InContext,
    limit: Limit = 50,
    cursor: Cursor = None,
    status: JobStatus | None = None,
    study: Annotated[str | None, Query(max_length=200, pattern=STORABLE)] = None,
    kind: JobKind | None = None,
) -> Response:
    """Jobs, the newest first."""
    return reply(job_page(context.store, limit, cursor, status=status, study=study, kind=kind))


@router.get("/{job}", response_model=Job, dependencies=[CanRead])
def show_job(context: InContext, job: JobId) -> Response:
    """One job."""
    with not_found():
        return reply(job_view(context.store.job(job)))


@router.post(
    "/{job}/cancel",
    response_model=Job,
    status_code=HTTPStatus.ACCEPTED,
    dependencies=[CanRun],
    responses=problem_responses(409),
)
def cancel_job(context: InContext, job: JobId) -> Response:
    """Let a job stop, within a second; what it has finished is kept."""
    with not_found():
        return reply(job_view(context.store.request_cancel(job)), HTTPStatus.ACCEPTED)


@router.post(
    "/{job}/resume",
    response_model=Job,
    status_code=HTTPStatus.ACCEPTED,
    dependencies=[CanRun],
    responses=problem_responses(409),
)
def resume_job(context: InContext, job: JobId) -> Response:
    """Queue a failed or cancelled job again; it goes on where it was."""
    with not_found():
        return reply(job_view(context.store.resume_job(job)), HTTPStatus.ACCEPTED)


@router.get("/{job}/log", response_class=PlainTextResponse, dependencies=[CanRead], responses=_TEXT)
def show_job_log(context: InContext, job: JobId) -> Response:
    """What the job's process printed, as far as it is kept."""
    with not_found():
        return PlainTextResponse(job_log(context.store, job))


@router.get(
    "/{job}/events", response_class=Response, dependencies=[CanRead], responses=EVENT_RESPONSES
)
async def follow_job(
    request: Request,
    context: InContext,
    job: JobId,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """What happens to the job, as it happens, until it has ended."""
    with not_found():
        await context.in_thread(context.store.job, job)
    return stream(request, context, Topic(job=job), last_event_id, after)
