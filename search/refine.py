"""Refining a plan by measuring: which plan to measure next, and whether to believe what was found.

A plan that is optimal by predicted losses is only as good as the predictions. Refinement spends a
budget of evaluations (the real loss of whole plans, on the same sequences every time) on plans that
may be better: the start, diverse near-optimal plans, exchanges of formats round the best plan, and
optima of scores with other weights for layer types and depths. What wins on the tokens that it was
chosen by must win again on fresh ones before it is accepted.

Nothing here runs a model or keeps state: whoever does keeps the trials, and asks for the next plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from autoq.models import Assignment
from autoq.search._types import Budget, CostTable, Plan, SensitivityTable

Suggest: TypeAlias = Callable[[str, float, float], float]
"""(name, low, high) -> a number between the two: what Optuna's `Trial.suggest_float` is."""


class Source(StrEnum):
    """What made a plan worth measuring."""

    START = "start"  # the plan to refine
    DIVERSE = "diverse"  # near-optimal by the scores, and different
    SWAP = "swap"  # formats exchanged between groups, as the measurements so far suggest
    MULTIPLIERS = "multipliers"  # optimal for scores multiplied by layer type and depth
    FRONT = "front"  # optimal for another budget (`FrontRefinement`)


EVERY_STRATEGY = (Source.DIVERSE, Source.SWAP, Source.MULTIPLIERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A plan that was measured."""

    number: int
    source: Source
    assignment: Assignment
    losses: tuple[float, ...]
    """Per sequence, the same sequences in every trial; one number where the objective has none per
    sequence; none at all where measuring failed."""

    complete: bool = True
    """False: stopped early, only the first sequences were measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A plan to measure next."""

    plan: Plan
    source: Source
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the record, such as the groups whose format was exchanged."""


class Refinement:
    """Which plans to measure, so that a budget of evaluations finds a better one."""

    def __init__(
        self,
        sensitivity: SensitivityTable,
        costs: CostTable,
        budgets: float | Budget | Sequence[Budget],
        start: Plan,
        *,
        trials: int,
        seed: int = 0,
        noise_floor: float = 0.0,
        strategies: Collection[Source] = EVERY_STRATEGY,
    ) -> None:
        """
        Args:
            sensitivity: predicted losses, as for `solve`.
            costs: costs, as for `solve`.
            budgets: what every proposed plan stays within, as for `solve`.
            start: the plan to refine; within the budgets. It is the first proposal.
            trials: evaluations to spend, the start's included.
            seed: of everything that is drawn.
            noise_floor: difference of losses that means nothing, in the objective's unit.
            strategies: what to take proposals from, besides the start.
        Raises:
            InputError: there are no trials, no strategy, or an unknown one, or the start is not
                within the budgets.
            BudgetInfeasibleError, ResourceInfeasibleError, InputError: as `solve`.
        """
        raise NotImplementedError

    def propose(
        self,
        finished: Sequence[Trial],
        running: Sequence[Assignment],
        number: int,
        suggest: Suggest,
    ) -> Proposal | None:
        """The plan to measure next; None when nothing is left to try.

        A pure function of its arguments and the seed: the same history gives the same proposal on
        any machine. Never a plan that is finished or running.

        Args:
            finished: trials so far, failed ones (without losses) included, in any order.
            running: assignments that other workers are measuring.
            number: of the trial that the plan is for; what is drawn depends on it.
            suggest: asked only when the proposal's source is MULTIPLIERS.
        """
        raise NotImplementedError

    def hopeless(self, best: Sequence[float], so_far: Sequence[float]) -> bool:
        """Whether a trial may be stopped: it will hardly be better than the best one.

        Args:
            best: losses of the best complete trial, one per sequence.
            so_far: of the trial at hand, the first sequences of the same.
        """
        raise NotImplementedError

    def finalists(self, finished: Sequence[Trial]) -> list[Trial]:
        """The few trials worth measuring on fresh tokens: the start, then others, best first."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a refined plan replaces the start; true where it does."""

    better: bool
    difference: float  # candidate less start, mean over sequences; negative is better
    low: float  # interval of the difference
    high: float
    reason: str  # one sentence for the user

    def __bool__(self) -> bool:
        """Whether the candidate is accepted."""
        return self.better


def accepted(
    start_losses: Sequence[float],
    candidate_losses: Sequence[float],
    noise_floor: float = 0.0,
    *,
    candidates: int = 1,
) -> Verdict:
    """Whether a candidate is better than the start on fresh tokens.

    Args:
        start_losses: per sequence, of tokens that chose nothing.
        candidate_losses: of the same sequences.
        noise_floor: improvement that means nothing.
        candidates: how many are tested beside each other; the error rate is shared among them.
    Raises:
        InputError: the two were not measured on equally many sequences, or on fewer than two.
    """
    raise NotImplementedError
