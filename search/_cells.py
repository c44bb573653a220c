"""Options that several limits see at once: losses, what each takes, and what fits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.search._relaxation import Choice

_ROUNDING = 1e-12
"""Differences of amounts are this exact, beside the limit: what oversteps by less may stay."""

_LAST_PLACES = 8 * np.finfo(np.float64).eps


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit: the cells' amounts plus what is fixed may sum up to `most`."""

    amounts: NDArray[np.float64]  # [groups, options]
    most: float
    fixed: float = 0.0
    whole: bool = False  # integers, whose sums are exact

    def total(self, choice: Choice) -> float:
        """What a choice takes, rounded once."""
        taken = self.amounts[np.arange(len(choice)), choice]
        return math.fsum([*taken.tolist(), self.fixed])


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What may be chosen, group by group, normalised.

    Losses and shares have the smallest of the options of their group taken off. A limit's shares
    are in units of its room, what is left of the limit when every group takes its least: but for
    rounding, what fits has shares that sum up to at most one, and the reverse. Options that cannot
    be in any choice that fits, and those that another beats or equals in everything, have loss inf
    and share 0.
    """

    losses: NDArray[np.float64]  # [groups, options]
    shares: NDArray[np.float64]  # [limits, groups, options]
    limits: tuple[Limit, ...]

    def fits(self, choice: Choice) -> bool:
        """Whether a choice stays within all limits, by their own amounts."""
        return all(limit.total(choice) <= limit.most for limit in self.limits)

    def loss_of(self, choice: Choice) -> float:
        """Summed loss of a choice over the least losses of its groups."""
        return math.fsum(self.losses[np.arange(len(choice)), choice].tolist())

    def used(self, choice: Choice) -> NDArray[np.float64]:
        """Summed shares of a choice, [limits]."""
        taken = self.shares[:, np.arange(len(choice)), choice]
        return np.asarray(taken.sum(axis=1), dtype=np.float64)

    @classmethod
    def of(
        cls, losses: NDArray[np.float64], usable: NDArray[np.bool_], limits: tuple[Limit, ...]
    ) -> Cells | None:
        """Cells of tables [groups, options]; None when a limit is below what any choice takes.

        Losses may be negative; each group has a usable option.
        """
        shares = np.empty((len(limits), *losses.shape))
        for share, limit in zip(shares, limits, strict=True):
            excess, room = _over_least(limit, usable)
            if room < 0:
                return None
            unit = room if limit.whole else _unit(limit, usable, room)
            usable = usable & (excess <= unit)
            share[:] = excess / (unit or 1.0)
        kept = usable & ~_dominated(np.where(usable, losses, np.inf), shares)
        least = np.where(kept, losses, np.inf).min(axis=1, keepdims=True)
        return cls(
            losses=np.where(kept, losses - least, np.inf),
            shares=np.where(kept, shares, 0.0),
            limits=limits,
        )


def _over_least(limit: Limit, usable: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float]:
    """What each cell takes more than the least of its group, and how much more fits in all."""
    least = np.where(usable, limit.amounts, np.inf).min(axis=1)
    spent = math.fsum([*least.tolist(), limit.fixed])
    return np.where(usable, limit.amounts - least[:, None], 0.0), limit.most - spent


def _unit(limit: Limit, usable: NDArray[np.bool_], room: float) -> float:
    """The room, and what rounding may have made an option that just fits exceed it by."""
    largest = float(np.abs(limit.amounts[usable]).max())
    rounding = _LAST_PLACES * max(largest, abs(limit.most), abs(limit.most - room))
    return max(room + rounding, _ROUNDING * abs(limit.most))


def _dominated(losses: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Options that another of the group equals or beats in everything; of equals the first stays."""
    options = losses.shape[1]
    beaten = np.zeros(losses.shape, dtype=np.bool_)
    for option in range(options):
        for other in range(options):
            if other == option:
                continue
            no_worse = losses[:, other] <= losses[:, option]
            equal = losses[:, other] == losses[:, option]
            for share in shares:
                no_worse &= share[:, other] <= share[:, option]
                equal &= share[:, other] == share[:, option]
            beaten[:, option] |= no_worse & ~equal if other > option else no_worse
    return beaten
