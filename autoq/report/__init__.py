"""What a study found, as pictures and pages for people."""

from autoq.report._data import (
    CurvePoint,
    ExcludedRow,
    GroupRow,
    MeasurementRow,
    ReportData,
    report_data,
)
from autoq.report._metric import Metric
from autoq.report._page import render_frontier_html, render_html
from autoq.report._picture import frontier_png
from autoq.report._validation import ValidationData, validation_data, validation_text
from autoq.report._validation_page import render_validation_html
from autoq.report._validation_picture import validation_png

__all__ = [
    "CurvePoint",
    "ExcludedRow",
    "GroupRow",
    "MeasurementRow",
    "Metric",
    "ReportData",
    "ValidationData",
    "frontier_png",
    "render_frontier_html",
    "render_html",
    "render_validation_html",
    "report_data",
    "validation_data",
    "validation_png",
    "validation_text",
]
