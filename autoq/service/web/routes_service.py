"""What the service says of itself, and what there is to choose from."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from autoq.errors import StoreError
from autoq.service._version import VERSION
from autoq.service.replies import problem_responses, reply, reply_list
from autoq.service.web.access import Caller, CanRead
from autoq.service.web.catalogue import format_entries, target_entries
from autoq.service.web.context import InContext
from autoq.service.web.metrics import METRICS_MEDIA_TYPE
from autoq.studies import JobStatus, StudyStore
from autoq.wire import FormatEntry, Identity, ModelEntry, Readiness, TargetEntry

public = APIRouter(prefix="/v1", tags=["service"])
router = APIRouter(tags=["service"], dependencies=[CanRead])


class Health(BaseModel):
    """That the process answers."""

    status: str
    version: str


@public.get("/health", response_model=Health, responses=problem_responses(403, 429, 500))
async def health() -> Response:
    """That the process answers; asks nothing of the store."""
    return reply(Health(status="ok", version=VERSION))


@public.get(
    "/ready",
    response_model=Readiness,
    responses={
        **problem_responses(403, 429, 500),
        HTTPStatus.SERVICE_UNAVAILABLE: {
            "model": Readiness,
            "description": "The store does not answer, or no worker waits or works",
        },
    },
)
def ready(context: InContext) -> Response:
    """Whether work can be done."""
    readiness = _readiness(context.store)
    status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
    return reply(readiness, status)


def _readiness(store: StudyStore) -> Readiness:
    try:
        workers, jobs = store.live_runners(), store.count_jobs()
    except StoreError:
        return Readiness(ready=False, store=False, workers=0, jobs_queued=0, jobs_running=0)
    return Readiness(
        ready=workers > 0,
        store=True,
        workers=workers,
        jobs_queued=jobs[JobStatus.QUEUED],
        jobs_running=jobs[JobStatus.RUNNING] + jobs[JobStatus.CANCELLING],
    )


@router.get("/v1/me", response_model=Identity)
async def me(context: InContext, caller: Caller) -> Response:
    """Who asks, and what that one may do."""
    return reply(caller.model_copy(update={"dashboard": context.settings.dashboard}))


@router.get("/v1/formats", response_model=list[FormatEntry])
def list_formats() -> Response:
    """Number formats that layers can be stored and run in."""
    return reply_list(format_entries())


@router.get("/v1/targets", response_model=list[TargetEntry])
def list_targets() -> Response:
    """Engines on hardware, and the formats that run there."""
    return reply_list(target_entries())


@router.get("/v1/models", response_model=list[ModelEntry])
def list_models(context: InContext) -> Response:
    """Models that can be searched."""
    return reply_list(context.roots.models())


_METRICS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


@router.get("/metrics", response_class=Response, responses=_METRICS)
def metrics(context: InContext) -> Response:
    """Figures for Prometheus."""
    return Response(context.metrics.text(), media_type=METRICS_MEDIA_TYPE)
