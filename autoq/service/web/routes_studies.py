"""Studies as they are: lists, one with its tables and plans, and what comes of it for download."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel
from starlette.responses import HTMLResponse, Response

from autoq.service.pagination import STORABLE, Cursor, Limit
from autoq.service.replies import not_found, problem_responses, reply, reply_list, tagged
from autoq.service.requests import check_plan
from autoq.service.web.access import Caller, CanAdminister, CanRead, require
from autoq.service.web.context import Context, InContext
from autoq.service.web.events import Topic
from autoq.service.web.examples import PlanBody
from autoq.service.web.streams import EVENT_RESPONSES, After, LastEventId, stream
from autoq.service.web.study_names import InStudy, NameOfStudy
from autoq.wire import (
    ExportEntry,
    Frontier,
    PlanReply,
    Scope,
    Sensitivities,
    StudyDetail,
    StudyPage,
    StudyStatus,
    TrialPage,
)

router = APIRouter(prefix="/v1/studies", tags=["studies"])

_LARGEST_ID = 2**63 - 1
_MOST_POINTS = 512

PlanId = Annotated[int, Path(ge=1, le=_LARGEST_ID)]

_READ = [CanRead]
_ONE = problem_responses(404)
_TABLE = problem_responses(404, 409)
_TAG = {"ETag": {"schema": {"type": "string"}, "description": "Of the table as it is now"}}
_TAGGED: dict[int | str, dict[str, Any]] = {
    200: {"headers": _TAG},
    304: {"headers": _TAG, "description": "The table that If-None-Match names is as it was"},
    **_TABLE,
}
_HTML: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}},
    **problem_responses(404, 409),
}


@router.get("", response_model=StudyPage, dependencies=_READ)
def list_studies(
    context: InContext,
    limit: Limit = 50,
    cursor: Cursor = None,
    status: StudyStatus | None = None,
    model: Annotated[str | None, Query(max_length=1000, pattern=STORABLE)] = None,
    q: Annotated[
        str | None,
        Query(
            max_length=200,
            pattern=STORABLE,
            description="Text in the name, model or architecture.",
        ),
    ] = None,
) -> Response:
    """Studies, those that were worked on last first."""
    page = context.reader.studies(limit, cursor, status=status, model=model, text=q)
    return reply(page)


@router.get("/{study}", response_model=StudyDetail, dependencies=_READ, responses=_ONE)
def show_study(context: InContext, study: NameOfStudy) -> Response:
    """Everything about a study that is not a table."""
    return reply(context.reader.detail(study))


@router.delete(
    "/{study}",
    status_code=HTTPStatus.NO_CONTENT,
    response_class=Response,
    dependencies=[CanAdminister],
    responses=problem_responses(404, 409),
)
def delete_study(context: InContext, study: InStudy) -> Response:
    """Remove a study that nobody works on; its checkpoints stay."""
    with not_found():  # somebody else may have been faster
        context.store.delete_study(study.id)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.post("/{study}/plans", response_model=PlanReply, dependencies=_READ, responses=_TABLE)
def make_plan(context: InContext, caller: Caller, study: NameOfStudy, body: PlanBody) -> Response:
    """The best plan for budgets, from the stored table; the study's last plan for none."""
    if body.keep:
        require(caller, Scope.RUN)
    check_plan(body)
    return reply(context.reader.solve(study, body))


@router.get("/{study}/plans/{plan}", response_model=PlanReply, dependencies=_READ, responses=_ONE)
def show_plan(context: InContext, study: NameOfStudy, plan: PlanId) -> Response:
    """A plan that the study keeps."""
    return reply(context.reader.plan(study, plan))


@router.get(
    "/{study}/plans/{plan}/download", response_model=PlanReply, dependencies=_READ, responses=_ONE
)
def download_plan(context: InContext, study: NameOfStudy, plan: PlanId) -> Response:
    """The same as a file."""
    found = context.reader.plan(study, plan)
    return reply(found, headers=_attachment(f"{study}-plan-{plan}.json"))


@router.get("/{study}/frontier", response_model=Frontier, dependencies=_READ, responses=_TAGGED)
def show_frontier(
    request: Request,
    context: InContext,
    study: NameOfStudy,
    points: Annotated[int, Query(ge=2, le=_MOST_POINTS)] = 64,
) -> Response:
    """The best plans by rising bits; has an ETag."""
    return _table(
        request,
        context,
        study,
        ("frontier", points),
        lambda: context.reader.frontier(study, points),
    )


@router.get(
    "/{study}/sensitivity", response_model=Sensitivities, dependencies=_READ, responses=_TAGGED
)
def show_sensitivity(request: Request, context: InContext, study: NameOfStudy) -> Response:
    """The table that plans come from: groups x formats; has an ETag."""
    return _table(
        request, context, study, ("sensitivity",), lambda: context.reader.sensitivities(study)
    )


@router.get("/{study}/trials", response_model=TrialPage, dependencies=_READ, responses=_ONE)
def list_trials(
    context: InContext, study: NameOfStudy, limit: Limit = 50, cursor: Cursor = None
) -> Response:
    """Measured trials of refinements, the oldest first."""
    return reply(context.reader.trials(study, limit, cursor))


@router.get(
    "/{study}/exports", response_model=list[ExportEntry], dependencies=_READ, responses=_ONE
)
def list_exports(context: InContext, study: NameOfStudy) -> Response:
    """The study's checkpoints."""
    return reply_list(context.reader.exports(study))


@router.get(
    "/{study}/report",
    response_class=HTMLResponse,
    dependencies=_READ,
    responses=_HTML,
)
def download_report(context: InContext, study: NameOfStudy) -> Response:
    """The page that `autoq report` writes: one file that needs nothing else."""
    return HTMLResponse(context.reader.report(study), headers=_attachment(f"{study}.html"))


@router.get(
    "/{study}/events", response_class=Response, dependencies=_READ, responses=EVENT_RESPONSES
)
async def follow_study(
    request: Request,
    context: InContext,
    study: InStudy,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """What happens to all jobs of the study, as it happens; does not end by itself."""
    return stream(request, context, Topic(study=study.name), last_event_id, after)


def _table(
    request: Request,
    context: Context,
    study: str,
    which: tuple[Hashable, ...],
    make: Callable[[], BaseModel],
) -> Response:
    """A large table, written out once for every state of the study."""
    with not_found():
        marks = context.store.study_marks(study)
    content = context.tables.get((marks, which), lambda: make().model_dump_json().encode())
    return tagged(request, content)


def _attachment(name: str) -> dict[str, str]:
    """A header that makes browsers save the reply, under a name without surprises."""
    plain = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name[:-5])
    ending = name[-5:]
    return {
        "content-disposition": f'attachment; filename="{plain}{ending}"; '
        f"filename*=UTF-8''{quote(name, safe='')}"
    }
