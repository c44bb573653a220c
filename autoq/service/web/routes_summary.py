"""A plan as the command line shows it: for the command line against a server."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from autoq.api.study_tables import StudyTables
from autoq.service.problems import Refusal, shown
from autoq.service.replies import problem_responses
from autoq.service.web.access import CanRead
from autoq.service.web.context import Context, InContext
from autoq.service.web.study_names import InStudy
from autoq.studies import PlanRecord, StudyRecord
from autoq.studies._encoding import json_clean

router = APIRouter(prefix="/v1/studies", tags=["studies"], dependencies=[CanRead])


@router.get(
    "/{study}/summary", response_model=dict[str, Any], responses=problem_responses(404, 422)
)
def show_summary(
    context: InContext,
    study: InStudy,
    plan: Annotated[int | None, Query(ge=1, le=2**63 - 1)] = None,
) -> Response:
    """What `autoq show --json` prints of a stored plan, or of the study's last one."""
    from autoq.api.summary import summarise

    tables = StudyTables(context.store, study)
    found = tables.plan() if plan is None else _stored(context, study, plan)
    summary = summarise(tables, found)
    export = summary["export"]
    public = {
        "model": context.roots.public(summary["model"]),
        "export": export and {**export, "path": context.roots.public(export["path"])},
    }
    content = json.dumps(json_clean(shown({**summary, **public})), allow_nan=False)
    return Response(content, media_type="application/json", headers={"cache-control": "no-store"})


def _stored(context: Context, study: StudyRecord, plan: int) -> PlanRecord:
    """
    Raises:
        Refusal: the study keeps no such plan.
    """
    for record in context.store.plans(study.id):
        if record.id == plan:
            return record
    raise Refusal("not-found", f"study {study.name!r} keeps no plan {plan}")
