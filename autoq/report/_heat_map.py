"""Layer by format: how much each decision would lose, and what was decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autoq.formats import NONE
from autoq.report._axes import log_ticks, tick_text
from autoq.report._colours import format_colours, loss_colour, loss_range, ramp_colour
from autoq.report._data import GroupRow
from autoq.report.layers import short_type
from autoq.report.markup import Markup, join, tag
from autoq.report.numbers import count_text, loss_text, unit_text

_PAGE_WIDTH = 1056.0
_TYPE_GAP = 14.0
_LEFT = 64.0
_HEADER = 96.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """The groups of one stack of blocks, or those outside every block."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]  # types
    cells: Mapping[tuple[str, str], GroupRow]


@dataclass(frozen=True, slots=True)
class _Box:
    """A cell's place in the picture, in pixels."""

    left: float
    top: float
    width: float
    height: float

    def rect(self, *content: Markup, inset: float, **attributes: object) -> Markup:
        """The rectangle, smaller by `inset` on every side."""
        return tag(
            "rect",
            *content,
            x=self.left + inset,
            y=self.top + inset,
            width=self.width - 2 * inset,
            height=self.height - 2 * inset,
            **attributes,
        )


def panels(groups: Sequence[GroupRow]) -> list[Panel]:
    """The groups by stack, in the order in which stacks, blocks and types first occur."""
    by_stack: dict[str | None, list[GroupRow]] = {}
    for group in groups:
        by_stack.setdefault(group.position.stack, []).append(group)
    return [_panel(stack, members) for stack, members in by_stack.items()]


def _panel(stack: str | None, groups: Sequence[GroupRow]) -> Panel:
    if stack is None:
        return Panel(
            title="outside the blocks",
            rows=("",),
            columns=tuple(group.name for group in groups),
            cells={("", group.name): group for group in groups},
        )
    cells = {(str(group.position.block), group.position.type): group for group in groups}
    return Panel(
        title=stack or "blocks",
        rows=tuple(dict.fromkeys(row for row, _ in cells)),
        columns=tuple(dict.fromkeys(column for _, column in cells)),
        cells=cells,
    )


def heat_map(groups: Sequence[GroupRow], formats: Sequence[str], unit: str) -> Markup:
    """One picture per stack: a row per block, a column per type and format, colour by loss."""
    quantised = [name for name in formats if name != NONE]
    low, high = loss_range(group.scores.get(name) for group in groups for name in quantised)
    pictures = [
        join([tag("h3", panel.title), _heat_panel(panel, formats, low, high)])
        for panel in panels(groups)
    ]
    return join([_ramp_legend(low, high, unit), *pictures])


def _heat_panel(panel: Panel, formats: Sequence[str], low: float, high: float) -> Markup:
    height = _row_height(len(panel.rows))
    cell_width = _cell_width(len(panel.columns), len(formats))
    type_width = max(cell_width * len(formats), _widest_header(panel))
    parts: list[Markup] = []
    for column, type_name in enumerate(panel.columns):
        left = _LEFT + column * (type_width + _TYPE_GAP)
        parts.append(_heat_header(type_name, formats, left, cell_width))
        for row, row_name in enumerate(panel.rows):
            group = panel.cells.get((row_name, type_name))
            if group is not None:
                top = _HEADER + row * height
                box = _Box(left, top, cell_width, height)
                parts.append(_heat_cells(group, formats, box, (low, high)))
    parts.append(_row_names(panel.rows, height))
    width = _LEFT + len(panel.columns) * (type_width + _TYPE_GAP)
    return _picture(parts, width, _HEADER + len(panel.rows) * height + 6, "Sensitivity heat map")


def _heat_header(type_name: str, formats: Sequence[str], left: float, cell_width: float) -> Markup:
    parts = [tag("title", type_name), tag("text", *_two_lines(type_name, left), class_="head")]
    for index, name in enumerate(formats):
        x = left + (index + 0.5) * cell_width + 4
        turned = f"rotate(-90 {x:.1f} {_HEADER - 6:.1f})"
        parts.append(tag("text", name, x=x, y=_HEADER - 6, transform=turned, class_="tick"))
    return tag("g", *parts)


def _two_lines(type_name: str, left: float) -> list[Markup]:
    parent = type_name.rpartition(".")[0].rpartition(".")[2]
    lines = [parent, short_type(type_name)]
    return [tag("tspan", line, x=left, y=12 + 14 * row) for row, line in enumerate(lines)]


def _widest_header(panel: Panel) -> float:
    """Pixels that the two header lines of the widest type take."""
    lines = [
        line
        for name in panel.columns
        for line in (name.rpartition(".")[0].rpartition(".")[2], short_type(name))
    ]
    return 6.6 * max(len(line) for line in lines)


def _heat_cells(
    group: GroupRow, formats: Sequence[str], first: _Box, ends: tuple[float, float]
) -> Markup:
    boxes = [replace(first, left=first.left + index * first.width) for index in range(len(formats))]
    cells = [_heat_cell(group, name, box, ends) for name, box in zip(formats, boxes, strict=True)]
    chosen = boxes[formats.index(group.format)]
    # Two strokes, of which one is seen on whatever colour the cell has.
    return join([*cells, *(chosen.rect(inset=2, class_=style) for style in ("halo", "outline"))])


def _heat_cell(group: GroupRow, name: str, box: _Box, ends: tuple[float, float]) -> Markup:
    loss, error = group.scores.get(name), group.standard_errors.get(name)
    if name == NONE:
        style, fill, says = "cell empty", None, "no loss"
    elif loss is None:
        style, fill, says = "cell barred", None, "cannot take this format"
    else:
        spread = f" (standard error {loss_text(error)})" if error is not None else ""
        style, fill, says = "cell", loss_colour(loss, *ends), f"loss {loss_text(loss)}{spread}"
    chosen = "; chosen" if name == group.format else ""
    title = tag("title", f"{group.name} in {name}: {says}{chosen}")
    return box.rect(title, inset=0.5, fill=fill, class_=style)


def plan_strip(groups: Sequence[GroupRow], formats: Sequence[str]) -> Markup:
    """One picture per stack: a row per type, a column per block, colour by chosen format."""
    colours = format_colours(formats)
    pictures = [
        join([tag("h3", panel.title), _strip_panel(panel, colours)]) for panel in panels(groups)
    ]
    return join([_format_legend(groups, colours), *pictures])


def _strip_panel(panel: Panel, colours: Mapping[str, str]) -> Markup:
    names = {column: _strip_name(column) for column in panel.columns}
    left = 20 + 6.8 * max(len(name) for name in names.values())
    width = min(max((_PAGE_WIDTH - left) / len(panel.rows), 9.0), 44.0)
    parts: list[Markup] = []
    for row, type_name in enumerate(panel.columns):
        top = 8 + row * 26.0
        parts.append(tag("text", names[type_name], x=left - 10, y=top + 16, text_anchor="end"))
        for column, block in enumerate(panel.rows):
            group = panel.cells.get((block, type_name))
            if group is not None:
                parts.append(_strip_cell(group, left + column * width, top, width, colours))
    bottom = 8 + len(panel.columns) * 26.0
    parts.append(_block_numbers(panel.rows, left, width, bottom + 14))
    return _picture(parts, left + width * len(panel.rows) + 12, bottom + 22, "Chosen formats")


def _strip_name(type_name: str) -> str:
    parent = type_name.rpartition(".")[0].rpartition(".")[2]
    return ".".join(filter(None, [parent, short_type(type_name)]))


def _strip_cell(
    group: GroupRow, left: float, top: float, width: float, colours: Mapping[str, str]
) -> Markup:
    title = (
        f"{group.name}: {group.format}, {count_text(group.weights)} weights, "
        f"loss {loss_text(group.predicted_loss)}"
    )
    return tag(
        "rect",
        tag("title", title),
        x=left + 0.5,
        y=top + 0.5,
        width=width - 1,
        height=23,
        rx=2,
        fill=colours[group.format],
    )


def _block_numbers(rows: Sequence[str], left: float, width: float, y: float) -> Markup:
    every = max(1, round(26 / width))
    return join(
        tag("text", name, x=left + (index + 0.5) * width, y=y, text_anchor="middle", class_="tick")
        for index, name in enumerate(rows)
        if index % every == 0
    )


def _format_legend(groups: Sequence[GroupRow], colours: Mapping[str, str]) -> Markup:
    total = sum(group.weights for group in groups) or 1
    entries = []
    for name, colour in colours.items():
        taken = [group for group in groups if group.format == name]
        if not taken:
            continue
        share = sum(group.weights for group in taken) / total
        swatch = tag("span", class_="swatch", style=f"background:{colour}")
        text = f"{name}: {len(taken)} of {len(groups)} groups, {share:.1%} of the weights"
        entries.append(tag("span", swatch, text, class_="legend-entry"))
    return tag("p", *entries, class_="legend")


def _ramp_legend(low: float, high: float, unit: str) -> Markup:
    steps = 48
    bar = [
        tag("rect", x=8 + index * 6, y=4, width=6.5, height=14, fill=ramp_colour(index / 47))
        for index in range(steps)
    ]
    scale = 6 * steps
    ticks = [tick for tick in log_ticks(low, high) if low <= tick <= high]
    every = max(1, len(ticks) // 6)
    marks = [
        tag(
            "text",
            tick_text(tick),
            x=8 + scale * math.log(tick / low) / math.log(high / low),
            y=33,
            text_anchor="middle",
            class_="tick",
        )
        for tick in ticks[::every]
    ]
    words = f"predicted loss if only this group takes the format ({unit_text(unit)}, log scale)"
    text = tag("text", words, x=8 + scale + 16, y=16, class_="tick")
    return _picture([*bar, *marks, text], 860.0, 40.0, "Colour scale")


def _row_names(rows: Sequence[str], height: float) -> Markup:
    every = max(1, round(13 / height))
    return join(
        tag(
            "text",
            f"block {name}" if name else "",
            x=_LEFT - 8,
            y=_HEADER + (row + 0.5) * height + 4,
            text_anchor="end",
            class_="tick",
        )
        for row, name in enumerate(rows)
        if row % every == 0
    )


def _cell_width(types: int, formats: int) -> float:
    """As wide as the page allows, within what is good to look at."""
    room = (_PAGE_WIDTH - _LEFT) / types - _TYPE_GAP
    return min(max(room / formats, 22.0), 46.0)


def _row_height(rows: int) -> float:
    return 22.0 if rows <= 24 else 16.0 if rows <= 48 else 11.0


def _picture(parts: Sequence[Markup], width: float, height: float, name: str) -> Markup:
    picture = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=width,
        height=height,
        role="img",
        aria_label=name,
    )
    return tag("div", picture, class_="scroll")
