"""The heat map of layers and formats as files of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

from autoq.report._colours import loss_range, ramp_colour
from autoq.report._data import ReportData
from autoq.report._heat_map import heat_map, plan_strip
from autoq.report._html import document, section
from autoq.report._layer_grid import LayerGrid, layer_grid
from autoq.report._picture import new_axes
from autoq.report.markup import tag
from autoq.report.numbers import unit_text

_CELL_INCHES = 0.3
_RAMP_STEPS = 64


def render_heat_map_html(data: ReportData) -> str:
    """A page with the plan by layer and every layer's loss in every format."""
    sections = [
        tag("h1", data.study),
        tag("p", data.model, class_="model"),
        section("Chosen plan by layer", plan_strip(data.groups, data.formats)),
        section("Sensitivity by layer and format", heat_map(data.groups, data.formats, data.unit)),
    ]
    return document(f"autoq: layers of {data.study}", sections)


def heat_map_png(data: ReportData, path: Path | BinaryIO) -> None:
    """Draw every layer's loss in every format; rings are what the plan takes.

    Raises:
        InputError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    grid = layer_grid(data)
    figure, axes = new_axes(
        width_inches=max(6.0, 2.6 + _CELL_INCHES * len(grid.columns)),
        height_inches=max(3.4, 2.2 + _CELL_INCHES * len(grid.rows)),
    )
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    low, high = loss_range(loss for row in grid.losses for loss in row)
    shades = [ramp_colour(step / _RAMP_STEPS) for step in range(_RAMP_STEPS + 1)]
    losses = [[loss or math.nan for loss in row] for row in grid.losses]
    image = axes.pcolormesh(
        losses,
        cmap=LinearSegmentedColormap.from_list("loss", shades),
        norm=LogNorm(low, high),
        edgecolors="white",
        linewidth=0.8,
    )
    figure.colorbar(image, ax=axes, label=f"predicted loss ({unit_text(data.unit)})")
    _draw_choices(axes, grid)
    _name_cells(axes, grid)
    axes.set_title(f"{data.study}: loss if only this layer takes the format", fontsize=11)
    figure.savefig(path, format="png")


def _draw_choices(axes: Any, grid: LayerGrid) -> None:
    x = [column + 0.5 for _, column in grid.chosen]
    y = [row + 0.5 for row, _ in grid.chosen]
    style = {"s": 48, "facecolors": "none", "edgecolors": "#1565c0", "linewidths": 2}
    axes.scatter(x, y, label="what the plan takes", **style)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.06), fontsize=8, frameon=False)


def _name_cells(axes: Any, grid: LayerGrid) -> None:
    names = [f"{kind}  {fmt}" for kind, fmt in grid.columns]
    axes.set_xticks([place + 0.5 for place in range(len(names))], names, rotation=90, fontsize=8)
    axes.set_yticks([place + 0.5 for place in range(len(grid.rows))], grid.rows, fontsize=8)
    axes.invert_yaxis()
