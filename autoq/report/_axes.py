"""Axes of the hand-drawn pictures: scales, ticks, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoq.report.markup import Markup, join, tag

_LABEL_HEIGHT = 15.0  # pixels between baselines of neighbouring labels
_MOST_STEPS = 6  # half heights that a label may move, so that it stays with its point


@dataclass(frozen=True, slots=True)
class Scale:
    """Values on one axis, and the pixels they fall on."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    logarithmic: bool = False

    def pixel(self, value: float) -> float:
        """Where `value` falls; beyond the ends it stays at the end."""
        share = (self._place(value) - self._place(self.low)) / (
            self._place(self.high) - self._place(self.low)
        )
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        found = log_ticks(self.low, self.high) if self.logarithmic else self._linear_ticks()
        return [tick for tick in found if self.low <= tick <= self.high]

    def _place(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.logarithmic else value

    def _linear_ticks(self) -> list[float]:
        rough = (self.high - self.low) / 8
        magnitude = 10.0 ** math.floor(math.log10(rough))
        step = next(size * magnitude for size in (1, 2, 5, 10) if size * magnitude >= rough)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with more round values between them the fewer powers are in sight."""
    decades = math.log10(high / low)
    sizes: tuple[float, ...] = (1.0,)
    if decades <= 2.5:
        sizes = (1.0, 2.0, 5.0)
    if decades <= 0.7:
        sizes = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    step = max(1, math.ceil(decades / 8))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        size * 10.0**exponent for exponent in exponents if not exponent % step for size in sizes
    ]


def log_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic axis that holds the positive values with some room on both sides."""
    positive = [value for value in values if value > 0.0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 10.0)
    margin = max((high / low) ** 0.1, 1.4)
    return Scale(low / margin, high * margin, start, end, logarithmic=True)


def linear_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A linear axis that holds the values with some room on both sides."""
    known = list(values) or [0.0, 1.0]
    margin = max((max(known) - min(known)) * 0.05, 0.1)
    return Scale(min(known) - margin, max(known) + margin, start, end)


def tick_text(value: float) -> str:
    """A tick's label: 0.05, 10, 1e-5."""
    if value == 0.0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def horizontal_axis(scale: Scale, top: float, bottom: float, title: str) -> Markup:
    """Grid lines, tick labels and title of the axis along the bottom."""
    parts: list[Markup] = []
    for tick in scale.ticks():
        x = scale.pixel(tick)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        parts.append(
            tag("text", tick_text(tick), x=x, y=bottom + 18, text_anchor="middle", class_="tick")
        )
    middle = (scale.start + scale.end) / 2
    parts.append(
        tag("text", title, x=middle, y=bottom + 40, text_anchor="middle", class_="axis-title")
    )
    return join(parts)


def vertical_axis(scale: Scale, left: float, right: float, title: str) -> Markup:
    """Grid lines, tick labels and title of the axis along the left side."""
    parts: list[Markup] = []
    for tick in scale.ticks():
        y = scale.pixel(tick)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(
            tag("text", tick_text(tick), x=left - 8, y=y + 4, text_anchor="end", class_="tick")
        )
    x, y = left - 58, (scale.start + scale.end) / 2
    turned = f"rotate(-90 {x:.0f} {y:.0f})"
    parts.append(
        tag("text", title, x=x, y=y, transform=turned, text_anchor="middle", class_="axis-title")
    )
    return join(parts)


@dataclass(frozen=True, slots=True)
class Label:
    """Text beside a point."""

    x: float
    y: float
    text: str
    style: str  # CSS class


def spread_labels(
    labels: Sequence[Label],
    top: float,
    bottom: float,
    right: float,
    marks: Iterable[tuple[float, float]] = (),
) -> Markup:
    """The labels beside their points, moved up or down where they would cover something.

    A label that would leave the picture on the right is written to the left of its point.

    Args:
        marks: further places, as pixels, that labels should not cover.
    """
    points = [*((label.x, label.y) for label in labels), *marks]
    placed = [(x - 6, x + 6, y + 4) for x, y in points]  # left, right, baseline
    parts: list[Markup] = []
    for label in sorted(labels, key=lambda label: label.y):
        width = 6.8 * len(label.text)
        leftward = label.x + 10 + width > right
        left = label.x - 10 - width if leftward else label.x + 10
        baseline = _free_baseline(placed, left, left + width, label.y + 4, top, bottom)
        placed.append((left, left + width, baseline))
        anchor, x = ("end", label.x - 10) if leftward else ("start", label.x + 10)
        parts.append(
            tag("text", label.text, x=x, y=baseline, text_anchor=anchor, class_=label.style)
        )
    return join(parts)


def _free_baseline(
    placed: Sequence[tuple[float, float, float]],
    left: float,
    right: float,
    wanted: float,
    top: float,
    bottom: float,
) -> float:
    """The baseline nearest to `wanted` at which nothing placed is covered."""
    offsets = [0.0]
    for step in range(1, _MOST_STEPS + 1):
        offsets += [step * _LABEL_HEIGHT / 2, -step * _LABEL_HEIGHT / 2]
    for offset in offsets:
        baseline = wanted + offset
        crowded = any(
            left < other_right and other_left < right and abs(baseline - other) < _LABEL_HEIGHT
            for other_left, other_right, other in placed
        )
        if not crowded and top + 10 <= baseline <= bottom - 2:
            return baseline
    return wanted
