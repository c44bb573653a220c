"""Measured plans as the dashboard has them: one Optuna trial each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoq.report._metric import Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """A plan that was measured to its end."""

    number: int
    source: str  # what made the plan worth measuring: "start", "swap", "validation", ...
    label: str  # the plan's name in the store; empty where it has none
    effective_bits: float
    predicted_loss: float | None
    measured: Metric  # KL divergence in nats per token


SOURCE_TEXT: Mapping[str, str] = {
    "start": "start",
    "diverse": "near-optimal and different",
    "swap": "formats exchanged",
    "multipliers": "scores reweighted",
    "front": "best for another budget",
    "asked": "asked for",
    "refined": "result of a refinement",
    "uniform": "one format throughout",
    "validation": "to check the prediction",
}


def source_text(source: str) -> str:
    """Where a plan comes from, in words."""
    return SOURCE_TEXT.get(source, source.replace("_", " "))
