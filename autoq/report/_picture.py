"""The frontier as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoq.errors import InputError
from autoq.report._curve_chart import measured_points
from autoq.report._data import CurvePoint, ReportData
from autoq.report.numbers import unit_text


def new_axes(*, width_inches: float, height_inches: float) -> tuple[Any, Any]:
    """An empty figure and its axes.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "a PNG needs matplotlib, which is not installed; run `pip install matplotlib`, or write "
            "HTML, which needs nothing more"
        ) from None
    figure = Figure(figsize=(width_inches, height_inches), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def frontier_png(data: ReportData, path: Path) -> None:
    """Draw loss against effective bits: the frontier, this plan, and what was measured.

    Raises:
        InputError: matplotlib is not installed.
        OSError: `path` cannot be written.
    """
    figure, axes = new_axes(width_inches=9.0, height_inches=5.0)
    _draw_plans(axes, data.curve, marker="o", markersize=3, label="best plan for each budget")
    _draw_plans(
        axes,
        data.uniform,
        marker="s",
        color="black",
        linestyle="none",
        label="one format throughout",
    )
    _draw_measured(axes, data)
    if data.chosen is not None:
        style = {"marker": "D", "markersize": 9, "color": "#b5326b", "linestyle": "none"}
        _draw_plans(axes, [data.chosen], label=data.chosen.label, **style)
    axes.set_yscale("log")
    axes.set_xlabel("effective bits per weight")
    axes.set_ylabel(f"loss ({unit_text(data.unit)})")
    axes.grid(True, alpha=0.35)
    axes.legend()
    figure.savefig(path, format="png")


def _draw_plans(axes: Any, plans: Sequence[CurvePoint], **style: Any) -> None:
    drawn = [plan for plan in plans if plan.predicted_loss > 0.0]
    if drawn:
        bits = [plan.effective_bits for plan in drawn]
        axes.plot(bits, [plan.predicted_loss for plan in drawn], **style)


def _draw_measured(axes: Any, data: ReportData) -> None:
    label = "measured KL divergence, 95 %"
    for _, bits, metric in measured_points(data.measurements, data.unit):
        below = metric.value - metric.low if metric.low is not None else 0.0
        above = metric.high - metric.value if metric.high is not None else 0.0
        axes.errorbar(
            bits,
            metric.value,
            yerr=[[max(below, 0.0)], [max(above, 0.0)]],
            fmt="o",
            capsize=4,
            color="#12805c",
            label=label,
        )
        label = "_"  # the legend names it once; matplotlib leaves out what begins so
