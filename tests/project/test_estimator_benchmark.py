"""The estimators' benchmark computes what its tables say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from autoq.search.estimators import DEFAULT_ESTIMATOR, ESTIMATORS
from tests.project.test_benchmarks import load_script

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The module of the tables."""
    return load_script(BENCHMARKS / "estimator_tables.py")


def row_of(tables: ModuleType, divergences: list[list[float]], **changes: Any) -> Any:
    """One pass whose plans lose so much, [budgets][sequences]."""
    values: dict[str, Any] = {
        "rank_of_cells": 0.5,
        "rank_of_plans": 0.75,
        "slope": 1.25,
        "measured_over_predicted": 0.5,
        "divergences": np.array(divergences),
        "cpu_seconds": 2.0,
    }
    return tables.Row(**{**values, **changes})


def test_ratio_is_a_geometric_mean_over_seeds_and_budgets(tables: ModuleType) -> None:
    first = [row_of(tables, [[1.0, 3.0], [4.0, 4.0]])]  # means 2 and 4
    rows = [row_of(tables, [[4.0, 4.0], [4.0, 4.0]]), row_of(tables, [[8.0, 8.0], [8.0, 8.0]])]

    assert tables.ratio(rows, first) == pytest.approx((2.0 * 1.0 * 4.0 * 2.0) ** 0.25)
    assert tables.ratio(first, first) == 1.0


def test_interval_is_paired_by_sequence(tables: ModuleType) -> None:
    theirs = np.random.default_rng(0).exponential(size=(2, 40))
    first, rows = [row_of(tables, theirs.tolist())], [row_of(tables, (3 * theirs).tolist())]

    # Sequences differ a lot, the ratio on each of them not at all.
    assert tables.paired_ratio_interval(rows, first) == pytest.approx((3.0, 3.0))
    apart = [row_of(tables, theirs[:, ::-1].tolist())]
    low, high = tables.paired_ratio_interval(apart, first)
    assert low < 0.95
    assert high > 1.05


def test_tables_show_means_over_seeds_and_leave_out_what_is_not_known(tables: ModuleType) -> None:
    rows = {
        "token_projection": [row_of(tables, [[2.0, 2.0]]), row_of(tables, [[2.0, 2.0]])],
        "diagonal": [row_of(tables, [[4.0, 4.0]], measured_over_predicted=None, cpu_seconds=3.0)],
        "measured": [row_of(tables, [[1.0, 1.0]], cpu_seconds=None)],
    }
    model = {"model": "small", "settings": {"budgets": [4.5]}, "cases": tables.judged(rows)}

    lines = tables.markdown(model).splitlines()
    assert lines[3] == (
        "| diagonal | 0.500 | 0.750 | 1.250 |  | 4.000e+00 | 2.000 (2.000 to 2.000) |  | 3.0 "
        "| 1.50 |"
    )
    assert len({line.count("|") for line in lines}) == 1
    both = [model, {**model, "model": "large"}]
    assert tables.summary(both).splitlines()[3:] == [
        "| diagonal | 2.000 | 2.000 | 2.000 | 1.50 |",
        "| measured | 0.500 | 0.500 | 0.500 |  |",
    ]


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> estimator and its options."""
    for name in ("estimator_tables.py", "estimator_bench.py"):  # which the other script imports
        load_script(BENCHMARKS / name)
    found: dict[str, tuple[str, dict[str, Any]]] = load_script(BENCHMARKS / "estimators.py").CASES
    return found


def test_every_estimator_is_compared(cases: dict[str, tuple[str, dict[str, Any]]]) -> None:
    assert {name for name, _ in cases.values()} == set(ESTIMATORS)


def test_the_default_is_the_estimator_that_won(
    cases: dict[str, tuple[str, dict[str, Any]]],
) -> None:
    """Of all as they come, over the models of the figures that are kept."""
    models = json.loads((BENCHMARKS / "results" / "estimators.json").read_text())
    losses = {
        name: np.prod([model["cases"][label]["ratio"] for model in models])
        for label, (name, options) in cases.items()
        if not options
    }
    assert set(losses) == set(ESTIMATORS)
    assert min(losses, key=losses.__getitem__) == DEFAULT_ESTIMATOR
