"""What a study found, as pictures and pages for people."""

from autoq.report._dashboard_note import KL_DIVERGENCE_TEXT, NoteFacts, study_note
from autoq.report._dashboard_plots import frontier_plot, layers_plot, prediction_plot
from autoq.report._data import (
    CurvePoint,
    ExcludedRow,
    GroupRow,
    MeasurementRow,
    ReportData,
    report_data,
)
from autoq.report._heat_map_files import heat_map_png, render_heat_map_html
from autoq.report._metric import Metric
from autoq.report._page import render_frontier_html, render_html
from autoq.report._picture import frontier_png
from autoq.report._plan_files import plan_csv, plan_json
from autoq.report._trials import TrialRow
from autoq.report._validation import ValidationData, validation_data, validation_text
from autoq.report._validation_page import render_validation_html
from autoq.report._validation_picture import validation_png

__all__ = [
    "KL_DIVERGENCE_TEXT",
    "CurvePoint",
    "ExcludedRow",
    "GroupRow",
    "MeasurementRow",
    "Metric",
    "NoteFacts",
    "ReportData",
    "TrialRow",
    "ValidationData",
    "frontier_plot",
    "frontier_png",
    "heat_map_png",
    "layers_plot",
    "plan_csv",
    "plan_json",
    "prediction_plot",
    "render_frontier_html",
    "render_heat_map_html",
    "render_html",
    "render_validation_html",
    "report_data",
    "study_note",
    "validation_data",
    "validation_png",
    "validation_text",
]
