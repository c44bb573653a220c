"""The report as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoq.formats import NONE
from autoq.report._curve_chart import CurveData, curve_chart, measured_points
from autoq.report._data import GroupRow, ReportData
from autoq.report._heat_map import heat_map, plan_strip
from autoq.report._html import document, section, table, tile
from autoq.report._validation_page import quality_table, scatter
from autoq.report.kv_cache import cache_words
from autoq.report.markup import Markup, join, tag
from autoq.report.numbers import (
    MISSING,
    bits_text,
    bytes_text,
    count_text,
    finite,
    interval_text,
    loss_text,
    metric_text,
    metric_value_text,
    percent_text,
    seconds_text,
    unit_text,
)
from autoq.report.resources import budgets_text, takes_lines

if TYPE_CHECKING:
    from autoq.search import Plan


def render_html(data: ReportData) -> str:
    """The report's page: inline style, inline pictures, nothing fetched from anywhere."""
    sections = [
        tag("h1", data.study),
        tag("p", data.model, class_="model"),
        _tiles(data),
        section("Loss against bits", _curve(data)),
        section("Chosen plan by layer", plan_strip(data.groups, data.formats)),
        section("Sensitivity by layer and format", _heat_map_note(data)),
        section("Predicted against measured", _predicted_and_measured(data)),
        section("Measurements", _measurement_table(data)),
        section("Groups", _group_table(data)),
        section("Left out of the search", _excluded_table(data)),
        section("Configuration", _settings(data)),
    ]
    return document(f"autoq: {data.study}", sections)


def render_frontier_html(data: ReportData, plans: Sequence[Plan]) -> str:
    """A page with only the picture of loss against bits and the table of its plans.

    Args:
        data: the study's report data.
        plans: the frontier that `data` was made with.
    """
    head = ("effective bits", "as ModelOpt counts", "stored", "predicted loss", "95 %", "gap")
    rows = [
        (
            bits_text(plan.effective_bits),
            bits_text(plan.peer_effective_bits),
            bytes_text(plan.stored_bytes),
            loss_text(plan.predicted_loss),
            interval_text(*plan.predicted_loss_interval),
            percent_text(plan.gap),
        )
        for plan in plans
    ]
    sections = [
        tag("h1", data.study),
        tag("p", data.model, class_="model"),
        section("Loss against bits", _curve(data)),
        section("Plans", table(head, rows, number_columns=range(len(head)))),
    ]
    return document(f"autoq: frontier of {data.study}", sections)


def _tiles(data: ReportData) -> Markup:
    budget = f"budget: {budgets_text(data)}"
    low, high = data.predicted_loss_interval
    tiles = [
        tile("effective bits per weight", bits_text(data.effective_bits), budget),
        tile(
            "stored bits per weight",
            bits_text(data.stored_bits_per_weight),
            f"{bytes_text(data.stored_bytes)} searched; ModelOpt counts {bits_text(data.peer_effective_bits)}",
        ),
        tile(
            f"predicted loss, {unit_text(data.unit)}",
            loss_text(data.predicted_loss),
            f"95 % {interval_text(low, high)}",
        ),
        *(tile(name, *_first_words(value)) for name, value in takes_lines(data)),
        *_cache_tile(data),
        *_calibrated_tile(data),
        tile(
            "gap to the bound", percent_text(data.gap), f"no plan is below {loss_text(data.bound)}"
        ),
    ]
    for name, value in data.measured.items():
        more = _measured_interval(data, name)
        tiles.append(tile(f"measured {metric_text(name)}", metric_value_text(name, value), more))
    tiles += _floor_tile(data)
    return tag("div", *tiles, class_="tiles")


def _cache_tile(data: ReportData) -> list[Markup]:
    if data.kv_cache is None:
        return []
    formats, more = cache_words(data.kv_cache)
    return [tile("key/value cache", formats, more)]


def _calibrated_tile(data: ReportData) -> list[Markup]:
    found = data.predicted_calibrated
    if found is None:
        return []
    more = f"95 % {interval_text(found.low, found.high)}"
    return [tile("predicted, calibrated", loss_text(found.value), more)]


def _floor_tile(data: ReportData) -> list[Markup]:
    found = data.noise_floor
    if found is None:
        return []
    more = "KL that rounding alone causes; smaller differences are ties"
    return [tile("noise floor", loss_text(found.value), more)]


def _measured_interval(data: ReportData, name: str) -> str:
    """The interval of the measurement that `data.measured` took its value from."""
    for row in data.measurements:
        metric = row.metric(name)
        if metric and metric.value == data.measured[name] and metric.low is not None:
            low, high = (metric_value_text(name, end) for end in (metric.low, metric.high))
            return f"95 % {low} to {high}"
    return "on held-out text"


def _curve(data: ReportData) -> Markup:
    return curve_chart(
        CurveData(
            plans=data.curve,
            chosen=data.chosen,
            uniform=data.uniform,
            measured=measured_points(data.measurements, data.unit),
            unit=data.unit,
        )
    )


def _heat_map_note(data: ReportData) -> Markup:
    words = (
        "A row per block, a column per format. Outlined: what was chosen. Empty: unquantised, no "
        "loss. Grey: the layer cannot take the format. Point at a cell for its numbers."
    )
    note = tag("p", words, class_="quiet")
    return join([note, heat_map(data.groups, data.formats, data.unit)])


def _first_words(text: str) -> tuple[str, str]:
    """A value with its unit, and what is said of it."""
    value, _, words = text.partition(" for ")
    return (value, f"for {words}") if words else (text, "")


def _predicted_and_measured(data: ReportData) -> Markup:
    chart = scatter(data.measurements, data.unit, data.validation, data.noise_floor)
    if data.validation is None:
        return chart
    return join([chart, tag("h3", "Quality of the prediction"), quality_table(data.validation)])


def _measurement_table(data: ReportData) -> Markup:
    if not data.measurements:
        return tag("p", "Nothing was measured.", class_="quiet")
    names = list(dict.fromkeys(metric.name for row in data.measurements for metric in row.metrics))
    head = ["plan", "effective bits", "predicted loss", *(metric_text(name) for name in names)]
    head.append("this plan is")
    rows = []
    for row in data.measurements:
        cells: list[object] = [row.label, bits_text(row.effective_bits)]
        cells.append(loss_text(row.predicted_loss))
        for name in names:
            metric = row.metric(name)
            cells.append(
                _metric_cell(name, metric.value, metric.low, metric.high) if metric else MISSING
            )
        cells.append(row.this_plan or MISSING)
        rows.append(cells)
    return table(head, rows, number_columns=range(1, len(head)))


def _metric_cell(name: str, value: float, low: float | None, high: float | None) -> Markup:
    text = metric_value_text(name, value)
    if low is None or high is None:
        return join([text])
    ends = f"{metric_value_text(name, low)} to {metric_value_text(name, high)}"
    return join([text, Markup("<br>"), tag("span", ends, class_="quiet")])


def _group_table(data: ReportData) -> Markup:
    quantised = [name for name in data.formats if name != NONE]
    head = ["group", "format", "weights", "bits", "loss", *(f"in {name}" for name in quantised), ""]
    rows = [_group_cells(group, quantised) for group in data.groups]
    cells = table(head, rows, number_columns=range(2, 5 + len(quantised)))
    summary = f"{len(data.groups)} groups, {count_text(_weights(data))} weights"
    return tag("details", tag("summary", summary), tag("div", cells, class_="scroll"))


def _group_cells(group: GroupRow, quantised: Sequence[str]) -> list[object]:
    return [
        group.name,
        group.format,
        count_text(group.weights),
        bits_text(group.effective_bits),
        loss_text(group.predicted_loss),
        *(loss_text(group.scores.get(name)) for name in quantised),
        group.reason,
    ]


def _weights(data: ReportData) -> int:
    return sum(group.weights for group in data.groups)


def _excluded_table(data: ReportData) -> Markup:
    if not data.excluded:
        return tag("p", "Every quantisable layer was searched.", class_="quiet")
    rows = [(row.name, count_text(row.weights), row.reason) for row in data.excluded]
    return table(("layer", "weights", "reason"), rows, number_columns=(1,))


def _settings(data: ReportData) -> Markup:
    timings = [(name, seconds_text(seconds)) for name, seconds in data.timings_seconds]
    if data.peak_memory_bytes is not None:
        timings.append(("peak resident memory", bytes_text(data.peak_memory_bytes)))
    parts = [
        _settings_table("What was asked", data.configuration),
        _settings_table("Time by stage", timings),
        _settings_table("Versions", data.versions),
        _settings_table("Exported checkpoint", _export_rows(data)),
    ]
    return tag("div", *parts, class_="columns")


def _export_rows(data: ReportData) -> list[tuple[str, str]]:
    if not data.export:
        return []
    found = data.export.get("files") or ()
    count = found if isinstance(found, int) else len(found)
    return [
        ("path", str(data.export.get("path"))),
        ("container", str(data.export.get("container"))),
        ("size", bytes_text(finite(data.export.get("stored_bytes")))),
        ("files", str(count)),
    ]


def _settings_table(title: str, rows: Sequence[tuple[str, str]]) -> Markup:
    if not rows:
        return Markup()
    return tag("div", tag("h3", title), table((), rows))
