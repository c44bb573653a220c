"""Predicted against measured loss of a validation's plans, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoq.errors import InputError
from autoq.report._picture import new_axes
from autoq.report._validation import (
    KIND_TEXT,
    CalibrationLine,
    ValidatedPlan,
    ValidationData,
    decimals,
)
from autoq.report.numbers import loss_text, unit_text

_COLOURS = {"random": "#7b8794", "near": "#d1622b"}
_MARKERS = {"random": "o", "near": "D"}
_SIZES = {"random": 5.0, "near": 4.2}


def validation_png(study: str, data: ValidationData, path: Path) -> None:
    """Draw measured against predicted loss: each plan, equality, calibration, noise floor.

    Raises:
        InputError: matplotlib is not installed, or no plan has losses above zero.
        OSError: `path` cannot be written.
    """
    plans = [plan for plan in data.plans if plan.predicted.value > 0 and plan.measured.value > 0]
    if not plans:
        raise InputError(
            "a picture needs a plan with a predicted and a measured loss above zero, and this "
            "validation has none; validate with more plans"
        )
    figure, axes = new_axes(width_inches=7.4, height_inches=6.2)
    for kind in _COLOURS:
        _draw(axes, [plan for plan in plans if plan.kind == kind], kind, data)
    low, high = _ends([plan.predicted.value for plan in plans])
    if data.unit == "nats_per_token":
        axes.plot([low, high], [low, high], color="black", linewidth=1.1, label="equal")
    if data.line is not None:
        _draw_line(axes, data.line, low, high)
    if data.noise_floor is not None and data.noise_floor.value > 0:
        _draw_floor(axes, data.noise_floor.value, plans)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel(f"predicted loss ({unit_text(data.unit)})")
    axes.set_ylabel("measured KL divergence (nats per token)")
    axes.set_title(f"{study}: {data.sequences} held-out sequences", fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="upper left", fontsize=9)
    figure.savefig(path, format="png")


def _draw(axes: Any, plans: Sequence[ValidatedPlan], kind: str, data: ValidationData) -> None:
    if not plans:
        return
    measured = [plan.measured for plan in plans]
    below = [max(m.value - m.low, 0.0) if m.low is not None else 0.0 for m in measured]
    above = [max(m.high - m.value, 0.0) if m.high is not None else 0.0 for m in measured]
    quality = next(row for row in data.quality if row.kind == kind)
    axes.errorbar(
        [plan.predicted.value for plan in plans],
        [metric.value for metric in measured],
        yerr=[below, above],
        fmt=_MARKERS[kind],
        markersize=_SIZES[kind],
        markeredgecolor="white",
        markeredgewidth=0.5,
        elinewidth=0.9,
        color=_COLOURS[kind],
        ecolor=_COLOURS[kind] + "80",
        label=f"{quality.plans} {KIND_TEXT[kind]} plans, "
        f"rank correlation {decimals(quality.rank_correlation)}",
    )


def _draw_line(axes: Any, line: CalibrationLine, low: float, high: float) -> None:
    measured = [math.exp(line.intercept + line.slope * math.log(end)) for end in (low, high)]
    words = f"through {KIND_TEXT[line.fitted_on]} plans, slope {line.slope:.2f}"
    axes.plot(
        [low, high], measured, color=_COLOURS["near"], linestyle="--", linewidth=1.2, label=words
    )


def _draw_floor(axes: Any, floor: float, plans: Sequence[ValidatedPlan]) -> None:
    """A line, and what lies under it shaded."""
    measured = [plan.measured for plan in plans]
    ends = [end for metric in measured for end in (metric.low, metric.value, metric.high) if end]
    low, high = _ends([*ends, floor])
    axes.set_ylim(low, high)
    axes.axhspan(low, floor, color="#3b82c4", alpha=0.12, linewidth=0)
    axes.axhline(
        floor,
        color="#3b82c4",
        linewidth=1.1,
        linestyle=":",
        label=f"noise floor {loss_text(floor)}",
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with some room on both sides, for a logarithmic axis."""
    margin = max((max(values) / min(values)) ** 0.06, 1.25)
    return min(values) / margin, max(values) * margin
