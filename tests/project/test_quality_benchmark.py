"""The tables of quality beside the peer hold what was measured."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.project.test_benchmarks import load_script

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The module of the tables."""
    return load_script(BENCHMARKS / "quality_tables.py")


def measured(*divergences: float) -> dict[str, Any]:
    """A plan that loses so much on each sequence."""
    return {"effective_bits": 4.75, "kl_per_sequence": list(divergences)}


def peer_plan(solver: str, *divergences: float) -> dict[str, Any]:
    """One of the peer's plans, as autoq measured it."""
    return {**measured(*divergences), "source": "max", "solver": solver, "budget_bits": 5.0}


def test_refined_plans_stand_beside_their_start_and_the_peers(tables: ModuleType) -> None:
    own = {
        "peer_plans": [peer_plan("rescaled", 4.0, 4.0)],
        "own": {
            "4.75": {**measured(2.0, 2.0), "start": measured(4.0, 4.0), "best": measured(1.0, 1.0)}
        },
    }
    rows = tables.refined_rows("small", "nvfp4 fp8", own)
    assert [(row.comparison, row.ratio) for row in rows] == [
        ("rescaled, equal bits, before refinement", 1.0),
        ("rescaled, equal bits, refined", 0.5),
        ("rescaled, equal bits, refined, best finalist whether sure or not", 0.25),
    ]
    text = tables.markdown(rows, "allocation")
    line = "| small | nvfp4 fp8 | 5 | 4.750 | 4.750 | 4.000e+00 | 2.000e+00 | 0.500"
    assert f"{line} (0.500 to 0.500) |" in text
    assert "Geometric mean 0.500 over 1 rows (small 0.500); better in 1, level in 0" in text


def test_at_equal_budget_autoq_gets_what_the_peer_left_unused(tables: ModuleType) -> None:
    own = {
        "peer_plans": [peer_plan("as_shipped", 4.0, 4.0)],
        "own": {"4.75": measured(4.0, 4.0), "5.0": measured(2.0, 2.0)},
    }
    rows = tables.allocation_rows("small", "nvfp4 fp8", own)
    assert {row.comparison: row.ratio for row in rows} == {
        "as shipped, equal bits": 1.0,
        "as shipped, equal budget": 0.5,
    }
