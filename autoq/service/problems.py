"""From exceptions to problems: one table, which replies of the API and failed jobs share.

The sentences are those of the command line. What nobody foresaw says nothing of the inside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

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
    without_password,
)
from autoq.studies import IdempotencyError, JobStateError
from autoq.wire import Problem

TYPE_PREFIX = "urn:autoq:problem:"


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """One kind of refusal or failure, and the HTTP status that says it."""

    name: str
    status: HTTPStatus
    title: str

    @property
    def type(self) -> str:
        """The URI that names the kind."""
        return TYPE_PREFIX + self.name


_UNPROCESSABLE = HTTPStatus(422)  # its name in HTTPStatus differs between Pythons

_KINDS = (
    ProblemKind("input", _UNPROCESSABLE, "What was asked for breaks a rule"),
    ProblemKind("unknown-name", _UNPROCESSABLE, "Nothing has this name"),
    ProblemKind("model", _UNPROCESSABLE, "The model cannot be used"),
    ProblemKind("data", _UNPROCESSABLE, "The data cannot be used"),
    ProblemKind("budget-infeasible", _UNPROCESSABLE, "No plan meets the budget"),
    ProblemKind("resource-infeasible", _UNPROCESSABLE, "No plan meets the budgets"),
    ProblemKind("quality-infeasible", _UNPROCESSABLE, "No plan loses as little"),
    ProblemKind("export", _UNPROCESSABLE, "The checkpoint cannot be made or read"),
    ProblemKind("study-locked", HTTPStatus.CONFLICT, "The study is being worked on"),
    ProblemKind("not-finished", HTTPStatus.CONFLICT, "The study has not got that far"),
    ProblemKind("conflict", HTTPStatus.CONFLICT, "That cannot be done now"),
    ProblemKind("idempotency-conflict", HTTPStatus.CONFLICT, "The key was used for another body"),
    ProblemKind("store", HTTPStatus.SERVICE_UNAVAILABLE, "The study store does not answer"),
    ProblemKind("verification", HTTPStatus.INTERNAL_SERVER_ERROR, "The checkpoint is not right"),
    ProblemKind("not-found", HTTPStatus.NOT_FOUND, "There is no such thing"),
    ProblemKind("method", HTTPStatus.METHOD_NOT_ALLOWED, "Not done with this method"),
    ProblemKind("unauthorized", HTTPStatus.UNAUTHORIZED, "A token is needed"),
    ProblemKind("forbidden", HTTPStatus.FORBIDDEN, "Not allowed"),
    ProblemKind("too-large", HTTPStatus(413), "Too large"),
    ProblemKind("media-type", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Bodies are JSON"),
    ProblemKind("too-many-requests", HTTPStatus.TOO_MANY_REQUESTS, "Too many requests"),
    ProblemKind("internal", HTTPStatus.INTERNAL_SERVER_ERROR, "Something unexpected happened"),
)

KINDS: Mapping[str, ProblemKind] = {kind.name: kind for kind in _KINDS}
"""Name -> kind; all that a `Problem.type` may end with."""

_OF_CLASS: Mapping[type[Exception], str] = {
    InputError: "input",
    UnknownNameError: "unknown-name",
    ModelError: "model",
    DataError: "data",
    BudgetInfeasibleError: "budget-infeasible",
    ResourceInfeasibleError: "resource-infeasible",
    QualityInfeasibleError: "quality-infeasible",
    ExportError: "export",
    StudyLockedError: "study-locked",
    JobStateError: "conflict",
    IdempotencyError: "idempotency-conflict",
    StoreError: "store",
    VerificationError: "verification",
    AutoqError: "internal",
}

UNEXPECTED_DETAIL = (
    "something unexpected happened; the server's log says what, under the time of this reply"
)

_ABSOLUTE = re.compile(r"(?<![\w:/.])/(?:[^\s/:;,'\"()<>]+/)+(?=[^\s/:;,'\"()<>]+)")
"""The folders of an absolute path, up to its last name; the path of a URL is none."""

_FILE_URL = re.compile(r"(?<=sqlite:///)/?(?:[^\s/:;,'\"()<>]+/)+")

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a file of somebody else's may name things with: halves of characters, which no reply can
hold, and commands to terminals."""


class Refusal(AutoqError):
    """What the service itself refuses, for which the command line has no exception."""

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """
        Args:
            kind: name in `KINDS`.
            detail: one sentence: the rule, the value, what to do.
            headers: of the reply, beside those that every reply has.
            errors: of the fields of a body, each "where" and "what".
        """
        super().__init__(kind, detail)
        self.kind = KINDS[kind]
        self.detail = detail
        self.headers = dict(headers or {})
        self.errors = tuple(dict(error) for error in errors)

    def __str__(self) -> str:
        return self.detail


def kind_of(error: BaseException) -> ProblemKind:
    """The kind of the nearest class of the exception's that the table has."""
    if isinstance(error, Refusal):
        return error.kind
    names = (_OF_CLASS.get(parent) for parent in type(error).__mro__)
    return KINDS[next((name for name in names if name is not None), "internal")]


def problem_of(error: BaseException, instance: str | None = None) -> Problem:
    """What a reply, or a failed job, says of an exception.

    Folders of absolute paths and passwords are left out: whoever reads it may be on another
    machine, and has no business there.

    Args:
        instance: path of the request, or of the job.
    """
    kind = kind_of(error)
    return Problem(
        type=kind.type,
        title=kind.title,
        status=int(kind.status),
        detail=_detail(error),
        instance=instance,
        errors=error.errors if isinstance(error, Refusal) else (),
        limits=_limits(error),
    )


def shown_text(text: str) -> str:
    """One line without passwords and without the folders of absolute paths."""
    return without_folders(" ".join(text.split()))


def without_folders(text: str) -> str:
    """The text without passwords, the folders of absolute paths, and what is no text."""
    plain = _NOT_TEXT.sub("\ufffd", text)
    return _ABSOLUTE.sub("", _FILE_URL.sub("", without_password(plain)))


def shown(value: Any) -> Any:
    """Plain data whose texts are as of `without_folders`."""
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, dict):
        return {key: shown(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [shown(entry) for entry in value]
    return value


def _detail(error: BaseException) -> str:
    if isinstance(error, AutoqError) or _is_of_the_system(error):
        return shown_text(str(error))
    return UNEXPECTED_DETAIL


def _is_of_the_system(error: BaseException) -> bool:
    """Whether a job failed for want of room or of memory, which its owner must know."""
    return isinstance(error, OSError | MemoryError) and bool(str(error))


def _limits(error: BaseException) -> dict[str, float | None] | None:
    """Lowest and highest value that a budget may have, in its resource's own unit."""
    if isinstance(error, BudgetInfeasibleError):
        return {"floor": error.floor_bits, "ceiling": error.ceiling_bits}
    if isinstance(error, ResourceInfeasibleError):
        return {"floor": error.least, "ceiling": None}
    if isinstance(error, QualityInfeasibleError):
        return {"floor": error.best_loss, "ceiling": None}
    return None
