"""What tables must be like before anything is solved."""

from __future__ import annotations

import difflib

import numpy as np
from numpy.typing import NDArray

from autoq.errors import BudgetInfeasibleError, InputError
from autoq.formats import NONE
from autoq.search._types import CostTable, SensitivityTable

PRINTED_BITS_ERROR = 0.5e-4
"""How far a floor or ceiling copied from our four printed decimals may be off, in bits."""


def bits_between(costs: CostTable, usable: NDArray[np.bool_]) -> tuple[float, float]:
    """Floor and ceiling in effective bits per weight; every group has a usable cell."""
    most = np.iinfo(np.int64).max
    floor = np.where(usable, costs.effective_bits, most).min(axis=1).sum()
    ceiling = np.where(usable, costs.effective_bits, 0).max(axis=1).sum()
    weights = int(costs.weights.sum())
    return int(floor) / weights, int(ceiling) / weights


def check_between(budget_bits: float, floor_bits: float, ceiling_bits: float) -> None:
    """Refuse a budget that is out of reach, but for the rounding of the printed limits.

    Raises:
        BudgetInfeasibleError: it is below the floor or above the ceiling, or no number.
    """
    lowest, highest = floor_bits - PRINTED_BITS_ERROR, ceiling_bits + PRINTED_BITS_ERROR
    if not lowest <= budget_bits <= highest:
        raise BudgetInfeasibleError(budget_bits, floor_bits, ceiling_bits)


def check_usable(costs: CostTable, usable: NDArray[np.bool_]) -> None:
    """Refuse tables that leave nothing to decide, or a group without a format.

    Raises:
        InputError: there is no group, or one has no usable cell.
    """
    if not costs.groups:
        raise InputError(
            "a search must have at least one group to decide, got none; exclude fewer layers"
        )
    stuck = np.flatnonzero(~usable.any(axis=1))
    if stuck.size:
        raise InputError(
            "every group must have a format that it may take, got none for "
            f"{costs.groups[stuck[0]]!r}; allow none for it"
        )


def check_tables(sensitivity: SensitivityTable, costs: CostTable) -> None:
    """Refuse costs of groups or formats that have no scores, or in tables of another shape.

    Raises:
        InputError: the tables do not belong together.
    """
    _check_shapes(costs)
    scored = set(sensitivity.groups)
    unscored = [name for name in costs.groups if name not in scored]
    if unscored:
        raise InputError(
            f"every group with costs must have scores, got none for {unscored[0]!r}"
            f"{_near(unscored[0], sensitivity.groups)}; score the same model map"
        )
    unknown = [name for name in costs.formats if name not in (*sensitivity.formats, NONE)]
    if unknown:
        raise InputError(
            f"every format with costs must have scores, got none for {unknown[0]!r} (scored: "
            f"{', '.join(sensitivity.formats)}); score it first or leave it out"
        )


def _check_shapes(costs: CostTable) -> None:
    for resource, table in costs.additional.items():
        if table.shape != costs.allowed.shape:
            raise InputError(
                f"costs in {resource.value} must be [groups, formats] {costs.allowed.shape}, got "
                f"{table.shape}; build them from the same model map"
            )
        broken = np.argwhere(costs.allowed & ~(np.isfinite(table) & (table >= 0)))
        if broken.size:
            row, column = broken[0]
            raise InputError(
                f"costs in {resource.value} must be finite and not negative, got "
                f"{table[row, column]} for group {costs.groups[row]!r} in "
                f"{costs.formats[column]}; measure it again or forbid the format there"
            )


def _near(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known)
    return f" (near: {', '.join(close)})" if close else ""
