"""Requests that become jobs, each once however often it is sent."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Header
from pydantic import BaseModel
from starlette.responses import Response

from autoq.service.problems import Refusal
from autoq.service.replies import problem_responses, reply
from autoq.service.web.context import Context
from autoq.service.web.job_views import job_view
from autoq.wire import Identity, Job, JobKind

_LONGEST_KEY = 200

IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Any text of your own, at most 200 printable ASCII characters: the same key and "
        "body give the same job again."
    ),
]

_LOCATION = {"Location": {"schema": {"type": "string"}, "description": "Where the job is."}}

JOB_RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"headers": _LOCATION},
    200: {"model": Job, "headers": _LOCATION, "description": "The job that the key stands for"},
    **problem_responses(404, 409),
}
"""What routes declare that answer with `new_job`, whose status is 202."""


def new_job(
    context: Context,
    caller: Identity,
    kind: JobKind,
    request: BaseModel,
    *,
    study: str | None = None,
    key: str | None = None,
) -> Response:
    """Queue a job, or find the one that was made of the same request under the same key.

    Args:
        study: that it works on, where it is known.
    Raises:
        Refusal: the key holds what no header should.
        IdempotencyError: the key stands for another request.
    """
    _check_key(key)
    plain = request.model_dump(mode="json", exclude_unset=True)
    record, is_new = context.store.add_job(
        kind=kind.value,
        request=plain,
        created_by=caller.name,
        study=study or plain.get("name"),
        idempotency_key=key,
    )
    status = HTTPStatus.ACCEPTED if is_new else HTTPStatus.OK
    return reply(job_view(record), status, {"location": f"/v1/jobs/{record.id}"})


def _check_key(key: str | None) -> None:
    fits = key is None or (0 < len(key) <= _LONGEST_KEY and key.isascii() and key.isprintable())
    if not fits:
        raise Refusal(
            "input",
            f"an Idempotency-Key must be 1 to {_LONGEST_KEY} printable ASCII characters; a random "
            "UUID is one",
        )
