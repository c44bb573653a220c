"""Plans, frontiers and the table that they come from."""

from __future__ import annotations

from pydantic import Field

from autoq.wire._base import Name, Positive, Reply, Request, Rules


class PlanRequest(Request):
    """The plan for budgets, from the stored table. None of them: the study's last plan."""

    effective_bits: Positive | None = None
    max_gb: Positive | None = None
    max_active_bits: Positive | None = None
    max_latency_ms: Positive | None = None
    max_kl: Positive | None = None
    gpu: Name | None = None
    rules: Rules | None = None  # None: those of the study's last search
    keep: bool = False  # store it, which needs the scope run


class PlanReply(Reply):
    """One plan. Losses are in `unit`, nats per token where scores are those of the default estimator."""

    id: int | None  # of the stored plan; None of one that was only computed
    label: str
    budgets: dict[str, float]
    effective_bits: float
    peer_effective_bits: float
    stored_bits_per_weight: float
    stored_bytes: int
    takes: dict[str, float]
    predicted_loss: float | None
    predicted_loss_interval: tuple[float | None, float | None]
    unit: str
    bound: float | None
    gap: float | None
    assignment: dict[str, str]  # group -> format
    solve_seconds: float | None = None
    measured: dict[str, float | None] | None = None  # metric -> value, of a measured plan
    refined_from: str | None = None
    created: str | None = None


class Frontier(Reply):
    """The best plans by rising bits, without their assignments."""

    study: str
    unit: str
    budget_floor: float
    budget_ceiling: float
    points: tuple[FrontierPoint, ...]


class FrontierPoint(Reply):
    """One plan of a frontier."""

    effective_bits: float
    stored_bytes: int
    predicted_loss: float | None
    predicted_loss_interval: tuple[float | None, float | None]
    gap: float | None
    budget: float | None = None  # in effective bits, that it was solved for
    peer_effective_bits: float | None = None
    stored_bits_per_weight: float | None = None
    bound: float | None = None
    takes: dict[str, float] = Field(default_factory=dict)  # resource -> amount


class SensitivityGroup(Reply):
    """A row of the table: one decision group."""

    name: str
    slots: int
    weights: int
    layer: int | None  # position of its block in the model; None outside blocks
    kind: str  # the last part of its name, such as "self_attn.qkv"


class Sensitivities(Reply):
    """Groups x formats. A cell is null where the group cannot take the format."""

    study: str
    unit: str
    formats: tuple[str, ...]
    groups: tuple[SensitivityGroup, ...]
    scores: tuple[tuple[float | None, ...], ...]
    standard_errors: tuple[tuple[float | None, ...], ...]
    effective_bits: tuple[tuple[float | None, ...], ...]  # per weight


Frontier.model_rebuild()
