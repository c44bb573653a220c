"""What people read on the terminal."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autoq.report._validation import (
    QUALITY_HEAD,
    ValidationData,
    line_text,
    quality_cells,
    validation_text,
)
from autoq.report.kv_cache import cache_text
from autoq.report.numbers import (
    MISSING,
    bits_text,
    bytes_text,
    count_text,
    interval_text,
    loss_text,
    metric_text,
    metric_value_text,
    percent_text,
    unit_text,
)
from autoq.report.resources import budgets_text, gigabytes_text, least_lines, takes_lines

if TYPE_CHECKING:
    from autoq.report import GroupRow, MeasurementRow, Metric, ReportData
    from autoq.search import Plan

PIPED_WIDTH = 100
"""Columns of output that does not go to a terminal, unless COLUMNS says otherwise."""

_OWN_PLAN = "< this plan"

COMPACT_FROM_ROWS = 60
"""With more groups than this, equal neighbours share a line."""


def make_console() -> Console:
    """Standard output; as wide as the terminal, and without colours when piped."""
    console = _PlainConsole(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return _PlainConsole(highlight=False, width=PIPED_WIDTH)
    return console


class _PlainConsole(Console):
    """A console that leaves it to the command what a closed pipe means."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def print_summary(console: Console, data: ReportData) -> None:
    """The panel, what was measured where several plans were, and the groups."""
    console.print(_summary_panel(data))
    if len(data.measurements) > 1:
        console.print(_measurement_table(data.measurements))
    console.print(_group_table(data.groups))
    if data.kv_cache is not None and len(data.kv_cache.formats) > 1:
        rows = list(data.kv_cache.layers.items())
        console.print(plain_table("cached by", "format", rows=rows))


def _summary_panel(data: ReportData) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _summary_lines(data):
        grid.add_row(name, Text(value))
    return Panel(grid, title=Text(data.study), title_align="left", expand=False)


def _summary_lines(data: ReportData) -> list[tuple[str, str]]:
    effective, peer = bits_text(data.effective_bits), bits_text(data.peer_effective_bits)
    stored, size = bits_text(data.stored_bits_per_weight), bytes_text(data.stored_bytes)
    loss = f"{loss_text(data.predicted_loss)} {unit_text(data.unit)}"
    lines = [
        ("model", data.model),
        ("budget", budgets_text(data)),
        ("effective bits", f"{effective} (as ModelOpt counts: {peer})"),
        ("stored", f"{stored} bits per weight, {size} for the searched layers"),
        *takes_lines(data),
        ("predicted loss", f"{loss} (95 %: {interval_text(*data.predicted_loss_interval)})"),
        ("gap", f"{percent_text(data.gap)} (no plan is below {loss_text(data.bound)})"),
        *least_lines(data),
    ]
    if data.predicted_calibrated is not None:
        lines.insert(-1, ("predicted, calibrated", _with_interval(data.predicted_calibrated)))
    if data.target is not None:
        lines.insert(2, ("target", data.target))
    if data.kv_cache is not None:
        lines.insert(-2, ("KV cache", cache_text(data.kv_cache)))
    if data.refined_from is not None:
        lines.insert(2, ("refined", f"from {data.refined_from}, by measured trials"))
    for name, value in data.measured.items():
        measured = f"{metric_value_text(name, value)}{_interval_of(data, name, value)}"
        lines.append((metric_text(name), measured))
        if name == "kl_divergence" and data.noise_floor is not None:
            lines.append(("noise floor", _with_interval(data.noise_floor)))
    if not data.measured:
        lines.append(("measured", "nothing yet"))
    if data.validation is not None:
        lines.append(("validation", validation_text(data.validation)))
    return lines


def _with_interval(found: Metric) -> str:
    return f"{loss_text(found.value)} (95 %: {interval_text(found.low, found.high)})"


def _interval_of(data: ReportData, name: str, value: float) -> str:
    for row in data.measurements:
        metric = row.metric(name)
        if metric is not None and metric.value == value and metric.low is not None:
            ends = (metric_value_text(name, end) for end in (metric.low, metric.high))
            return f" (95 %: {' to '.join(ends)})"
    return ""


def _measurement_table(rows: Sequence[MeasurementRow]) -> Table:
    names = list(dict.fromkeys(metric.name for row in rows for metric in row.metrics))
    shown = [name for name in names if not name.startswith("reference_")]
    compared = any(row.this_plan for row in rows)
    head = ["measured plan", "bits", "predicted", *(metric_text(name) for name in shown)]
    table = _table(*head, *(["this plan is"] if compared else []))
    for row in rows:
        cells = [_metric_text(row.metric(name)) for name in shown]
        if compared:
            cells.append(row.this_plan or MISSING)
        table.add_row(
            Text(row.label), bits_text(row.effective_bits), loss_text(row.predicted_loss), *cells
        )
    return table


def _metric_text(metric: Metric | None) -> str:
    return MISSING if metric is None else metric_value_text(metric.name, metric.value)


@dataclass(frozen=True, slots=True)
class _GroupLine:
    """One group, or neighbouring blocks of one type that took the same format."""

    name: str
    format: str
    weights: int
    predicted_loss: float


def _group_table(groups: Sequence[GroupRow]) -> Table:
    lines = [_line_of([group]) for group in groups]
    if len(groups) > COMPACT_FROM_ROWS:
        lines = _compact(groups)
    total = sum(line.predicted_loss for line in lines)
    table = _table("group", "format", "weights", "loss", "share of loss", text_columns=2)
    for line in lines:
        share = line.predicted_loss / total if total > 0.0 else None
        table.add_row(
            Text(line.name),
            Text(line.format),
            count_text(line.weights),
            loss_text(line.predicted_loss),
            MISSING if share is None else f"{share:.1%}",
        )
    return table


def _compact(groups: Sequence[GroupRow]) -> list[_GroupLine]:
    """Groups of one type by depth, neighbours in one format joined."""
    by_type: dict[tuple[str | None, str], list[GroupRow]] = {}
    for group in groups:
        by_type.setdefault((group.position.stack, group.position.type), []).append(group)
    return [
        _line_of(list(run))
        for members in by_type.values()
        for _, run in groupby(members, key=lambda group: group.format)
    ]


def _line_of(run: Sequence[GroupRow]) -> _GroupLine:
    first, last = run[0], run[-1]
    name = first.name
    if len(run) > 1:
        stack = f"{first.position.stack}." if first.position.stack else ""
        blocks = f"{first.position.block}-{last.position.block}"
        name = f"{stack}[{blocks}].{first.position.type}"
    return _GroupLine(
        name,
        first.format,
        sum(group.weights for group in run),
        sum(group.predicted_loss or 0.0 for group in run),
    )


def print_frontier(console: Console, data: ReportData, plans: Sequence[Plan]) -> None:
    """Every plan of the frontier, fewest bits first, and the study's own among them."""
    lines = [_frontier_line(plan, data.effective_bits) for plan in plans]
    if data.effective_bits not in [bits for bits, _ in lines] and data.effective_bits is not None:
        lines.append((data.effective_bits, _own_line(data)))
    console.print(
        Text(f"{data.study}: the best plan for each budget, loss in {unit_text(data.unit)}")
    )
    is_known = all("stored_bytes" in plan.takes for plan in plans)
    size = "on disk" if is_known else "searched layers"
    head = ("effective bits", size, "predicted loss", "95 %", "gap", "")
    table = _table(*head, text_columns=0)
    for _, cells in sorted(lines, key=lambda line: line[0]):
        table.add_row(*cells)
    console.print(table)


def _frontier_line(plan: Plan, own_bits: float | None) -> tuple[float, list[str]]:
    return plan.effective_bits, [
        bits_text(plan.effective_bits),
        _size_text(
            {str(resource): amount for resource, amount in plan.takes.items()}, plan.stored_bytes
        ),
        loss_text(plan.predicted_loss),
        interval_text(*plan.predicted_loss_interval),
        percent_text(plan.gap),
        _OWN_PLAN if plan.effective_bits == own_bits else "",
    ]


def _own_line(data: ReportData) -> list[str]:
    return [
        bits_text(data.effective_bits),
        _size_text(data.takes, data.stored_bytes),
        loss_text(data.predicted_loss),
        interval_text(*data.predicted_loss_interval),
        percent_text(data.gap),
        _OWN_PLAN,
    ]


def print_validation(console: Console, study: str, found: ValidationData) -> None:
    """How the predictions fared, by kind of plans, and what corrects them."""
    words = f"{study}: predicted against measured loss, {found.sequences} held-out sequences"
    console.print(Text(words))
    table = _table(*QUALITY_HEAD)
    for row in found.quality:
        table.add_row(*(Text(cell) for cell in quality_cells(row, found.unit)))
    console.print(table)
    if found.noise_floor is not None:
        console.print(Text(f"noise floor: {_with_interval(found.noise_floor)} nats per token"))
    if found.line is not None:
        console.print(Text(f"calibration: {line_text(found.line)}"))


def _size_text(takes: Mapping[str, float], searched_bytes: int | None) -> str:
    if "stored_bytes" in takes:
        return gigabytes_text(takes["stored_bytes"])
    return bytes_text(searched_bytes)


def _table(*columns: str, text_columns: int = 1) -> Table:
    """A plain table; all but the first `text_columns` columns hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        if index < text_columns:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right")
    return table


def plain_table(*columns: str, rows: Sequence[Sequence[str]]) -> Table:
    """A table of text."""
    table = _table(*columns, text_columns=len(columns))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def numbers_table(
    title: str, *columns: str, rows: Sequence[Sequence[str]], text_columns: int
) -> Table:
    """A titled table whose last columns hold numbers."""
    table = _table(*columns, text_columns=text_columns)
    table.title, table.title_justify, table.title_style = title, "left", "bold"
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table
