"""Layer by format as a grid: a row per block, a column per type and format."""

from __future__ import annotations

from dataclasses import dataclass

from autoq.formats import NONE
from autoq.report._data import GroupRow, ReportData
from autoq.report.layers import short_type

OUTSIDE = "outside"
"""The row of groups that belong to no block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGrid:
    """Predicted losses as a table; None where no group is or the format cannot be taken."""

    rows: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]  # type of layer, format
    losses: tuple[tuple[float | None, ...], ...]  # rows x columns
    chosen: tuple[tuple[int, int], ...]  # (row, column) of what the plan takes


def layer_grid(data: ReportData) -> LayerGrid:
    """The grid of a plan's groups; what is left unquantised has no column."""
    formats = [name for name in data.formats if name != NONE]
    several = len({group.position.stack for group in data.groups} - {None}) > 1
    places = [(_row(group, several), _type(group)) for group in data.groups]
    rows = tuple(dict.fromkeys(row for row, _ in places))
    types = dict.fromkeys(kind for _, kind in places)
    columns = tuple((kind, name) for kind in types for name in formats)
    row_of = {row: index for index, row in enumerate(rows)}
    column_of = {column: index for index, column in enumerate(columns)}
    losses: list[list[float | None]] = [[None] * len(columns) for _ in rows]
    chosen = []
    for group, (row, kind) in zip(data.groups, places, strict=True):
        for name in formats:
            losses[row_of[row]][column_of[kind, name]] = group.scores.get(name)
        if group.format != NONE:
            chosen.append((row_of[row], column_of[kind, group.format]))
    return LayerGrid(
        rows=rows,
        columns=columns,
        losses=tuple(tuple(row) for row in losses),
        chosen=tuple(chosen),
    )


def _row(group: GroupRow, several_stacks: bool) -> str:
    stack, block = group.position.stack, group.position.block
    if block is None:
        return OUTSIDE
    return f"{stack} {block}" if several_stacks else f"block {block}"


def _type(group: GroupRow) -> str:
    """Parent and short name: two kinds of attention in one block stay apart."""
    kind = group.position.type
    parent = kind.rpartition(".")[0].rpartition(".")[2]
    return ".".join(filter(None, [parent, short_type(kind)]))
