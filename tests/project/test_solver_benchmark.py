"""The solver's benchmark gives every solver the same instance, and judges answers alike."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.project.test_benchmarks import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "solver.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The script."""
    return load_script(SCRIPT)


def test_plain_highs_finds_what_autoq_finds_where_scores_are_near_one(
    benchmark: ModuleType,
) -> None:
    tables = benchmark.instance(20, 1.0, 0)
    for found in (
        benchmark.within(tables, benchmark.bits(5.5)),
        benchmark.three_budgets(tables),
    ):
        ours, theirs = (
            found.loss_of(solver(found, 20.0))
            for solver in (benchmark.with_autoq, benchmark.with_plain_highs)
        )
        # Its relative gap is 1e-4 by default.
        assert theirs == pytest.approx(ours, rel=1e-4)


def test_answers_over_a_budget_or_none_have_no_loss(benchmark: ModuleType) -> None:
    found = benchmark.within(benchmark.instance(4, 1.0, 0), benchmark.bits(5.0))

    assert found.loss_of(np.array([3, 3, 3, 3])) == float("inf")
    assert found.loss_of(None) == float("inf")
    scores = found.sensitivity.scores()
    assert found.loss_of(np.array([1, 1, 1, 1])) == pytest.approx(scores[:, 1].sum())


def test_tables_are_markdown(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        "--groups",
        "6",
        "--scales",
        "1",
        "--repeats",
        "1",
        "--large",
        "50",
        "--frontier",
        "12",
        "--several",
        "6",
    ]
    monkeypatch.setattr(sys, "argv", ["solver.py", *small])
    benchmark.main()

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    heads = [index for index, line in enumerate(lines) if line.startswith("|---")]
    assert len(heads) == 4
    for start, end in zip(heads, [*(head - 1 for head in heads[1:]), len(lines)], strict=True):
        assert {line.count("|") for line in lines[start - 1 : end]} == {lines[start].count("|")}
        assert lines[start + 1].startswith("| autoq |")
