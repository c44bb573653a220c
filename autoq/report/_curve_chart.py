"""The picture of predicted loss against effective bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoq.report._axes import (
    Label,
    Scale,
    horizontal_axis,
    linear_scale,
    log_scale,
    spread_labels,
    vertical_axis,
)
from autoq.report._data import CurvePoint, MeasurementRow
from autoq.report._metric import Metric
from autoq.report.markup import Markup, join, tag
from autoq.report.numbers import bits_text, interval_text, loss_text, unit_text

_WIDTH, _HEIGHT = 1040.0, 440.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 84.0, 1020.0, 44.0, 384.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveData:
    """What the picture shows."""

    plans: Sequence[CurvePoint]
    chosen: CurvePoint | None
    uniform: Sequence[CurvePoint]
    measured: Sequence[tuple[str, float, Metric]]  # label, effective bits, KL divergence
    unit: str


def measured_points(
    measurements: Iterable[MeasurementRow], unit: str
) -> list[tuple[str, float, Metric]]:
    """Measured divergences that lie on the same axis as the predicted loss."""
    if unit != "nats_per_token":
        return []
    points = []
    for row in measurements:
        divergence = row.metric("kl_divergence")
        if divergence is not None and row.effective_bits is not None and divergence.value > 0.0:
            points.append((row.label, row.effective_bits, divergence))
    return points


def curve_chart(data: CurveData) -> Markup:
    """The picture, or a sentence where there is nothing to draw."""
    plans = [plan for plan in data.plans if plan.predicted_loss > 0.0]
    uniform = [plan for plan in data.uniform if plan.predicted_loss > 0.0]
    chosen = data.chosen if data.chosen and data.chosen.predicted_loss > 0.0 else None
    shown = [*plans, *uniform, *([chosen] if chosen else [])]
    if not shown and not data.measured:
        return tag(
            "p", "No plan has a loss above zero, so there is nothing to draw.", class_="quiet"
        )
    x, y = _scales(shown, data.measured)
    title = f"loss ({unit_text(data.unit)}, log scale)"
    parts = [
        horizontal_axis(x, _TOP, _BOTTOM, "effective bits per weight"),
        vertical_axis(y, _LEFT, _RIGHT, title),
        _curve(plans, x, y),
        *(_measured_mark(entry, x, y) for entry in data.measured),
        *(_uniform_mark(plan, x, y) for plan in uniform),
        _chosen_mark(chosen, x, y) if chosen else Markup(),
        _labels(chosen, uniform, _places(plans, data.measured, x, y), x, y),
        _legend(chosen is not None, bool(uniform), bool(data.measured)),
    ]
    return tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        aria_label="Loss against effective bits",
    )


def _scales(
    shown: Sequence[CurvePoint], measured: Sequence[tuple[str, float, Metric]]
) -> tuple[Scale, Scale]:
    bits = [plan.effective_bits for plan in shown] + [entry[1] for entry in measured]
    losses = [plan.predicted_loss for plan in shown]
    for _, _, metric in measured:
        losses += [metric.value, *(end for end in (metric.low, metric.high) if end is not None)]
    return linear_scale(bits, _LEFT, _RIGHT), log_scale(losses, _BOTTOM, _TOP)


def _curve(plans: Sequence[CurvePoint], x: Scale, y: Scale) -> Markup:
    places = [(x.pixel(plan.effective_bits), y.pixel(plan.predicted_loss)) for plan in plans]
    points = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
    dots = (
        tag(
            "circle",
            tag("title", f"{plan.label}, loss {loss_text(plan.predicted_loss)}"),
            cx=left,
            cy=top,
            r=3,
            class_="plan",
        )
        for plan, (left, top) in zip(plans, places, strict=True)
    )
    return join([tag("polyline", points=points, class_="curve"), *dots])


def _measured_mark(entry: tuple[str, float, Metric], x: Scale, y: Scale) -> Markup:
    label, bits, metric = entry
    left, top = x.pixel(bits), y.pixel(metric.value)
    title = f"{label}: measured KL {loss_text(metric.value)} at {bits_text(bits)} bits"
    parts: list[Markup] = []
    if metric.low is not None and metric.high is not None:
        title += f", 95 % {interval_text(metric.low, metric.high)}"
        parts.append(error_bar(left, y.pixel(metric.low), y.pixel(metric.high)))
    parts.append(tag("circle", cx=left, cy=top, r=4.5, class_="measured"))
    return tag("g", tag("title", title), *parts)


def error_bar(x: float, low: float, high: float) -> Markup:
    """A vertical interval with caps, from pixel `low` to pixel `high`."""
    path = f"M{x - 5:.1f},{low:.1f}H{x + 5:.1f}M{x:.1f},{low:.1f}V{high:.1f}"
    path += f"M{x - 5:.1f},{high:.1f}H{x + 5:.1f}"
    return tag("path", d=path, class_="interval")


def _uniform_mark(plan: CurvePoint, x: Scale, y: Scale) -> Markup:
    left, top = x.pixel(plan.effective_bits), y.pixel(plan.predicted_loss)
    title = tag("title", f"{plan.label}, loss {loss_text(plan.predicted_loss)}")
    return tag("rect", title, x=left - 5, y=top - 5, width=10, height=10, class_="uniform")


def _chosen_mark(plan: CurvePoint, x: Scale, y: Scale) -> Markup:
    left, top = x.pixel(plan.effective_bits), y.pixel(plan.predicted_loss)
    return tag(
        "path",
        tag("title", f"{plan.label}, loss {loss_text(plan.predicted_loss)}"),
        d=f"M{left:.1f},{top - 9:.1f}l9,9l-9,9l-9,-9z",
        class_="chosen",
    )


def _places(
    plans: Sequence[CurvePoint],
    measured: Sequence[tuple[str, float, Metric]],
    x: Scale,
    y: Scale,
) -> list[tuple[float, float]]:
    """Where marks are, so that labels keep off them."""
    points = [(plan.effective_bits, plan.predicted_loss) for plan in plans]
    points += [(bits, metric.value) for _, bits, metric in measured]
    return [(x.pixel(bits), y.pixel(loss)) for bits, loss in points]


def _labels(
    chosen: CurvePoint | None,
    uniform: Sequence[CurvePoint],
    marks: Sequence[tuple[float, float]],
    x: Scale,
    y: Scale,
) -> Markup:
    labels = [
        # The curve is below every other plan, so there is room above.
        Label(x.pixel(plan.effective_bits), y.pixel(plan.predicted_loss) - 6, plan.label, "label")
        for plan in uniform
    ]
    if chosen is not None:
        left, top = x.pixel(chosen.effective_bits), y.pixel(chosen.predicted_loss)
        labels.append(Label(left + 3, top - 8, chosen.label, "label strong"))
    return spread_labels(labels, _TOP, _BOTTOM, _RIGHT, marks)


def _legend(chosen: bool, uniform: bool, measured: bool) -> Markup:
    entries = [("best plan for each budget", tag("circle", cx=0, cy=0, r=4, class_="plan"))]
    if chosen:
        entries.append(("this plan", tag("path", d="M0,-7l7,7l-7,7l-7,-7z", class_="chosen")))
    if uniform:
        mark = tag("rect", x=-5, y=-5, width=10, height=10, class_="uniform")
        entries.append(("one format throughout", mark))
    if measured:
        mark = join([error_bar(0, -7, 7), tag("circle", cx=0, cy=0, r=4.5, class_="measured")])
        entries.append(("measured KL divergence, 95 %", mark))
    parts, x = [], _LEFT + 8
    for text, mark in entries:
        parts.append(tag("g", mark, transform=f"translate({x:.0f} 18)"))
        parts.append(tag("text", text, x=x + 14, y=22, class_="tick"))
        x += 44 + 6.6 * len(text)
    return join(parts)
