"""Plain data of a refinement: what was measured, and what is proposed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from autoq.models import Assignment
from autoq.search._types import Plan

Suggest: TypeAlias = Callable[[str, float, float], float]
"""(name, low, high) -> a number between the two: what Optuna's `Trial.suggest_float` is."""


class Source(StrEnum):
    """What made a plan worth measuring."""

    START = "start"  # the plan to refine
    DIVERSE = "diverse"  # near-optimal by the scores, and different
    SWAP = "swap"  # formats exchanged between groups, as the measurements so far suggest
    MULTIPLIERS = "multipliers"  # optimal for scores multiplied by layer type and depth
    FRONT = "front"  # optimal for another budget (`FrontRefinement`)


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

    @property
    def measured(self) -> bool:
        """Whether there are losses, all of them finite."""
        return bool(self.losses) and all(map(math.isfinite, self.losses))

    @property
    def loss(self) -> float:
        """Mean over what was measured."""
        return math.fsum(self.losses) / len(self.losses)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A plan to measure next."""

    plan: Plan
    source: Source
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the record, such as the groups whose format was exchanged."""
