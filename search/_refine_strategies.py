"""Where proposals come from: diverse plans, exchanges, and multiplied scores."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.search._refine_observations import Observations
from autoq.search._refine_posterior import Posterior
from autoq.search._refine_space import Space
from autoq.search._refine_types import Proposal, Source, Suggest, Trial
from autoq.search._types import Plan
from autoq.search.diverse import diverse_plans

Taken = Collection[bytes]
"""Keys of the plans that were proposed already."""

_DIVERSE_SLACK = 0.05
_DIVERSE_SECONDS = 2.0

_WIDTHS = (0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0, 1.5, 1.5, 2.0, 3.0, 4.0)
"""How far draws are from what is expected, tried in turn until a plan is new."""

_BLIND_ERROR = 0.5
"""Standard deviation of log losses, drawn as long as too little was measured to learn from."""

_FEWEST_DIFFERENCES = 2
_LOG2_RANGE = 2.0


def key(columns: NDArray[np.int64]) -> bytes:
    """A plan as something to look up."""
    return columns.astype(np.int64).tobytes()


def diverse(space: Space, count: int, seed: int) -> list[Plan]:
    """The optimum and plans near it, different from one another."""
    return diverse_plans(
        space.problem.sensitivity,
        space.problem.costs,
        space.budgets,
        count=count,
        loss_slack=_DIVERSE_SLACK,
        seed=seed,
        time_limit_seconds=_DIVERSE_SECONDS,
    )


def first_new(space: Space, plans: Sequence[Plan], taken: Taken) -> Proposal | None:
    """The first of the plans that was not proposed yet."""
    for rank, plan in enumerate(plans):
        if key(space.columns(plan.assignment)) not in taken:
            return Proposal(plan=plan, source=Source.DIVERSE, details={"rank": rank})
    return None


def reference_of(finished: Sequence[Trial]) -> Trial | None:
    """The trial that others are compared with: the start, or else the first complete one."""
    complete = [trial for trial in finished if trial.complete and trial.measured]
    starts = [trial for trial in complete if trial.source is Source.START]
    return next(iter([*starts, *complete]), None)


def observations(
    space: Space, finished: Sequence[Trial]
) -> tuple[Observations, list[Trial]] | None:
    """What was measured, and the trials it comes from, the reference first; None: too little."""
    reference = reference_of(finished)
    if reference is None:
        return None
    others = [trial for trial in finished if trial is not reference and trial.measured]
    if len(others) < _FEWEST_DIFFERENCES:
        return None
    trials = [reference, *others]
    _check_sequences(trials)
    measured = Observations(
        columns=tuple(space.columns(trial.assignment) for trial in trials),
        losses=tuple(np.array(trial.losses, dtype=np.float64) for trial in trials),
    )
    return measured, trials


def _check_sequences(trials: Sequence[Trial]) -> None:
    expected = len(trials[0].losses)
    for trial in trials:
        if len(trial.losses) > expected or (trial.complete and len(trial.losses) != expected):
            raise InputError(
                f"all trials must be measured on the same sequences, got {len(trial.losses)} in "
                f"trial {trial.number} and {expected} in trial {trials[0].number}; refine again "
                "with the same data"
            )


def posterior_of(space: Space, finished: Sequence[Trial]) -> Posterior | None:
    """What is known of all cells; None where too little was measured."""
    found = observations(space, finished)
    return None if found is None else Posterior(space.prior, found[0])


def exchange(
    space: Space,
    posterior: Posterior | None,
    incumbent: Plan,
    taken: Taken,
    generator: np.random.Generator,
) -> Proposal | None:
    """Exchange formats between groups: the optimum of what the measurements so far say.

    The knapsack is solved with the expected losses. Where that plan was proposed already (or is
    being measured), draws from the posterior, nearby at first, exchange other formats of the
    groups that are least certain.
    """
    for width, scores in next_scores(space, posterior, generator):
        plan = space.best_for(scores)
        if key(space.columns(plan.assignment)) not in taken:
            return Proposal(
                plan=plan,
                source=Source.SWAP,
                details={"exchanged": _exchanged(incumbent, plan), "width": width},
            )
    return None


def next_scores(
    space: Space, posterior: Posterior | None, generator: np.random.Generator
) -> Iterator[tuple[float, NDArray[np.float64]]]:
    """Widths and losses to solve for, until a plan is new: what is expected, then draws.

    Without a posterior, the scores, then the scores times random errors.
    """
    for width in (0.0, *_WIDTHS):
        if posterior is not None:
            yield width, posterior.draw(generator, width) if width else posterior.expected
            continue
        losses = space.prior.losses
        if width:
            noise = generator.standard_normal(losses.shape)
            losses = losses * np.exp(_BLIND_ERROR * max(width, 1.0) * noise)
        yield width, losses


def _exchanged(incumbent: Plan, plan: Plan) -> dict[str, Any]:
    return {
        group: [incumbent.assignment[group], name]
        for group, name in plan.assignment.items()
        if incumbent.assignment[group] != name
    }


def multiplied(
    space: Space, taken: Taken, suggest: Suggest, generator: np.random.Generator
) -> Proposal | None:
    """The optimum of the scores times a suggested factor for each class of layers.

    Where that plan was proposed already, small random errors are multiplied on top until another
    comes out.
    """
    names = space.layers.class_names
    logarithms = [suggest(f"log2 score of {name}", -_LOG2_RANGE, _LOG2_RANGE) for name in names]
    factors = 2.0 ** np.array(logarithms)[space.layers.classes]
    scores = space.prior.losses * factors[:, None]
    for width in (0.0, *_WIDTHS):
        noise = np.exp(_BLIND_ERROR * width * generator.standard_normal(scores.shape))
        plan = space.best_for(scores * noise)
        if key(space.columns(plan.assignment)) not in taken:
            found = dict(zip(names, factors_by_class(logarithms), strict=True))
            return Proposal(
                plan=plan,
                source=Source.MULTIPLIERS,
                details={"multipliers": found, "width": width},
            )
    return None


def factors_by_class(logarithms: Sequence[float]) -> list[float]:
    """Multipliers as numbers to read."""
    return [round(float(2.0**value), 4) for value in logarithms]
