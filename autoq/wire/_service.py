"""What the service says of itself and of what it may use."""

from __future__ import annotations

from enum import StrEnum

from autoq.wire._base import Reply


class Scope(StrEnum):
    """What a token may do; each may do what those before it may."""

    READ = "read"
    RUN = "run"
    ADMIN = "admin"


class Identity(Reply):
    """Who asks."""

    name: str
    scope: Scope
    authentication: bool  # whether the server asks for tokens
    version: str
    dashboard: str | None = None  # address of Optuna's dashboard on the same store


class Readiness(Reply):
    """Whether work can be done: the store answers, and a worker waits or works."""

    ready: bool
    store: bool
    workers: int
    jobs_queued: int
    jobs_running: int


class ModelEntry(Reply):
    """A model that can be searched; `path` is what a search request names."""

    path: str
    architecture: str | None
    bytes: int


class FormatEntry(Reply):
    """A number format."""

    name: str
    weight: str
    activation: str
    effective_bits: float
    offered_unasked: bool
    containers: tuple[str, ...]
    summary: str = ""
    peer_effective_bits: float | None = None
    block_size: int | None = None
    calibration: str = ""
    loads_in: str = ""


class TargetEntry(Reply):
    """An engine on some hardware, and what runs there."""

    target: str
    engine: str
    hardware: str
    formats: tuple[str, ...]
