"""What a report shows, as plain data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoq.formats import FORMATS, NONE
from autoq.report._metric import Metric, metric_of
from autoq.report._validation import ValidationData, validation_data
from autoq.report.layers import LayerPosition, layer_position
from autoq.report.numbers import finite

if TYPE_CHECKING:
    from autoq.search import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """One decision group and what was decided for it."""

    name: str
    position: LayerPosition
    slots: tuple[str, ...]
    reason: str
    format: str
    weights: int
    effective_bits: float | None  # bits per weight in the chosen format
    scores: Mapping[str, float | None]  # format -> predicted loss if only this group takes it
    standard_errors: Mapping[str, float | None]
    predicted_loss: float | None  # in the chosen format


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludedRow:
    """A layer that search left alone, and why."""

    name: str
    reason: str
    weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A plan's place in the picture of loss against bits."""

    label: str
    effective_bits: float
    predicted_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRow:
    """A plan that was measured on the real quantised model."""

    label: str
    effective_bits: float | None
    predicted_loss: float | None
    metrics: tuple[Metric, ...]
    this_plan: str | None = None  # better, worse or tie: the page's plan beside this one

    def metric(self, name: str) -> Metric | None:
        """The metric called `name`, or None if it was not measured."""
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """What predicted times are those of."""

    hardware: str
    tokens: int  # of one step


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastRow:
    """The proof that no plan of so low a predicted loss takes much less of a resource."""

    resource: str
    loss_limit: float | None
    bound: float | None
    gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """What was decided for the key/value cache."""

    formats: Mapping[str, int]  # format -> how many layers keep their cache in it
    bits: float | None  # mean per cached element
    bytes_per_token: float | None  # of all layers
    predicted_loss: float | None
    layers: Mapping[str, str]  # layer -> format


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything on the page."""

    study: str
    model: str
    unit: str  # "nats_per_token" when predicted loss is comparable to KL divergence
    budget_bits: float | None
    budgets: Mapping[str, float]  # resource -> limit; empty for plans of old versions
    takes: Mapping[str, float]  # resource -> what the plan takes
    latency: LatencyRow | None  # None where no time was predicted
    refined_from: str | None = None  # label of the plan that measured trials improved
    target: str | None  # where it is to run, "engine:hardware"
    effective_bits: float | None
    peer_effective_bits: float | None
    stored_bits_per_weight: float | None
    stored_bytes: int | None
    predicted_loss: float | None
    predicted_loss_interval: tuple[float | None, float | None]
    bound: float | None
    gap: float | None
    least: LeastRow | None  # None where the loss was not limited
    formats: tuple[str, ...]  # most bits first
    groups: tuple[GroupRow, ...]  # in depth order
    excluded: tuple[ExcludedRow, ...]
    frontier: tuple[CurvePoint, ...]
    uniform: tuple[CurvePoint, ...]
    measured: Mapping[str, float]
    measurements: tuple[MeasurementRow, ...]
    noise_floor: Metric | None
    validation: ValidationData | None
    kv_cache: CacheRow | None  # None where its format was not chosen
    predicted_calibrated: Metric | None  # what the validation makes of the predicted loss
    timings_seconds: tuple[tuple[str, float], ...]
    peak_memory_bytes: int | None
    export: Mapping[str, Any] | None
    configuration: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]

    @property
    def chosen(self) -> CurvePoint | None:
        """The plan's place in the picture, or None if its bits or loss are not known."""
        if self.effective_bits is None or self.predicted_loss is None:
            return None
        return CurvePoint(
            label=f"this plan: {self.effective_bits:.4f} bits",
            effective_bits=self.effective_bits,
            predicted_loss=self.predicted_loss,
        )

    @property
    def curve(self) -> tuple[CurvePoint, ...]:
        """The frontier, through this plan unless another beats or equals it.

        A frontier is solved at some budgets only, so this plan may lie between them; rules of
        the user's can put it above.
        """
        plan = self.chosen
        if plan is None or any(
            other.effective_bits <= plan.effective_bits
            and other.predicted_loss <= plan.predicted_loss
            for other in self.frontier
        ):
            return self.frontier
        return tuple(sorted([*self.frontier, plan], key=lambda point: point.effective_bits))


def report_data(summary: Mapping[str, Any], frontier: Sequence[Plan]) -> ReportData:
    """The page of a study.

    Args:
        summary: what `Study.summary` gives.
        frontier: what `Study.frontier` gives; may be empty.
    """
    groups = tuple(_group_row(group) for group in summary["groups"])
    formats = _formats_by_bits(groups)
    low, high = summary.get("predicted_loss_interval") or (None, None)
    return ReportData(
        study=str(summary["study"]),
        model=str(summary["model"]),
        unit=str(summary.get("unit", "relative")),
        budget_bits=finite(summary.get("budget")),
        budgets=_numbers(summary.get("budgets")),
        takes=_numbers(summary.get("takes")),
        latency=_latency_row(summary.get("latency")),
        target=summary.get("target"),
        refined_from=summary.get("refined_from"),
        effective_bits=finite(summary.get("effective_bits")),
        peer_effective_bits=finite(summary.get("peer_effective_bits")),
        stored_bits_per_weight=finite(summary.get("stored_bits_per_weight")),
        stored_bytes=summary.get("stored_bytes"),
        predicted_loss=finite(summary.get("predicted_loss")),
        predicted_loss_interval=(finite(low), finite(high)),
        bound=finite(summary.get("bound")),
        gap=finite(summary.get("gap")),
        least=_least_row(summary.get("least")),
        formats=formats,
        groups=groups,
        excluded=tuple(_excluded_row(excluded) for excluded in summary.get("excluded") or ()),
        frontier=curve_of(frontier),
        uniform=_uniform_plans(groups, formats),
        measured=_numbers(summary.get("measured")),
        measurements=tuple(_measurement_row(row) for row in summary.get("measurements") or ()),
        noise_floor=metric_of("noise_floor", summary.get("noise_floor")),
        validation=validation_data(summary.get("validation")),
        kv_cache=_cache_row(summary.get("kv_cache")),
        predicted_calibrated=metric_of("predicted", summary.get("predicted_calibrated")),
        timings_seconds=tuple(_numbers(summary.get("timings_s")).items()),
        peak_memory_bytes=summary.get("peak_rss_bytes"),
        export=summary.get("export"),
        configuration=_settings(summary.get("configuration")),
        versions=_settings(summary.get("versions")),
    )


def _latency_row(latency: Mapping[str, Any] | None) -> LatencyRow | None:
    if latency is None:
        return None
    return LatencyRow(hardware=str(latency["hardware"]), tokens=int(latency["tokens"]))


def _cache_row(cache: Mapping[str, Any] | None) -> CacheRow | None:
    if cache is None:
        return None
    layers = {str(layer["name"]): str(layer["format"]) for layer in cache["layers"]}
    return CacheRow(
        formats=dict(Counter(layers.values())),
        bits=finite(cache.get("bits")),
        bytes_per_token=finite(cache.get("bytes_per_token")),
        predicted_loss=finite(cache.get("predicted_loss")),
        layers=layers,
    )


def _least_row(least: Mapping[str, Any] | None) -> LeastRow | None:
    if least is None:
        return None
    numbers = {name: finite(least[name]) for name in ("loss_limit", "bound", "gap")}
    return LeastRow(resource=str(least["resource"]), **numbers)


def curve_of(plans: Iterable[Plan]) -> tuple[CurvePoint, ...]:
    """The plans as points, fewest bits first."""
    points = [
        CurvePoint(
            label=f"{plan.effective_bits:.4f} bits",
            effective_bits=plan.effective_bits,
            predicted_loss=plan.predicted_loss,
        )
        for plan in plans
    ]
    return tuple(sorted(points, key=lambda point: point.effective_bits))


def _group_row(group: Mapping[str, Any]) -> GroupRow:
    return GroupRow(
        name=str(group["name"]),
        position=layer_position(str(group["name"])),
        slots=tuple(str(slot) for slot in group.get("slots") or ()),
        reason=str(group.get("reason", "")),
        format=str(group["format"]),
        weights=int(group["weights"]),
        effective_bits=finite(group.get("effective_bits")),
        scores={name: finite(score) for name, score in group["scores"].items()},
        standard_errors={
            name: finite(error) for name, error in (group.get("standard_errors") or {}).items()
        },
        predicted_loss=finite(group.get("predicted_loss")),
    )


def _excluded_row(excluded: Mapping[str, Any]) -> ExcludedRow:
    return ExcludedRow(
        name=str(excluded["name"]),
        reason=str(excluded["reason"]),
        weights=int(excluded["weights"]),
    )


def _measurement_row(row: Mapping[str, Any]) -> MeasurementRow:
    return MeasurementRow(
        label=str(row["label"]),
        effective_bits=finite(row.get("effective_bits")),
        predicted_loss=finite(row.get("predicted_loss")),
        metrics=tuple(
            metric
            for name, found in row["metrics"].items()
            if (metric := metric_of(name, found)) is not None
        ),
        this_plan=(row.get("this_plan") or {}).get("verdict"),
    )


def _numbers(values: Mapping[str, Any] | None) -> dict[str, float]:
    """The finite ones among `values`."""
    found = {name: finite(value) for name, value in (values or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _settings(values: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), _setting_text(value)) for name, value in (values or {}).items())


def _setting_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return ", ".join(value) or "(none)"
    return json.dumps(value, default=str)


def nominal_bits(name: str) -> float | None:
    """Codes and block scales per weight, or None for a format that is not registered."""
    if name not in FORMATS:
        return None
    return FORMATS[name].nominal_bits


def _formats_by_bits(groups: Sequence[GroupRow]) -> tuple[str, ...]:
    names: dict[str, None] = {NONE: None}
    for group in groups:
        names.update(dict.fromkeys([*group.scores, group.format]))
    return tuple(sorted(names, key=lambda name: (-(nominal_bits(name) or 0.0), name)))


def _uniform_plans(groups: Sequence[GroupRow], formats: Iterable[str]) -> tuple[CurvePoint, ...]:
    """One format for every group that can take it, the others left as they are."""
    points = [_uniform_plan(groups, name) for name in formats if name != NONE]
    return tuple(point for point in points if point is not None)


def _uniform_plan(groups: Sequence[GroupRow], name: str) -> CurvePoint | None:
    bits_in_format, bits_of_none = nominal_bits(name), nominal_bits(NONE)
    taking = [group for group in groups if group.scores.get(name) is not None]
    if not taking or bits_in_format is None or bits_of_none is None:
        return None
    weights = sum(group.weights for group in groups)
    quantised = sum(group.weights for group in taking)
    bits = quantised * bits_in_format + (weights - quantised) * bits_of_none
    return CurvePoint(
        label=f"all {name}" if len(taking) == len(groups) else f"{name} where it fits",
        effective_bits=bits / weights,
        predicted_loss=sum(group.scores[name] or 0.0 for group in taking),
    )
