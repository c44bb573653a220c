"""How the service says that something cannot be done (RFC 9457)."""

from __future__ import annotations

from typing import Any

from autoq.wire._base import Reply

PROBLEM_MEDIA_TYPE = "application/problem+json"


class Problem(Reply):
    """One refusal or failure. `detail` is the sentence that the command line prints."""

    type: str  # "urn:autoq:problem:" and the kind, for example "budget-infeasible"
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: tuple[dict[str, Any], ...] = ()  # of the fields of a body: {"where": ..., "what": ...}
    limits: dict[str, float | None] | None = None  # of a budget: "floor" and "ceiling"
