"""A measured or predicted number with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoq.report.numbers import finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A measured value with its 95 % interval, where one is known."""

    name: str
    value: float
    low: float | None
    high: float | None


def metric_of(name: str, found: Mapping[str, Any] | None) -> Metric | None:
    """The metric of `{"value": ..., "low": ..., "high": ...}`; None without a finite value."""
    value = finite(found.get("value")) if found else None
    if found is None or value is None:
        return None
    return Metric(
        name=name, value=value, low=finite(found.get("low")), high=finite(found.get("high"))
    )
