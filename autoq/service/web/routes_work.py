"""Requests that become jobs."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import APIRouter
from starlette.responses import Response

from autoq.service.problems import Refusal
from autoq.service.replies import problem_responses, reply
from autoq.service.requests import check_export, check_refine, check_search, check_verify
from autoq.service.web.access import Caller, CanRun
from autoq.service.web.context import Context, InContext
from autoq.service.web.examples import ExportBody, MeasureBody, RefineBody, SearchBody, VerifyBody
from autoq.service.web.job_creation import JOB_RESPONSES, IdempotencyKey, new_job
from autoq.service.web.job_views import job_view
from autoq.service.web.study_names import InStudy
from autoq.studies import JobRecord, StudyRecord
from autoq.wire import Job, JobKind

router = APIRouter(prefix="/v1", tags=["work"], dependencies=[CanRun])

_ACCEPTED = HTTPStatus.ACCEPTED


@router.post("/studies", response_model=Job, status_code=_ACCEPTED, responses=JOB_RESPONSES)
def start_search(
    context: InContext, caller: Caller, body: SearchBody, idempotency_key: IdempotencyKey = None
) -> Response:
    """Start a search, or go on with the one that has the same configuration."""
    check_search(body, context.roots)
    return new_job(context, caller, JobKind.SEARCH, body, key=idempotency_key)


@router.post(
    "/studies/{study}/exports", response_model=Job, status_code=_ACCEPTED, responses=JOB_RESPONSES
)
def start_export(
    context: InContext,
    caller: Caller,
    study: InStudy,
    body: ExportBody,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Write a checkpoint of a stored plan, of the plan for budgets, or of the last one."""
    check_export(body, context.roots)
    check_study(context, study)
    if body.plan is not None:
        check_plan_exists(context, study, body.plan)
    return new_job(context, caller, JobKind.EXPORT, body, study=study.name, key=idempotency_key)


@router.post(
    "/studies/{study}/refinements",
    response_model=Job,
    status_code=_ACCEPTED,
    responses=JOB_RESPONSES,
)
def start_refinement(
    context: InContext,
    caller: Caller,
    study: InStudy,
    body: RefineBody,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Measure plans, and keep what is better than the predicted best one."""
    check_refine(body)
    check_study(context, study)
    return new_job(context, caller, JobKind.REFINE, body, study=study.name, key=idempotency_key)


@router.post(
    "/studies/{study}/measurements",
    response_model=Job,
    status_code=_ACCEPTED,
    responses=JOB_RESPONSES,
)
def start_measurement(
    context: InContext,
    caller: Caller,
    study: InStudy,
    body: MeasureBody,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Measure a stored plan on held-out data."""
    check_study(context, study)
    check_plan_exists(context, study, body.plan)
    return new_job(context, caller, JobKind.MEASURE, body, study=study.name, key=idempotency_key)


@router.post("/verifications", response_model=Job, status_code=_ACCEPTED, responses=JOB_RESPONSES)
def start_verification(
    context: InContext, caller: Caller, body: VerifyBody, idempotency_key: IdempotencyKey = None
) -> Response:
    """Check a checkpoint; the job's result is what `autoq verify --json` prints."""
    check_verify(body, context.roots)
    return new_job(context, caller, JobKind.VERIFY, body, key=idempotency_key)


@router.post(
    "/studies/{study}/cancel",
    response_model=Job,
    status_code=_ACCEPTED,
    responses=problem_responses(404, 409),
)
def cancel_study(context: InContext, study: InStudy) -> Response:
    """Let the newest job of the study stop; what it has finished is kept."""
    job = _newest_job(context, study)
    return reply(job_view(context.store.request_cancel(job.id)), _ACCEPTED)


@router.post(
    "/studies/{study}/resume",
    response_model=Job,
    status_code=_ACCEPTED,
    responses=problem_responses(404, 409),
)
def resume_study(context: InContext, study: InStudy) -> Response:
    """Queue the newest job of the study again, if it failed or was cancelled."""
    job = _newest_job(context, study)
    return reply(job_view(context.store.resume_job(job.id)), _ACCEPTED)


def check_study(context: Context, study: StudyRecord) -> None:
    """
    Raises:
        InputError: the study's model or data are not where the service may read.
    """
    data = study.configuration.get("calibration_data")
    context.roots.check_study(study.model_path, data)


def check_plan_exists(context: Context, study: StudyRecord, plan: int) -> None:
    """
    Raises:
        Refusal: the study keeps no such plan.
    """
    known = [record.id for record in context.store.plans(study.id)]
    if plan not in known:
        raise Refusal(
            "unknown-name",
            f"study {study.name!r} keeps no plan {plan}; its plans are "
            f"{', '.join(map(str, known)) or 'none'}",
        )


def _newest_job(context: Context, study: StudyRecord) -> JobRecord:
    """
    Raises:
        Refusal: the study was never worked on by a job.
    """
    jobs = context.store.jobs(limit=1, study=study.name)
    if not jobs:
        raise Refusal(
            "conflict",
            f"no job of the service worked on study {study.name!r}; what began it can end it and go "
            "on with it",
        )
    return jobs[0]
