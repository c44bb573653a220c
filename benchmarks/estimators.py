"""All estimators on the same models: how they rank, what their plans lose, what their pass costs.

    OMP_NUM_THREADS=1 python benchmarks/estimators.py [--model DIR ...] [--out FILE.json]

For every model (the bundled one if none is given) and every estimator, with labels drawn from several
seeds:

- **rank correlation** (Spearman) of the scores with the measured KL divergence of quantising each
  group alone, over all groups and formats; and of predicted with measured loss over random plans;
- **calibration**: slope of log measured on log predicted loss over the random plans, and the geometric
  mean of measured / predicted, where the estimator predicts nats;
- **KL divergence** from the original, in nats per token on held-out sequences, of the plan that the
  scores lead to at each budget, all plans under one and the same calibration, and its ratio to the
  first estimator's with an interval that is paired by sequence;
- **CPU seconds** of the scoring pass, and their ratio to the first estimator's.

`measured` solves on the measured divergences themselves, `interactions` improves the first
estimator's plans with the cross terms that its pass left.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from estimator_bench import SEQUENCE_LENGTH, Bench
from estimator_tables import Row, judged, markdown, summary
from numpy.typing import NDArray
from scipy.stats import spearmanr

from autoq.bundled import model_path
from autoq.evaluators.prediction import prediction_quality
from autoq.formats import NONE, FormatName
from autoq.models import Assignment
from autoq.search import SensitivityTable, solve
from autoq.search.estimators import ESTIMATORS
from autoq.search.interactions import Interactions, improve
from autoq.search.sampling import random_plans

FORMATS = tuple(FormatName(name) for name in ("nvfp4", "fp8", "w4a8_awq"))
BUDGETS = (4.5, 5.0, 6.0)
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "token_projection": ("token_projection", {}),
    "fisher_projection": ("fisher_projection", {}),
    "fisher_projection, all tokens": ("fisher_projection", {"added_variance": 0.0}),
    "fisher_projection, a quarter by lot": (
        "fisher_projection",
        {"added_variance": 0.0, "row_fraction": 0.25},
    ),
    "token_projection, 4 draws": ("token_projection", {"draws": 4}),
    "sequence_projection, 4 draws": ("sequence_projection", {}),
    "diagonal": ("diagonal", {}),
    "factored": ("factored", {}),
    "quantized_point": ("quantized_point", {}),
    "forward_only, 16 sequences": ("forward_only", {}),
}
"""Name in the table -> estimator and its options; the others are compared with the first."""

INTERACTION_WEIGHT = 0.5
"""Of the cross terms in `interactions`."""


def run(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one model, as plain data."""
    bench = Bench(
        folder,
        arguments.sequences,
        arguments.held_out,
        arguments.single_sequences,
        tuple(FormatName(name) for name in arguments.formats.split(",")),
    )
    singles = bench.single_divergences()
    measured = bench.table("measured", singles[None], "nats_per_token")
    judge = Judge(
        bench=bench,
        budgets=[float(text) for text in arguments.budgets.split(",")],
        singles=singles,
        sample=[
            plan.assignment
            for plan in random_plans(measured, bench.costs, count=arguments.random_plans)
        ],
    )
    rows: dict[str, list[Row]] = {}
    for case in arguments.case or CASES:
        for seed in range(arguments.seeds if _draws_labels(case) else 1):
            for label, row in judge.rows(case, seed):
                rows.setdefault(label, []).append(row)
        _note(f"{folder}: {case} is through")
    rows["measured"] = [judge.row(measured, None)]
    return {
        "model": Path(folder).name,
        "settings": {
            "formats": bench.formats,
            "budgets": judge.budgets,
            "seeds": arguments.seeds,
            "calibration_sequences": arguments.sequences,
            "held_out_sequences": arguments.held_out,
            "single_sequences": arguments.single_sequences,
            "random_plans": arguments.random_plans,
            "sequence_length": SEQUENCE_LENGTH,
        },
        "cases": judged(rows),
    }


def _draws_labels(case: str) -> bool:
    estimator = ESTIMATORS[CASES[case][0]]
    return estimator.needs_backward and estimator.labels != "data"


@dataclass
class Judge:
    """Holds scores against what was measured."""

    bench: Bench
    budgets: Sequence[float]
    singles: NDArray[np.float64]  # [groups, formats]: measured divergence of a group alone
    sample: Sequence[Assignment]  # random plans

    def rows(self, case: str, seed: int) -> Iterator[tuple[str, Row]]:
        """Label -> what came of one pass: the case's own, and with interactions if it is the first.

        Args:
            seed: of the labels.
        """
        name, options = CASES[case]
        table, results, seconds = self.bench.score(name, options, seed)
        yield case, self.row(table, seconds)
        if case == next(iter(CASES)):
            interactions = Interactions(
                groups=table.groups, formats=table.formats, gram=results["interactions"]
            )
            yield "interactions", self.row(table, seconds, interactions)

    def row(
        self,
        table: SensitivityTable,
        seconds: float | None,
        interactions: Interactions | None = None,
    ) -> Row:
        """What the scores are worth."""
        bench, scores = self.bench, table.scores()
        known = np.isfinite(scores) & np.isfinite(self.singles)
        predicted = [_predicted(table, assignment) for assignment in self.sample]
        measured = [float(bench.divergences(plan).mean()) for plan in self.sample]
        quality = prediction_quality(predicted, measured, [(-np.inf, np.inf)] * len(predicted))
        plans = [self._plan(table, budget, interactions) for budget in self.budgets]
        return Row(
            rank_of_cells=float(spearmanr(scores[known], self.singles[known]).statistic),
            rank_of_plans=quality.rank_correlation,
            slope=quality.slope,
            measured_over_predicted=quality.ratio if table.unit == "nats_per_token" else None,
            divergences=np.array([bench.divergences(plan) for plan in plans]),
            cpu_seconds=seconds,
        )

    def _plan(
        self, table: SensitivityTable, budget: float, interactions: Interactions | None
    ) -> Assignment:
        plan = solve(table, self.bench.costs, budget)
        if interactions is not None:
            costs, weight = self.bench.costs, INTERACTION_WEIGHT
            plan = improve(plan, interactions, table, costs, budget, weight=weight)
        return plan.assignment


def _predicted(table: SensitivityTable, assignment: Assignment) -> float:
    scores = table.scores()
    return sum(
        float(scores[row, table.formats.index(assignment[group])])
        for row, group in enumerate(table.groups)
        if assignment[group] != NONE
    )


def main() -> None:
    """Run all models, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="model folder; repeatable")
    parser.add_argument("--case", action="append", choices=list(CASES), help="all if left out")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--budgets", default=",".join(f"{budget:g}" for budget in BUDGETS))
    parser.add_argument("--sequences", type=int, default=128, help="to calibrate and score on")
    parser.add_argument("--held-out", type=int, default=128, help="sequences for plans")
    parser.add_argument("--single-sequences", type=int, default=32, help="for groups alone")
    parser.add_argument("--random-plans", type=int, default=24, help="to judge predictions on")
    parser.add_argument("--seeds", type=int, default=2, help="of labels, from 0 on")
    parser.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for folder in arguments.model or [str(model_path())]:
        found.append(run(folder, arguments))
        print(markdown(found[-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(summary(found))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
