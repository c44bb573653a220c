"""The picture of measured divergence against predicted loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoq.report._axes import (
    Label,
    Scale,
    horizontal_axis,
    log_scale,
    spread_labels,
    vertical_axis,
)
from autoq.report._curve_chart import error_bar
from autoq.report._data import MeasurementRow, Metric
from autoq.report.markup import Markup, tag
from autoq.report.numbers import interval_text, loss_text, unit_text

_WIDTH, _HEIGHT = 700.0, 440.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 84.0, 680.0, 16.0, 384.0


@dataclass(frozen=True, slots=True)
class _Pair:
    label: str
    predicted: float
    measured: Metric


def scatter_chart(measurements: Sequence[MeasurementRow], unit: str) -> Markup:
    """The picture, or a sentence where nothing was both predicted and measured."""
    pairs = _pairs(measurements)
    if not pairs:
        words = "No plan was both predicted and measured with a loss above zero."
        return tag("p", words, class_="quiet")
    x, y = _scales(pairs, same=unit == "nats_per_token")
    parts = [
        horizontal_axis(x, _TOP, _BOTTOM, f"predicted loss ({unit_text(unit)}, log scale)"),
        vertical_axis(y, _LEFT, _RIGHT, "measured KL (nats per token, log scale)"),
        _diagonal(x, y) if unit == "nats_per_token" else Markup(),
        *(_mark(pair, x, y) for pair in pairs),
        _labels(pairs, x, y),
    ]
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        class_="narrow",
        role="img",
        aria_label="Measured against predicted loss",
    )


def _pairs(measurements: Sequence[MeasurementRow]) -> list[_Pair]:
    pairs = []
    for row in measurements:
        measured = row.metric("kl_divergence")
        if row.predicted_loss and row.predicted_loss > 0.0 and measured and measured.value > 0.0:
            pairs.append(_Pair(row.label, row.predicted_loss, measured))
    return pairs


def _scales(pairs: Sequence[_Pair], *, same: bool) -> tuple[Scale, Scale]:
    """Both axes; on one range where both are in the same unit, so the diagonal means equality."""
    predicted = [pair.predicted for pair in pairs]
    measured = [pair.measured.value for pair in pairs]
    for pair in pairs:
        measured += [end for end in (pair.measured.low, pair.measured.high) if end is not None]
    if same:
        predicted = measured = [*predicted, *measured]
    return log_scale(predicted, _LEFT, _RIGHT), log_scale(measured, _BOTTOM, _TOP)


def _diagonal(x: Scale, y: Scale) -> Markup:
    return tag("line", x1=x.start, y1=y.start, x2=x.end, y2=y.end, class_="diagonal")


def _mark(pair: _Pair, x: Scale, y: Scale) -> Markup:
    metric = pair.measured
    left, top = x.pixel(pair.predicted), y.pixel(metric.value)
    title = (
        f"{pair.label}: predicted {loss_text(pair.predicted)}, measured {loss_text(metric.value)}"
    )
    parts: list[Markup] = []
    if metric.low is not None and metric.high is not None:
        title += f", 95 % {interval_text(metric.low, metric.high)}"
        parts.append(error_bar(left, y.pixel(metric.low), y.pixel(metric.high)))
    parts.append(tag("circle", cx=left, cy=top, r=4.5, class_="measured"))
    return tag("g", tag("title", title), *parts)


def _labels(pairs: Sequence[_Pair], x: Scale, y: Scale) -> Markup:
    labels = [
        Label(x.pixel(pair.predicted), y.pixel(pair.measured.value), pair.label, "label")
        for pair in pairs
    ]
    return spread_labels(labels, _TOP, _BOTTOM, _RIGHT)
