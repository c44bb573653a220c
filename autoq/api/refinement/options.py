"""What a refinement is asked to do, and what it found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoq.api.refinement._metrics import Aim
from autoq.api.refinement._optuna import check_sampler
from autoq.errors import InputError
from autoq.evaluators import parse_constraint, parse_objective
from autoq.evaluators.tasks import ExamplePart
from autoq.search.refine import EVERY_STRATEGY
from autoq.studies import GRACE_SECONDS, HEARTBEAT_SECONDS, PlanRecord

DEFAULT_TRIALS = 100
BYTES_PER_GB = 1e9
AGAINST_BITS = "bits"


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """How a plan is refined.

    Raises:
        InputError: a value breaks its rule.
    """

    trials: int = DEFAULT_TRIALS  # plans to measure, the start included
    objective: str = "kl"  # arithmetic over metrics, to be minimised
    constraints: tuple[str, ...] = ()  # "METRIC>=NUMBER", with an x for times the original's
    against: str | None = None  # "bits": a front of the objective against effective bits
    sampler: str = "tpe"  # of Optuna, for the trials that ask for numbers
    strategies: tuple[str, ...] = tuple(strategy.value for strategy in EVERY_STRATEGY)
    sequences: int = 32  # of calibration data that trials are measured on
    fresh_sequences: int = 64  # that the best ones are measured on
    held_out_sequences: int = 32  # to report on
    seed: int = 0
    prune: bool = True  # stop hopeless trials early
    cache_gb: float | None = None  # of quantised weights and block outputs, 10^9 bytes
    outputs: str | None = None
    """A folder for the original's outputs, which workers and later runs share; None: beside an SQLite
    store, and none elsewhere."""
    heartbeat_seconds: int = HEARTBEAT_SECONDS
    grace_seconds: int = GRACE_SECONDS

    def __post_init__(self) -> None:
        for name in ("trials", "sequences", "fresh_sequences", "held_out_sequences"):
            least = 1 if name == "trials" else 2
            if getattr(self, name) < least:
                raise InputError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must be >= 0, got {self.seed}")
        if self.cache_gb is not None and not 0 <= self.cache_gb < math.inf:
            raise InputError(f"cache_gb must be >= 0, got {self.cache_gb:g}")
        if self.against not in (None, AGAINST_BITS):
            raise InputError(
                f"an objective can be set against {AGAINST_BITS}, got {self.against!r}; leave it "
                "out for one objective"
            )
        _ = self.aim
        check_sampler(self.sampler)
        known = [strategy.value for strategy in EVERY_STRATEGY]
        for name in self.strategies:
            if name not in known:
                raise InputError(f"no strategy named {name!r}; known: {', '.join(known)}")

    @property
    def aim(self) -> Aim:
        """What trials minimise and keep.

        Raises:
            InputError: it cannot be read.
        """
        return Aim(
            parse_objective(self.objective),
            tuple(map(parse_constraint, self.constraints)),
            ExamplePart(seed=self.seed, fresh=False),
        )

    @property
    def cache_bytes(self) -> int | None:
        """Bound on what is kept between trials; None: as much as suits the machine."""
        return None if self.cache_gb is None else int(self.cache_gb * BYTES_PER_GB)

    @property
    def suffix(self) -> str:
        """What tells this refinement of a plan from others of it, in its name."""
        plain = RefineOptions()
        parts = []
        if self.objective != plain.objective:
            parts.append(self.objective)
        parts += list(self.constraints)
        if self.against is not None:
            parts.append(f"against {self.against}")
        if set(self.strategies) != set(plain.strategies):
            parts.append("+".join(self.strategies))
        if self.sampler != plain.sampler:
            parts.append(self.sampler)
        if self.sequences != plain.sequences:
            parts.append(f"{self.sequences} sequences")
        if not self.prune:
            parts.append("no early stopping")
        if self.seed != plain.seed:
            parts.append(f"seed {self.seed}")
        return "".join(f" · {part}" for part in parts)


def options_of_search(
    trials: int, options: Mapping[str, Any] | None, held_out_sequences: int
) -> RefineOptions | None:
    """How a search refines; None where nobody asked for it.

    Raises:
        InputError: a value breaks its rule.
    """
    if not trials:
        return None
    return RefineOptions(
        **{"held_out_sequences": held_out_sequences, **(options or {}), "trials": trials}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineResult:
    """What a refinement found."""

    study: str
    trials_study: str  # name of the Optuna study in the same store
    trials: int  # that were measured, or stopped early
    start: PlanRecord
    plan: PlanRecord  # that is taken from now on: a refined plan, an earlier one, or the start
    verdict: Mapping[str, Any]  # of the fresh tokens, plain data

    @property
    def improved(self) -> bool:
        """Whether these trials found the plan; otherwise what was there before is kept."""
        return bool(self.verdict.get("accepted"))

    def as_plain(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "study": self.study,
            "trials_study": self.trials_study,
            "trials": self.trials,
            "improved": self.improved,
            "start": {"plan_id": self.start.id, "label": self.start.label},
            "plan": {"plan_id": self.plan.id, "label": self.plan.label},
            **self.verdict,
        }
