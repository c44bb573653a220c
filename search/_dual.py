"""Prices of several limits: the Lagrangian dual of choosing one option per group.

With a price for each limit, every group takes the option of least loss plus price times share, and

    q(prices) = sum over groups of min over options (loss + prices . shares) - sum of prices

is no more than the loss of any choice that fits. q is concave and piecewise linear; its maximum is
the linear relaxation's value. For few groups the relaxation itself is solved. For many, a sample of
them gives a start, and cutting planes (Kelley, 1960) within a box around the best prices so far
(Marsten, Hogan and Blankenship, 1975) go on from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.search._cells import Cells
from autoq.search._highs import quiet_stdout
from autoq.search._relaxation import Choice

Prices = NDArray[np.float64]
"""Loss per unit of each limit's room, [limits], not negative."""

_SAMPLE = 1500
"""Groups whose linear relaxation takes some tenths of a second."""

_ENOUGH = 1e-9
"""Distance between cutting planes and the best value, as a fraction of it, that is good enough:
what is left is a matter of single groups."""

_ITERATIONS = 120
_FIRST_BOX = 0.1
"""Half a box's width beside the price; a sample of 1500 groups is about that good."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lagrangian:
    """The relaxation at prices: what it proves, and how far above that a choice is.

    The excess of a choice that fits is the sum of its reduced losses and of what the room that it
    leaves is worth. All terms are non-negative, so nothing cancels.
    """

    cells: Cells
    prices: Prices
    bound: float  # no choice that fits has a lower loss
    reduced: NDArray[np.float64]  # [groups, options]: loss plus price times share over the least

    def excess_of(self, choice: Choice) -> float:
        """Loss over the bound of a choice that fits."""
        taken = self.reduced[np.arange(len(choice)), choice]
        unused = np.maximum(1.0 - self.cells.used(choice), 0.0)
        return math.fsum([*taken.tolist(), *(self.prices * unused).tolist()])


@dataclass(frozen=True, slots=True)
class _Value:
    prices: Prices
    value: float
    slope: NDArray[np.float64]  # [limits]


def lagrangian(cells: Cells) -> Lagrangian:
    """The relaxation at the best prices found."""
    found = _best(cells)
    priced = _priced(cells, found.prices)
    return Lagrangian(
        cells=cells,
        prices=found.prices,
        bound=found.value,
        reduced=priced - priced.min(axis=1, keepdims=True),
    )


def _best(cells: Cells) -> _Value:
    groups = len(cells.losses)
    highest = _highest_price(cells)
    if not len(cells.shares) or highest == 0.0:
        return _evaluate(cells, np.zeros(len(cells.shares)))
    if groups <= _SAMPLE:
        sample, part = np.arange(groups), 1.0
    else:
        sample = np.random.default_rng(0).choice(groups, _SAMPLE, replace=False)
        part = _SAMPLE / groups
    start = _relaxed(cells, sample, part, highest)
    values = [_evaluate(cells, start), _evaluate(cells, np.zeros_like(start))]
    return _climb(cells, values, highest)


def _priced(cells: Cells, prices: Prices) -> NDArray[np.float64]:
    priced = cells.losses.copy()
    for price, share in zip(prices, cells.shares, strict=True):
        if price:
            priced += price * share
    return priced


def _evaluate(cells: Cells, prices: Prices) -> _Value:
    priced = _priced(cells, prices)
    choice = priced.argmin(axis=1)
    value = float(priced[np.arange(len(choice)), choice].sum()) - float(prices.sum())
    return _Value(prices, value, cells.used(choice) - 1.0)


def _highest_price(cells: Cells) -> float:
    """A price that exceeds what any room can be worth where choices with some slack exist."""
    finite = np.where(np.isfinite(cells.losses), cells.losses, 0.0)
    return 1e6 * float(finite.max(axis=1).sum())


def _relaxed(cells: Cells, sample: NDArray[np.int64], part: float, highest: float) -> Prices:
    """The relaxation's prices for some groups with a like part of the room."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, hstack

    losses = cells.losses[sample]
    rows, options = np.nonzero(np.isfinite(losses))
    variables = np.arange(len(rows))
    limits = len(cells.shares)
    unit = float(np.where(np.isfinite(losses), losses, 0.0).max()) or 1.0
    # Shares of one group are tiny where there are many; the room is scaled to match.
    taken = cells.shares[:, sample][:, rows, options]
    scale = taken.max(axis=1)
    scale[scale == 0.0] = 1.0
    over = -np.eye(limits)  # exceeding a limit is possible, at the highest price
    above = hstack([coo_array(taken / scale[:, None]), coo_array(over)]).tocsr()
    one_each = coo_array((np.ones(len(rows)), (rows, variables)), shape=(len(sample), len(rows)))
    equal = hstack([one_each, coo_array((len(sample), limits))]).tocsr()
    with quiet_stdout():
        result = linprog(
            np.concatenate([losses[rows, options] / unit, np.full(limits, 1e6)]),
            A_ub=above,
            b_ub=part / scale,
            A_eq=equal,
            b_eq=np.ones(len(sample)),
            method="highs",
        )
    if result.ineqlin is None or result.status != 0:
        return np.zeros(limits)
    prices = -np.asarray(result.ineqlin.marginals) * unit / scale
    return np.asarray(np.clip(prices, 0.0, highest), dtype=np.float64)


def _climb(cells: Cells, values: list[_Value], highest: float) -> _Value:
    """Cutting planes within a box around the best prices; the box grows and shrinks by need."""
    best = max(values, key=lambda found: found.value)
    scale = float(np.where(np.isfinite(cells.losses), cells.losses, 0.0).max(axis=1).sum())
    box = np.maximum(_FIRST_BOX * best.prices, 1e-3 * best.prices.max() or 1e-3 * scale)
    for _ in range(_ITERATIONS):
        low, high = np.maximum(best.prices - box, 0.0), np.minimum(best.prices + box, highest)
        prices, promised = _highest_cut(values, low, high)
        enough = _ENOUGH * max(abs(best.value), _ENOUGH * scale)
        if prices is None or promised - best.value <= enough:
            break
        found = _evaluate(cells, prices)
        values.append(found)
        if found.value > best.value:
            best = found
            at_edge = (prices == low) | (prices == high)
            box = np.where(at_edge, box * 4, box)
        else:
            box = box / 2
    return best


def _highest_cut(values: list[_Value], low: Prices, high: Prices) -> tuple[Prices | None, float]:
    """Where in a box the least of all tangents is highest, and how high it is there."""
    from scipy.optimize import linprog

    best = max(found.value for found in values)
    span = np.where(high > low, high - low, 1.0)
    slopes = np.array([found.slope for found in values]) * span
    offsets = np.array(
        [found.value - best + found.slope @ (low - found.prices) for found in values]
    )
    unit = max(float(np.abs(slopes).max()), float(np.abs(offsets).max()), 1e-300)
    with quiet_stdout():
        result = linprog(
            np.concatenate([np.zeros(len(low)), [-1.0]]),
            A_ub=np.hstack([-slopes / unit, np.ones((len(values), 1))]),
            b_ub=offsets / unit,
            bounds=[*((0.0, float(wide)) for wide in high > low), (None, None)],
            method="highs",
        )
    if result.status != 0:
        return None, best
    place = result.x[:-1]
    prices = np.where(place >= 1.0, high, np.where(place <= 0.0, low, low + place * span))
    return prices, best + float(result.x[-1]) * unit
