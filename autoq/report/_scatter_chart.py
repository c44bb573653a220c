"""The picture of measured divergence against predicted loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from autoq.report._data import MeasurementRow
from autoq.report._metric import Metric
from autoq.report._validation import KIND_TEXT, ValidationData
from autoq.report.markup import Markup, join, tag
from autoq.report.numbers import interval_text, loss_text, unit_text

_WIDTH, _HEIGHT = 700.0, 480.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 84.0, 680.0, 46.0, 424.0


@dataclass(frozen=True, slots=True)
class _Pair:
    label: str
    predicted: float
    measured: Metric
    style: str  # CSS class
    named: bool  # its label is written beside it


def scatter_chart(
    measurements: Sequence[MeasurementRow],
    unit: str,
    validation: ValidationData | None = None,
    noise_floor: Metric | None = None,
) -> Markup:
    """The picture, or a sentence where nothing was both predicted and measured.

    Args:
        measurements: plans that somebody asked for; their names are written.
        validation: plans measured to judge the prediction, drawn under the others.
        noise_floor: drawn as a line.
    """
    pairs = [*_validated(validation), *_asked_for(measurements)]
    if not pairs:
        words = "No plan was both predicted and measured with a loss above zero."
        return tag("p", words, class_="quiet")
    floor = noise_floor or (validation.noise_floor if validation else None)
    x, y = _scales(pairs, floor, same=unit == "nats_per_token")
    parts = [
        horizontal_axis(x, _TOP, _BOTTOM, f"predicted loss ({unit_text(unit)}, log scale)"),
        vertical_axis(y, _LEFT, _RIGHT, "measured KL (nats per token, log scale)"),
        _floor(floor, x, y) if floor and floor.value > 0.0 else Markup(),
        _diagonal(x, y) if unit == "nats_per_token" else Markup(),
        *(_mark(pair, x, y) for pair in pairs),
        _labels(pairs, x, y),
        _legend(pairs),
    ]
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        class_="narrow",
        role="img",
        aria_label="Measured against predicted loss",
    )


def _asked_for(measurements: Sequence[MeasurementRow]) -> Iterator[_Pair]:
    for row in measurements:
        measured = row.metric("kl_divergence")
        if row.predicted_loss and row.predicted_loss > 0.0 and measured and measured.value > 0.0:
            yield _Pair(row.label, row.predicted_loss, measured, "measured", named=True)


def _validated(validation: ValidationData | None) -> Iterator[_Pair]:
    for plan in validation.plans if validation else ():
        if plan.predicted.value > 0.0 and plan.measured.value > 0.0:
            yield _Pair(plan.label, plan.predicted.value, plan.measured, plan.kind, named=False)


def _scales(pairs: Sequence[_Pair], floor: Metric | None, *, same: bool) -> tuple[Scale, Scale]:
    """Both axes; on one range where both are in the same unit, so the diagonal means equality."""
    predicted = [pair.predicted for pair in pairs]
    measured = [pair.measured.value for pair in pairs]
    for pair in pairs:
        measured += [end for end in (pair.measured.low, pair.measured.high) if end is not None]
    if floor is not None:
        measured.append(floor.value)
    if same:
        predicted = measured = [*predicted, *measured]
    return log_scale(predicted, _LEFT, _RIGHT), log_scale(measured, _BOTTOM, _TOP)


def _diagonal(x: Scale, y: Scale) -> Markup:
    return tag("line", x1=x.start, y1=y.start, x2=x.end, y2=y.end, class_="diagonal")


def _floor(floor: Metric, x: Scale, y: Scale) -> Markup:
    top = y.pixel(floor.value)
    words = f"noise floor {loss_text(floor.value)}"
    return join(
        [
            tag("line", x1=x.start, y1=top, x2=x.end, y2=top, class_="floor"),
            tag("text", words, x=x.end - 6, y=top - 6, text_anchor="end", class_="tick"),
        ]
    )


def _mark(pair: _Pair, x: Scale, y: Scale) -> Markup:
    metric = pair.measured
    left, top = x.pixel(pair.predicted), y.pixel(metric.value)
    title = (
        f"{pair.label}: predicted {loss_text(pair.predicted)}, measured {loss_text(metric.value)}"
    )
    parts: list[Markup] = []
    if metric.low is not None and metric.high is not None:
        title += f", 95 % {interval_text(metric.low, metric.high)}"
        if pair.named:
            parts.append(error_bar(left, y.pixel(metric.low), y.pixel(metric.high)))
    radius = 4.5 if pair.named else 3.5
    parts.append(tag("circle", cx=left, cy=top, r=radius, class_=pair.style))
    return tag("g", tag("title", title), *parts)


def _labels(pairs: Sequence[_Pair], x: Scale, y: Scale) -> Markup:
    places = {pair: (x.pixel(pair.predicted), y.pixel(pair.measured.value)) for pair in pairs}
    labels = [Label(*place, pair.label, "label") for pair, place in places.items() if pair.named]
    marks = [place for pair, place in places.items() if not pair.named]
    return spread_labels(labels, _TOP, _BOTTOM, _RIGHT, marks)


def _legend(pairs: Sequence[_Pair]) -> Markup:
    """What the marks mean; nothing where there is but one kind."""
    styles = [style for style in ("random", "near", "measured") if _has(pairs, style)]
    if styles == ["measured"]:
        return Markup()
    parts: list[Markup] = []
    left = _LEFT
    for style in styles:
        words = f"{KIND_TEXT[style]} plans" if style in KIND_TEXT else "plans asked for"
        parts.append(tag("circle", cx=left + 5, cy=20, r=4.5, class_=style))
        parts.append(tag("text", words, x=left + 16, y=24))
        left += 36 + 7 * len(words)
    return join(parts)


def _has(pairs: Sequence[_Pair], style: str) -> bool:
    return any(pair.style == style for pair in pairs)
