"""Whether a plan would be chosen again on other sequences: how sure the scores make it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from autoq.errors import InputError
from autoq.formats import NONE
from autoq.models import Assignment
from autoq.search._types import Plan, SensitivityTable

RESAMPLES = 200
RELATIVE_SLACK = 0.02
"""Share by which a plan may miss the optimum of resampled scores and still count as confirmed."""

FEWEST_SEQUENCES = 8
"""Resampling fewer says little about how much they differ."""

Solver: TypeAlias = Callable[[SensitivityTable], Plan]
"""Scores -> the plan for the budget that was asked for."""


@dataclass(frozen=True, slots=True)
class Stability:
    """How often a plan stays near-optimal when its sequences are drawn again."""

    confidence: float  # share of the draws in which it does
    sequences: int
    sequences_needed: int | None  # about as many would do; None: no number is known to
    relative_slack: float

    def reaches(self, confidence: float) -> bool:
        """Whether the plan is as sure as asked, by sequences enough to tell."""
        return self.sequences >= FEWEST_SEQUENCES and self.confidence >= confidence


def plan_stability(
    sensitivity: SensitivityTable,
    solve: Solver,
    confidence: float,
    *,
    resamples: int = RESAMPLES,
    relative_slack: float | None = None,
    seed: int = 0,
) -> Stability:
    """Draw the sequences again with replacement, and compare the plan with each draw's own best.

    A plan is confirmed by a draw if its predicted loss under the draw's scores is at most
    `relative_slack` above that of the draw's own plan. (Efron, "Bootstrap methods: another look at
    the jackknife", 1979.)

    Args:
        relative_slack: at least 0, where only the draw's own optimum counts, and how many sequences
            would do is known only if these do; None takes `RELATIVE_SLACK`.
        confidence: what is asked for, in (0, 1); decides `sequences_needed` only.
        solve: need not be exact to less than the slack.
    Raises:
        InputError: the slack is negative.
    """
    slack = RELATIVE_SLACK if relative_slack is None else relative_slack
    if not slack >= 0.0:
        raise InputError(f"relative_slack must be >= 0, got {slack:g}; try {RELATIVE_SLACK:g}")
    plan = solve(sensitivity)
    sequences = sensitivity.contributions.shape[0]
    generator = np.random.default_rng(seed)
    excess = np.empty(resamples)
    for draw in range(resamples):
        chosen = generator.integers(0, sequences, sequences)
        mean = sensitivity.contributions[chosen].mean(axis=0, keepdims=True)
        resampled = replace(sensitivity, contributions=mean)
        best = solve(resampled).predicted_loss
        excess[draw] = _loss_of(plan.assignment, resampled) - best
        excess[draw] /= best if best > 0 else 1.0
    reached = float((excess <= slack).mean())
    worst = float(np.quantile(excess, confidence))
    return Stability(reached, sequences, _needed(sequences, worst, slack), slack)


def _needed(sequences: int, excess: float, slack: float) -> int | None:
    """How many sequences bring an excess down to the slack.

    What choosing on noisy scores loses is quadratic in their errors, so it shrinks as 1 / n.
    """
    fewest = max(sequences, FEWEST_SEQUENCES)
    if excess <= slack:
        return fewest
    return max(fewest, math.ceil(sequences * excess / slack)) if slack > 0.0 else None


def _loss_of(assignment: Assignment, sensitivity: SensitivityTable) -> float:
    scores = sensitivity.scores()
    return sum(
        float(scores[row, sensitivity.formats.index(assignment[group])])
        for row, group in enumerate(sensitivity.groups)
        if assignment[group] != NONE
    )


def is_checkpoint(batches: int, sequences: int) -> bool:
    """Whether a pass looks at its stability after so many batches: each time they have doubled."""
    return sequences >= FEWEST_SEQUENCES and batches & (batches - 1) == 0
