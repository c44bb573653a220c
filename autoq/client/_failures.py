"""From a server's problems to the exceptions that the same mistake raises in process."""

from __future__ import annotations

import json
import math

import httpx
from pydantic import ValidationError

from autoq.errors import (
    AutoqError,
    BudgetInfeasibleError,
    DataError,
    ExportError,
    InputError,
    ModelError,
    QualityInfeasibleError,
    ResourceInfeasibleError,
    StoreError,
    StudyLockedError,
    UnknownNameError,
    VerificationError,
)
from autoq.wire import Problem


class UnreachableError(AutoqError):
    """The server does not answer, or what answers is no autoq service."""


class JobCancelledError(AutoqError):
    """Somebody cancelled the job that was waited for."""


_TYPE_PREFIX = "urn:autoq:problem:"

_CLASSES: dict[str, type[AutoqError]] = {
    "input": InputError,
    "unknown-name": UnknownNameError,
    "not-found": UnknownNameError,
    "model": ModelError,
    "data": DataError,
    "export": ExportError,
    "study-locked": StudyLockedError,
    "store": StoreError,
    "verification": VerificationError,
    # What the caller mends by another token, another body or by waiting.
    "not-finished": InputError,
    "conflict": InputError,
    "idempotency-conflict": InputError,
    "unauthorized": InputError,
    "forbidden": InputError,
    "too-large": InputError,
    "media-type": InputError,
}


def error_of(problem: Problem) -> AutoqError:
    """The exception that a problem stands for, with the server's sentence.

    Of budgets that cannot be met the attributes are known as far as the server says them; the
    others are NaN, or empty.
    """
    error = _infeasible(problem)
    if error is None:
        kind = problem.type.removeprefix(_TYPE_PREFIX)
        error = _CLASSES.get(kind, AutoqError)(problem.detail)
    error.said = _sentence(problem)
    return error


def _infeasible(problem: Problem) -> AutoqError | None:
    limits = {name: value for name, value in (problem.limits or {}).items() if value is not None}
    asked = limits.get("asked", math.nan)
    floor, ceiling = (limits.get(end, math.nan) for end in ("floor", "ceiling"))
    match problem.type.removeprefix(_TYPE_PREFIX):
        case "budget-infeasible":
            return BudgetInfeasibleError(asked, floor, ceiling)
        case "resource-infeasible":
            return ResourceInfeasibleError("", asked, floor, ("", ""))
        case "quality-infeasible":
            return QualityInfeasibleError(asked, floor)
    return None


def _sentence(problem: Problem) -> str:
    fields = [
        f"{entry.get('where', '')}: {entry.get('what', '')}"
        for entry in problem.errors
        if str(entry.get("what", "")) not in problem.detail
    ]
    return "; ".join([problem.detail, *fields])


def error_of_response(response: httpx.Response) -> AutoqError:
    """What a reply says that is none of success; its body is read already."""
    try:
        return error_of(Problem.model_validate(json.loads(response.content)))
    except (ValueError, ValidationError):
        return UnreachableError(
            f"{response.request.url} answers {response.status_code} and not as an autoq service "
            "does; see that the URL is that of `autoq serve`, and what a proxy before it says"
        )
