"""What a validation found, as plain data and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoq.report._metric import Metric, metric_of
from autoq.report.numbers import MISSING, finite, percent_text

KIND_TEXT = {"all": "all", "random": "random", "near": "near-optimal"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidatedPlan:
    """A plan that was measured only to judge the prediction."""

    label: str
    kind: str  # "random" or "near"
    effective_bits: float | None
    predicted: Metric
    measured: Metric


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """How predictions of one kind of plans fared."""

    kind: str  # "all", "random" or "near"
    plans: int
    rank_correlation: float | None
    slope: float | None
    ratio: float | None
    coverage: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationLine:
    """log measured = intercept + slope * log predicted."""

    slope: float
    intercept: float
    fitted_on: str  # kind of plans
    coverage: float | None  # of its intervals, each plan left out in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationData:
    """One validation."""

    plans: tuple[ValidatedPlan, ...]
    quality: tuple[QualityRow, ...]
    line: CalibrationLine | None
    noise_floor: Metric | None
    data: str
    sequences: int
    unit: str

    @property
    def overall(self) -> QualityRow:
        """The quality over all plans."""
        return next(row for row in self.quality if row.kind == "all")


def validation_data(found: Mapping[str, Any] | None) -> ValidationData | None:
    """The data of `Study.validation`; None where there was no validation."""
    if found is None:
        return None
    plans = (_plan(row) for row in found["plans"])
    return ValidationData(
        plans=tuple(plan for plan in plans if plan is not None),
        quality=tuple(_quality(kind, row) for kind, row in found["quality"].items()),
        line=_line(found),
        noise_floor=metric_of("noise_floor", found.get("noise_floor")),
        data=str(found["data"]),
        sequences=int(found["sequences"]),
        unit=str(found["unit"]),
    )


def quality_cells(row: QualityRow, unit: str) -> list[str]:
    """A row of the table: kind, plans, rank correlation, slope, measured/predicted, coverage."""
    in_nats = unit == "nats_per_token"
    return [
        KIND_TEXT[row.kind],
        str(row.plans),
        decimals(row.rank_correlation),
        decimals(row.slope),
        decimals(row.ratio if in_nats else None),
        percent_text(row.coverage if in_nats else None),
    ]


QUALITY_HEAD = (
    "plans",
    "count",
    "rank correlation",
    "slope",
    "measured / predicted",
    "within 95 %",
)


def validation_text(found: ValidationData) -> str:
    """The validation in one line."""
    row = found.overall
    text = f"rank correlation {decimals(row.rank_correlation)} over {row.plans} plans"
    text += f", slope {decimals(row.slope)}"
    if found.unit == "nats_per_token":
        text += f", measured / predicted {decimals(row.ratio)}"
    return text


def line_text(line: CalibrationLine) -> str:
    """The calibration in one line."""
    plans = "all" if line.fitted_on == "all" else f"the {KIND_TEXT[line.fitted_on]}"
    text = (
        f"log measured = {line.intercept:.3f} + {line.slope:.3f} log predicted, from {plans} plans"
    )
    if line.coverage is not None:
        text += f"; its 95 % intervals held {percent_text(line.coverage)} of plans left out"
    return text


def decimals(value: float | None) -> str:
    """A ratio or correlation, three decimals."""
    return MISSING if value is None else f"{value:.3f}"


def _plan(row: Mapping[str, Any]) -> ValidatedPlan | None:
    predicted = metric_of("predicted", row["predicted"])
    measured = metric_of("measured", row["measured"])
    if predicted is None or measured is None:
        return None
    return ValidatedPlan(
        label=str(row["label"]),
        kind=str(row["kind"]),
        effective_bits=finite(row.get("effective_bits")),
        predicted=predicted,
        measured=measured,
    )


def _quality(kind: str, row: Mapping[str, Any]) -> QualityRow:
    return QualityRow(
        kind=kind,
        plans=int(row["plans"]),
        rank_correlation=finite(row["rank_correlation"]),
        slope=finite(row["slope"]),
        ratio=finite(row["ratio"]),
        coverage=finite(row["coverage"]),
    )


def _line(found: Mapping[str, Any]) -> CalibrationLine | None:
    line = found.get("calibration")
    if line is None:
        return None
    return CalibrationLine(
        slope=float(line["slope"]),
        intercept=float(line["intercept"]),
        fitted_on=str(found["calibrated_on"]),
        coverage=finite(found.get("calibrated_coverage")),
    )
