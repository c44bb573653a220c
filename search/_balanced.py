"""A better choice near the relaxation's: dynamic programming over the few options that matter.

The relaxation's choice leaves a remainder of the capacity that no single change fills well. From it
on, groups change one after the other, nearest options first kept few; the state is how many bits
more or less than the relaxation's choice are taken, within a window around the remainder (Pisinger,
1995, calls such choices balanced). Bits are counted in units, rounded up, so what comes out fits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoq.search._relaxation import Choice, Relaxation

_OPTIONS = 250
"""Options beside the relaxation's that are tried, those of least reduced loss."""

_STATES = 1024
"""Of the window; each option is one pass over them, some microseconds."""


def balanced(relaxation: Relaxation, excess: float) -> Choice | None:
    """A choice whose excess is below `excess`, if one is found; it fits."""
    groups, options, base = _nearest(relaxation, excess)
    if not len(groups):
        return None
    bits = relaxation.options.bits
    more = bits[groups, options] - bits[groups, base[groups]]
    slack = relaxation.capacity - relaxation.options.bits_of(base)
    reach = max(int(np.abs(more).max()), abs(slack))
    divisor = int(np.gcd.reduce(more))
    unit = divisor * max(-(-4 * reach // (_STATES * divisor)), 1)
    half = 2 * reach // unit + 1
    losses = np.full(2 * half + 1, np.inf)
    losses[half] = 0.0
    steps = -(-more // unit)
    picked = _passes(losses, groups, options, steps, relaxation.reduced)
    last = min(half + slack // unit, 2 * half)
    used = np.arange(last + 1) - half
    unused = np.maximum(slack - used * unit, 0)
    state = int((losses[: last + 1] + relaxation.price * unused).argmin())
    choice = _traced(base, state, picked, groups, options, steps)
    fits = relaxation.options.bits_of(choice) <= relaxation.capacity
    return choice if fits and relaxation.excess_of(choice) < excess else None


def _nearest(
    relaxation: Relaxation, excess: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], Choice]:
    """Groups and options of changes, sorted by group, and the relaxation's choice."""
    base = relaxation.choice
    groups, options = np.nonzero(relaxation.reduced <= excess)
    changes = options != base[groups]
    groups, options = groups[changes], options[changes]
    nearest = np.sort(relaxation.reduced[groups, options].argsort(kind="stable")[:_OPTIONS])
    return groups[nearest], options[nearest], base


def _passes(
    losses: NDArray[np.float64],
    groups: NDArray[np.int64],
    options: NDArray[np.int64],
    steps: NDArray[np.int64],
    reduced: NDArray[np.float64],
) -> list[tuple[int, NDArray[np.int64]]]:
    """Let each group in turn change; updates `losses`, returns each group's change by state."""
    picked = []
    size = len(losses)
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(groups)], strict=True):
        before = losses.copy()
        taken = np.full(size, -1, dtype=np.int64)
        for change in range(start, end):
            step = int(steps[change])
            if abs(step) >= size:
                continue
            shifted = np.full(size, np.inf)
            into = slice(max(step, 0), size + min(step, 0))
            shifted[into] = before[max(-step, 0) : size - max(step, 0)]
            shifted += reduced[groups[change], options[change]]
            better = shifted < losses
            losses[better] = shifted[better]
            taken[better] = change
        picked.append((int(groups[start]), taken))
    return picked


def _traced(
    base: Choice,
    state: int,
    picked: list[tuple[int, NDArray[np.int64]]],
    groups: NDArray[np.int64],
    options: NDArray[np.int64],
    steps: NDArray[np.int64],
) -> Choice:
    choice = base.copy()
    for group, taken in reversed(picked):
        change = int(taken[state])
        if change >= 0:
            choice[group] = options[change]
            state -= int(steps[change])
    return choice
