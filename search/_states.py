"""The best choice near the relaxation's, found and proved by lists of undominated states.

One group after the other leaves the relaxation's choice or stays with it, those first whose changes
cost least per bit. A state is what was taken so far: how many bits more than the relaxation's choice,
and the reduced loss of that. Of two states that of fewer bits and of no more loss is enough (Nemhauser
and Ullmann, 1969). What a state can come to at best follows from the least that the groups after it
ask per bit; where that is no better than the best choice known, the state is dropped (Pisinger, 1995,
"A minimal algorithm for the multiple-choice knapsack problem": groups whose changes cost much are
hardly looked at). Looks with short lists find a choice that is good enough to drop most.

Where lists grow too long the search gives up, and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.search._relaxation import Choice, Relaxation

_STAYS = -1
"""Option of a group that stays with the relaxation's."""

_NEVER = 1e200
"""Loss per bit where no change is left; finite, so that no bits times it are no loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search has come to."""

    choice: Choice | None  # the best one that is better than the known one; it fits
    proved: bool  # no other choice is better by more than what was allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    """How far a search goes."""

    states: int  # of a list
    looked_at: float  # of all lists together
    steps: float


_LOOKS = (
    _Bounds(states=100, looked_at=math.inf, steps=100),
    _Bounds(states=2_000, looked_at=math.inf, steps=400),
    _Bounds(states=20_000, looked_at=4_000_000, steps=math.inf),
    _Bounds(states=100_000, looked_at=4_000_000, steps=math.inf),
)
"""Each with what the one before found; the last two take about half a second each, and 50 MB."""


_FEW_STATES, _TOGETHER = 32, 64
"""So many groups are looked at together for so few states: one by one they would take longer than
all that comes before, and mostly change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """What may be changed, by groups in the order in which they are looked at."""

    slack: int  # bits that the relaxation's choice leaves
    price: float
    groups: NDArray[np.int64]  # [steps]
    cheapest: NDArray[np.float64]  # [steps], least reduced loss of the group's changes
    usable: NDArray[np.bool_]  # [groups, options]
    more: NDArray[np.int64]  # [groups, options], bits over the relaxation's option
    losses: NDArray[np.float64]  # [groups, options], reduced
    gaining: NDArray[np.float64]  # [steps + 1], least loss per bit by which groups from a step on
    # take more
    saving: NDArray[np.float64]  # [steps + 1], and by which they take less

    def least(
        self,
        step: int | NDArray[np.int64],
        more: NDArray[np.int64],
        losses: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """The least excess that states can come to by changes from a step on, [states]."""
        left = self.slack - more
        ahead = np.where(left >= 0, self.gaining[step], -self.saving[step])
        return np.asarray(losses + left * ahead, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """A list of states, and how each came about."""

    more: NDArray[np.int64]
    losses: NDArray[np.float64]
    parents: NDArray[np.int32]  # in the list before
    options: NDArray[np.int16]  # that the step's group takes


@dataclass(frozen=True, slots=True)
class _Step:
    """How the states of a step came about, those that were dropped included."""

    group: int
    parents: NDArray[np.int32]  # among those that were kept a step before
    options: NDArray[np.int16]
    kept: NDArray[np.int64]  # places of those that were kept


def better_choice(relaxation: Relaxation, excess: float, allowed: float = 0.0) -> Found:
    """Look for a choice of less than `excess`, until none is better by more than `allowed`."""
    best: Choice | None = None
    for bounds in _LOOKS:
        found = _search(relaxation, excess, allowed, bounds)
        if found.choice is not None:
            best, excess = found.choice, relaxation.excess_of(found.choice)
        if found.proved:
            return Found(choice=best, proved=True)
    return Found(choice=best, proved=False)


def _search(relaxation: Relaxation, excess: float, allowed: float, bounds: _Bounds) -> Found:
    """One look at the groups; where it is bound to leave something out it proves nothing."""
    changes = _changes(relaxation, excess)
    more, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[_Step] = []
    best, place, looked_at, proved = excess, None, 0, True
    step = -1
    while (step := step + 1) < len(changes.groups):
        if changes.cheapest[step] >= best - allowed:
            continue  # nothing that the group could do is worth it
        if len(steps) >= bounds.steps or looked_at > bounds.looked_at:
            proved = False
            break
        grown = _grown(changes, step, more, losses, best - allowed)
        excesses = _excesses(changes, grown)
        lowest = int(excesses.argmin())
        if excesses[lowest] < best:
            best, place = float(excesses[lowest]), (len(steps), lowest)
        kept = _hopeful(changes, step + 1, grown, best - allowed)
        if len(kept) > bounds.states:
            proved = False
            kept = _most_promising(changes, step + 1, grown, kept, bounds.states)
        steps.append(_Step(int(changes.groups[step]), grown.parents, grown.options, kept))
        nothing_new = len(grown.more) == len(more)
        more, losses = grown.more[kept], grown.losses[kept]
        looked_at += len(grown.more)
        if not len(kept):
            break
        if nothing_new and len(kept) <= _FEW_STATES:
            step = _next_that_grows(changes, step + 1, more, losses, best - allowed) - 1
    return Found(choice=_choice(relaxation, steps, place), proved=proved)


def _changes(relaxation: Relaxation, excess: float) -> _Changes:
    options, base = relaxation.options, relaxation.choice
    more = options.bits - options.bits[np.arange(len(base)), base][:, None]
    usable = (relaxation.reduced < excess) & (more != 0)
    per_bit = np.full(more.shape, np.inf)
    np.divide(relaxation.reduced, np.abs(more), out=per_bit, where=usable)
    least = per_bit.min(axis=1)
    changing = np.flatnonzero(np.isfinite(least))
    groups = changing[np.argsort(least[changing], kind="stable")]
    gaining = _least_from_here(np.where(more > 0, per_bit, np.inf)[groups])
    saving = _least_from_here(np.where(more < 0, per_bit, np.inf)[groups])
    cheapest = np.where(usable, relaxation.reduced, np.inf)[groups].min(axis=1)
    return _Changes(
        slack=relaxation.capacity - options.bits_of(base),
        price=relaxation.price,
        groups=groups,
        cheapest=cheapest,
        usable=usable,
        more=more,
        losses=relaxation.reduced,
        # Bits that nobody takes cost the price.
        gaining=np.minimum(gaining, relaxation.price),
        saving=np.minimum(saving, _NEVER),
    )


def _least_from_here(per_bit: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least of a step's row and of all that follow it, [steps + 1]; inf behind the last."""
    of_step = np.append(per_bit.min(axis=1), np.inf)
    return np.asarray(np.minimum.accumulate(of_step[::-1])[::-1], dtype=np.float64)


def _grown(
    changes: _Changes,
    step: int,
    more: NDArray[np.int64],
    losses: NDArray[np.float64],
    below: float,
) -> _States:
    """The states, and those that they become when the step's group changes, unless hopeless."""
    group = changes.groups[step]
    stay = np.arange(len(more), dtype=np.int32)
    parents, options = [stay], [np.full(len(stay), _STAYS, dtype=np.int16)]
    all_more, all_losses = [more], [losses]
    for option in np.flatnonzero(changes.usable[group] & (changes.losses[group] < below)):
        then_more = more + changes.more[group, option]
        then_losses = losses + changes.losses[group, option]
        kept = np.flatnonzero(changes.least(step + 1, then_more, then_losses) < below)
        if len(kept):
            all_more.append(then_more[kept])
            all_losses.append(then_losses[kept])
            parents.append(kept.astype(np.int32))
            options.append(np.full(len(kept), option, dtype=np.int16))
    return _States(
        more=np.concatenate(all_more),
        losses=np.concatenate(all_losses),
        parents=np.concatenate(parents),
        options=np.concatenate(options),
    )


def _next_that_grows(
    changes: _Changes,
    start: int,
    more: NDArray[np.int64],
    losses: NDArray[np.float64],
    below: float,
) -> int:
    """The first step from `start` on that makes of few states one that is not hopeless.

    Where there is none, as many as there are steps.
    """
    count = len(changes.groups)
    for first in range(start, count, _TOGETHER):
        steps = np.arange(first, min(first + _TOGETHER, count))
        groups = changes.groups[steps]
        then_more = more[:, None, None] + changes.more[groups]
        then_losses = losses[:, None, None] + changes.losses[groups]
        hopeful = changes.least(steps[:, None] + 1, then_more, then_losses) < below
        worth_it = changes.usable[groups] & (changes.losses[groups] < below)
        growing = np.flatnonzero((hopeful & worth_it).any(axis=(0, 2)))
        if len(growing):
            return first + int(growing[0])
    return count


def _excesses(changes: _Changes, states: _States) -> NDArray[np.float64]:
    """What states come to when nothing else changes; inf for those that do not fit."""
    left = changes.slack - states.more
    return np.where(left >= 0, states.losses + changes.price * left, np.inf)


def _hopeful(changes: _Changes, step: int, states: _States, below: float) -> NDArray[np.int64]:
    """Places of the states that may still come below, without those that another beats."""
    kept = np.flatnonzero(changes.least(step, states.more, states.losses) < below)
    # Bits that are not taken are worth their price: a state of fewer bits beats another unless that
    # has lost less by more than the bits between are worth.
    # The lists that states came from are in order of bits, so that this sorting is a merge.
    more = states.more[kept]
    order = np.argsort(more, kind="stable")
    worth = (states.losses[kept] - changes.price * more)[order]
    unbeaten = np.ones(len(order), dtype=np.bool_)
    unbeaten[1:] = worth[1:] < np.minimum.accumulate(worth)[:-1]
    order = order[unbeaten]
    # Of equally many bits the last has lost least.
    is_last = np.ones(len(order), dtype=np.bool_)
    is_last[:-1] = more[order[1:]] != more[order[:-1]]
    return np.asarray(kept[order[is_last]], dtype=np.int64)


def _most_promising(
    changes: _Changes, step: int, states: _States, places: NDArray[np.int64], most: int
) -> NDArray[np.int64]:
    """Of some states those that may come to least, in the order in which they were."""
    least = changes.least(step, states.more[places], states.losses[places])
    return np.asarray(places[np.sort(np.argpartition(least, most)[:most])], dtype=np.int64)


def _choice(
    relaxation: Relaxation, steps: list[_Step], place: tuple[int, int] | None
) -> Choice | None:
    """The choice that a state of a step stands for."""
    if place is None:
        return None
    choice = relaxation.choice.copy()
    last, state = place
    for index in range(last, -1, -1):
        step = steps[index]
        option = int(step.options[state])
        if option != _STAYS:
            choice[step.group] = option
        if index:
            state = int(steps[index - 1].kept[step.parents[state]])
    return choice
