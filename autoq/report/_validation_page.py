"""What a validation found, as a page of its own and as a part of the report."""

from __future__ import annotations

from collections.abc import Sequence

from autoq.report._data import MeasurementRow
from autoq.report._html import document, section, table
from autoq.report._metric import Metric
from autoq.report._scatter_chart import scatter_chart
from autoq.report._validation import (
    QUALITY_HEAD,
    ValidationData,
    line_text,
    quality_cells,
    validation_text,
)
from autoq.report.markup import Markup, join, tag
from autoq.report.numbers import bits_text, interval_text, loss_text


def render_validation_html(study: str, found: ValidationData) -> str:
    """A page with the picture of a validation, its verdict, and every plan of it."""
    head = ("plan", "effective bits", "predicted loss", "95 %", "measured KL", "95 %")
    rows = [
        (
            plan.label,
            bits_text(plan.effective_bits),
            loss_text(plan.predicted.value),
            interval_text(plan.predicted.low, plan.predicted.high),
            loss_text(plan.measured.value),
            interval_text(plan.measured.low, plan.measured.high),
        )
        for plan in found.plans
    ]
    sections = [
        tag("h1", study),
        tag("p", f"{found.sequences} held-out sequences: {found.data}", class_="model"),
        section("Predicted against measured", scatter((), found.unit, found, None)),
        section("Quality of the prediction", quality_table(found)),
        section("Plans", table(head, rows, number_columns=range(1, len(head)))),
    ]
    return document(f"autoq: validation of {study}", sections)


def scatter(
    measurements: Sequence[MeasurementRow],
    unit: str,
    validation: ValidationData | None,
    noise_floor: Metric | None,
) -> Markup:
    """The picture of measured against predicted loss, with what its diagonal means."""
    chart = scatter_chart(measurements, unit, validation, noise_floor)
    if unit != "nats_per_token" or not (measurements or validation):
        return chart
    return join([tag("p", "Dashed: measured equals predicted.", class_="quiet"), chart])


def quality_table(found: ValidationData) -> Markup:
    """How the predictions fared, by kind of plans, and what corrects them."""
    rows = [quality_cells(row, found.unit) for row in found.quality]
    words = [table(QUALITY_HEAD, rows, number_columns=range(1, len(QUALITY_HEAD)))]
    words.append(tag("p", validation_text(found), class_="quiet"))
    if found.line is not None:
        words.append(tag("p", line_text(found.line), class_="quiet"))
    return join(words)
