"""The multiple-choice knapsack: one option per group, least loss within a capacity of bits.

Four steps find the optimum and prove it. The linear relaxation, a walk along the groups' convex
hulls, gives a lower bound and a price per bit. A greedy filling gives a plan that fits; with
100,000 groups that is within a millionth of the bound, with fewer `balanced` brings it nearer.
Whatever could still be better must consist of options whose reduced cost (loss plus price times
bits, over the group's best) is below the distance between the two; `_states` tries those, and mostly
ends with the optimum. Where it gives up, they go to HiGHS. Its
objective is the excess over the relaxation, scaled to a fixed size, so its absolute tolerances mean
the same for losses of 1e-12 and of 1e3.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.search import _highs
from autoq.search._balanced import balanced
from autoq.search._relaxation import Choice, HullSteps, Options, Relaxation, relax
from autoq.search._states import better_choice

_SCALED_EXCESS = 1e4
"""Size of the known excess in HiGHS's objective; its absolute gap of 1e-6 is 1e-10 of that."""

_LARGEST_ROW_ENTRY = 1024
"""HiGHS allows a row an absolute error of 1e-6: this keeps it at 1e-9 of the largest entry."""

_ROUNDING = 4 * np.finfo(np.float64).eps
_TIGHTENINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far above the least loss a choice may be proven to be, and still be taken as it is."""

    relative: float = 0.0  # a fraction of the choice's loss
    absolute: float = 0.0

    def allowed(self, loss: float) -> float:
        """For a choice of this loss; never below what floating point cannot tell apart."""
        return max(self.absolute, max(self.relative, _ROUNDING) * loss)


EXACT = Tolerance()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A choice that fits, and how much lower the loss of another could at most be."""

    choice: Choice
    unproved: float


def solve(
    options: Options,
    steps: HullSteps,
    capacity: int,
    *,
    time_limit_seconds: float,
    tolerance: Tolerance = EXACT,
) -> Answer:
    """The choice of least loss within `capacity`, which is at least the floor."""
    relaxation = relax(options, steps, capacity)
    choice = _fill(options, relaxation.choice, capacity)
    excess = relaxation.excess_of(choice)
    allowed = tolerance.allowed(options.loss_of(choice))
    if excess > allowed:
        found = balanced(relaxation, excess)
        if found is not None:
            choice = _fill(options, found, capacity)
            excess = relaxation.excess_of(choice)
    if excess <= allowed:
        return Answer(choice=choice, unproved=excess)
    # Of the bound's loss, which is no more than that of any choice.
    spared = 0.0 if tolerance == EXACT else tolerance.allowed(max(relaxation.bound(), 0.0))
    listed = better_choice(relaxation, excess, spared)
    if listed.choice is not None:
        choice, excess = listed.choice, relaxation.excess_of(listed.choice)
    if listed.proved:
        return Answer(choice=choice, unproved=min(excess, spared))
    deadline = time.monotonic() + time_limit_seconds
    core = _Core.of(relaxation, excess)
    # HiGHS's gap is a fraction of its own excess, which is no more than the known one.
    gap = allowed / excess if tolerance != EXACT else 0.0
    proved = 0.0
    tightening = 0
    for attempt in range(_TIGHTENINGS):
        found, bound = core.solve(tightening, deadline - time.monotonic(), gap)
        if attempt == 0:
            proved = max(bound, 0.0)
        if found is None:
            break
        over = options.bits_of(found) - capacity
        if over <= 0:
            if relaxation.excess_of(found) < excess:
                choice, excess = found, relaxation.excess_of(found)
            break
        # HiGHS overstepped by rounding: its bound holds, its choice does not.
        tightening += over
    return Answer(choice=choice, unproved=max(excess - proved, 0.0))


def _fill(options: Options, start: Choice, capacity: int) -> Choice:
    """Take, again and again, the change that saves most loss and still fits."""
    choice = start.copy()
    rows = np.arange(len(choice))
    while True:
        slack = capacity - options.bits_of(choice)
        fits = options.bits - options.bits[rows, choice][:, None] <= slack
        gain = options.losses[rows, choice][:, None] - options.losses
        gain = np.where(fits, gain, -np.inf)
        best = int(np.argmax(gain))
        group, option = divmod(best, gain.shape[1])
        if gain[group, option] <= 0:
            return choice
        choice[group] = option


@dataclass(frozen=True, slots=True, kw_only=True)
class _Core:
    """What a better choice may consist of, as a 0-1 program with one slack variable."""

    relaxation: Relaxation
    groups: NDArray[np.int64]  # [variables]
    options: NDArray[np.int64]  # [variables]
    scale: float  # objective units per unit of loss

    @classmethod
    def of(cls, relaxation: Relaxation, excess: float) -> _Core:
        # The known choice itself must stay, in spite of rounding, so that the core is feasible.
        kept = relaxation.reduced <= excess * (1 + 1e-9)
        open_groups = kept.sum(axis=1) > 1
        groups, options = np.nonzero(kept & open_groups[:, None])
        return cls(
            relaxation=relaxation, groups=groups, options=options, scale=_SCALED_EXCESS / excess
        )

    def solve(
        self, tightening: int, seconds: float, relative_gap: float
    ) -> tuple[Choice | None, float]:
        """The best choice and a lower bound on the excess, with the capacity so much smaller."""
        from scipy.sparse import csr_array

        bits, room = self._row()
        unit = _row_unit(bits)
        variables = len(bits)
        _, dense = np.unique(self.groups, return_inverse=True)
        picks = int(dense.max()) + 1
        slack = variables
        rows = csr_array(
            (
                np.concatenate([np.ones(variables), bits / unit, [1.0]]),
                (
                    np.concatenate([dense, np.full(variables + 1, picks)]),
                    np.concatenate([np.arange(variables), np.arange(variables), [slack]]),
                ),
            ),
            shape=(picks + 1, variables + 1),
        )
        right = np.concatenate([np.ones(picks), [(room - tightening) / unit]])
        reduced = self.relaxation.reduced[self.groups, self.options]
        answer = _highs.minimise(
            np.concatenate([reduced, [self.relaxation.price * unit]]) * self.scale,
            rows,
            (right, right),
            integers=np.arange(variables + 1) < slack,
            upper=np.concatenate([np.ones(variables), [np.inf]]),
            time_limit_seconds=seconds,
            relative_gap=relative_gap,
        )
        return self._choice(answer.values), answer.bound / self.scale

    def _row(self) -> tuple[NDArray[np.int64], int]:
        """Bits of each variable over the least of its group, and the room left for them."""
        options = self.relaxation.options
        choice = self.relaxation.choice.copy()
        first = np.unique(self.groups, return_index=True)[1]
        choice[self.groups[first]] = self.options[first]  # the fewest bits of each open group
        bits = options.bits[self.groups, self.options]
        least = options.bits[self.groups, choice[self.groups]]
        return bits - least, self.relaxation.capacity - options.bits_of(choice)

    def _choice(self, values: NDArray[np.float64] | None) -> Choice | None:
        if values is None:
            return None
        choice = self.relaxation.choice.copy()
        picked = np.flatnonzero(values[:-1] > 0.5)
        choice[self.groups[picked]] = self.options[picked]
        return choice


def _row_unit(bits: NDArray[np.int64]) -> float:
    """Divisor that makes the entries small whole numbers, or failing that, small numbers."""
    divisor = int(np.gcd.reduce(bits)) or 1
    largest = int(bits.max()) // divisor
    spare = max(math.ceil(math.log2(largest / _LARGEST_ROW_ENTRY)), 0) if largest else 0
    return float(divisor * 2**spare)
