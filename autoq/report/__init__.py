"""What a study found, as pictures and pages for people."""

from autoq.report._data import (
    CurvePoint,
    ExcludedRow,
    GroupRow,
    MeasurementRow,
    Metric,
    ReportData,
    report_data,
)
from autoq.report._page import render_frontier_html, render_html
from autoq.report._picture import frontier_png

__all__ = [
    "CurvePoint",
    "ExcludedRow",
    "GroupRow",
    "MeasurementRow",
    "Metric",
    "ReportData",
    "frontier_png",
    "render_frontier_html",
    "render_html",
    "report_data",
]
