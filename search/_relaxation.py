"""Options of decision groups, their convex hulls, and the linear relaxation at a capacity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Choice = NDArray[np.int64]
"""Group -> option column, [groups]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Undominated options: along a row, bits strictly rise and losses strictly fall.

    Rows are padded at the end with loss inf.
    """

    losses: NDArray[np.float64]  # [groups, options], the group's smallest taken off
    bits: NDArray[np.int64]  # [groups, options]
    columns: NDArray[np.int64]  # [groups, options], column in the table that came in

    def bits_of(self, choice: Choice) -> int:
        """Summed bits of a choice."""
        return int(self.bits[np.arange(len(choice)), choice].sum())

    def loss_of(self, choice: Choice) -> float:
        """Summed loss of a choice."""
        return math.fsum(self.losses[np.arange(len(choice)), choice])

    def floor_bits(self) -> int:
        """Fewest bits that any choice takes."""
        return int(self.bits[:, 0].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class HullSteps:
    """Steps along the groups' convex hulls, the most loss saved per bit first.

    Taking the first n steps from the cheapest options is optimal for the bits it takes.
    """

    groups: NDArray[np.int64]  # [steps]
    options: NDArray[np.int64]  # [steps], the option that the step leads to
    savings: NDArray[np.float64]  # [steps], loss saved per bit; never rises
    bits: NDArray[np.int64]  # [steps + 1], summed bits after that many steps

    def choice_after(self, steps: int, groups: int) -> Choice:
        """The choice after so many steps."""
        choice = np.zeros(groups, dtype=np.int64)
        choice[self.groups[:steps]] = self.options[:steps]
        return choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """The linear relaxation at one capacity.

    `excess_of` a choice is how far its loss is above the relaxation's bound. All its terms are
    non-negative, so nothing cancels, however small the excess is beside the loss.
    """

    options: Options
    capacity: int
    choice: Choice  # optimal at the price; fits
    price: float  # loss per bit
    reduced: NDArray[np.float64]  # [groups, options], >= 0

    def bound(self) -> float:
        """No choice within the capacity has a lower loss."""
        slack = self.capacity - self.options.bits_of(self.choice)
        return self.options.loss_of(self.choice) - self.price * slack

    def excess_of(self, choice: Choice) -> float:
        """Loss over the relaxation's bound of a choice that fits."""
        slack = self.capacity - self.options.bits_of(choice)
        return math.fsum(self.reduced[np.arange(len(choice)), choice]) + self.price * slack


def undominated(
    losses: NDArray[np.float64], bits: NDArray[np.int64], usable: NDArray[np.bool_]
) -> Options:
    """Drop every option that another of its group beats or equals in both loss and bits.

    Of options with equal loss the one with fewer bits stays; of equal ones the leftmost.

    Args:
        losses: [groups, columns]; read where `usable`.
        bits: [groups, columns].
        usable: [groups, columns]; at least one in every row.
    """
    masked = np.where(usable, losses, np.inf)
    order = np.lexsort((masked, np.where(usable, bits, np.iinfo(np.int64).max)), axis=1)
    sorted_losses = np.take_along_axis(masked, order, axis=1)
    best_before = np.minimum.accumulate(sorted_losses, axis=1)
    kept = np.isfinite(sorted_losses)
    kept[:, 1:] &= sorted_losses[:, 1:] < best_before[:, :-1]
    pack = np.argsort(~kept, axis=1, kind="stable")[:, : int(kept.sum(axis=1).max())]
    columns = np.take_along_axis(order, pack, axis=1)
    filled = np.take_along_axis(kept, pack, axis=1)
    regrets = np.take_along_axis(masked, columns, axis=1) - best_before[:, -1:]
    return Options(
        losses=np.where(filled, regrets, np.inf),
        bits=np.take_along_axis(bits, columns, axis=1),
        columns=columns,
    )


def hull_steps(options: Options) -> HullSteps:
    """All steps along the convex hulls, in the order in which a growing capacity takes them."""
    rows = np.arange(len(options.losses))
    current = np.zeros(len(rows), dtype=np.int64)
    limit = np.full(len(rows), np.inf)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    while True:
        saving = _saving_per_bit(options, current)
        target = saving.shape[1] - 1 - np.argmax(saving[:, ::-1], axis=1)
        # Hull steps lose value one by one; rounding must not reorder the steps of a group.
        limit = np.minimum(limit, saving[rows, target])
        moving = limit > 0
        if not moving.any():
            break
        found.append((rows[moving], target[moving], limit[moving]))
        current = np.where(moving, target, current)
    return _in_order(options, found)


def _saving_per_bit(options: Options, current: Choice) -> NDArray[np.float64]:
    rows = np.arange(len(current))
    later = np.arange(options.losses.shape[1]) > current[:, None]
    later &= np.isfinite(options.losses)
    extra = np.where(later, options.bits - options.bits[rows, current][:, None], 1)
    gain = np.where(later, options.losses[rows, current][:, None], -np.inf) - np.where(
        later, options.losses, 0.0
    )
    return np.asarray(gain / extra, dtype=np.float64)


def _in_order(
    options: Options,
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]],
) -> HullSteps:
    empty = np.empty(0, dtype=np.int64)
    groups = np.concatenate([step[0] for step in found]) if found else empty
    targets = np.concatenate([step[1] for step in found]) if found else empty
    savings = np.concatenate([step[2] for step in found]) if found else np.empty(0)
    order = np.lexsort((targets, groups, -savings))
    groups, targets, savings = groups[order], targets[order], savings[order]
    # The option before a step is where the group's step before it led; the first starts at 0.
    by_group = np.argsort(groups, kind="stable")
    first = np.concatenate([[True], groups[by_group][1:] != groups[by_group][:-1]])[: len(groups)]
    previous = np.empty_like(targets)
    previous[by_group] = np.where(first, 0, np.roll(targets[by_group], 1))
    extra = options.bits[groups, targets] - options.bits[groups, previous]
    bits = options.floor_bits() + np.concatenate([[0], np.cumsum(extra)])
    return HullSteps(groups=groups, options=targets, savings=savings, bits=bits)


def relax(options: Options, steps: HullSteps, capacity: int) -> Relaxation:
    """Solve the linear relaxation at a capacity that is at least the floor."""
    taken = int(np.searchsorted(steps.bits, capacity, side="right")) - 1
    choice = steps.choice_after(taken, len(options.losses))
    price = float(steps.savings[taken]) if taken < len(steps.savings) else 0.0
    rows = np.arange(len(choice))
    extra = options.bits - options.bits[rows, choice][:, None]
    reduced = options.losses - options.losses[rows, choice][:, None] + price * extra
    return Relaxation(
        options=options,
        capacity=capacity,
        choice=choice,
        price=price,
        reduced=np.maximum(reduced, 0.0),  # below zero only by rounding
    )
