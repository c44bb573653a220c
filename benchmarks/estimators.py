"""All estimators on the same models: how they rank, what their plans lose, what their pass costs.

    OMP_NUM_THREADS=1 python benchmarks/estimators.py [--model DIR ...] [--out FILE.json]

For every model (the bundled one if none is given) and every estimator:

- **rank correlation** (Spearman) of the scores with the measured KL divergence of quantising each
  group alone, over all groups and formats;
- **KL divergence** from the original, in nats per token on held-out sequences, of the plan that the
  scores lead to at each budget, all plans under one and the same calibration;
- **CPU seconds** of the scoring pass, and their ratio to the first estimator's.

`measured` solves on the measured divergences themselves, `interactions` improves the first
estimator's plans with the cross terms that its pass left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from autoq.api.config import ScoringConfig
from autoq.api.scoring import BatchesInMemory, ScoringPass
from autoq.api.task import load, load_data, scoring_task, token_batches
from autoq.bundled import model_path
from autoq.calibration import calibrate
from autoq.formats import NONE, FormatName
from autoq.layers.quantize import Container
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models import Assignment, discover, forward_logits, output_kind
from autoq.search import CostTable, SensitivityTable, build_cost_table, solve
from autoq.search.estimators import Estimator, make_estimator
from autoq.search.interactions import Interactions, improve
from autoq.search.objectives import divergence_of

FORMATS = tuple(FormatName(name) for name in ("nvfp4", "fp8", "w4a8_awq"))
BUDGETS = (4.3, 4.5, 5.0, 5.5, 6.0, 7.0)
SEQUENCE_LENGTH = 256

CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "token_projection": ("token_projection", {}),
    "fisher_projection": ("fisher_projection", {}),
    "fisher_projection, half the tokens": ("fisher_projection", {"row_fraction": 0.5}),
    "fisher_projection, a quarter of the tokens": ("fisher_projection", {"row_fraction": 0.25}),
    "token_projection, 4 draws": ("token_projection", {"draws": 4}),
    "token_projection, half the tokens": ("token_projection", {"row_fraction": 0.5}),
    "token_projection, a quarter of the tokens": ("token_projection", {"row_fraction": 0.25}),
    "sequence_projection, 4 draws": ("sequence_projection", {}),
    "diagonal": ("diagonal", {}),
    "factored": ("factored", {}),
    "quantized_point": ("quantized_point", {}),
    "forward_only, 16 sequences": ("forward_only", {}),
}
"""Name in the table -> estimator and its options; the others are compared with the first."""

INTERACTION_WEIGHT = 0.5
"""Of the cross terms in `interactions`."""


@dataclass
class Bench:
    """One model, calibrated once, with its held-out tokens and what was measured on them."""

    folder: str
    sequences: int
    held_out: int
    single_sequences: int
    measured: dict[tuple[FormatName, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = ScoringConfig(formats=FORMATS, calibration_sequences=self.sequences)
        self.loaded = load(self.config, self.folder)
        self.model = self.loaded.model
        self.model_map = discover(self.model)
        self.data = load_data(
            self.loaded,
            None,
            sequences=self.sequences,
            sequence_length=SEQUENCE_LENGTH,
            split="calibration",
            seed=0,
        )
        task = scoring_task(self.loaded, self.data, self.config)
        self.calibration = calibrate(
            self.model,
            self.model_map,
            FORMATS,
            task.batches,
            task.run,
            run_small=task.run_small,
            container=Container.MODELOPT,
            scale_dtype=self.loaded.storage_dtype,
        )
        held_out = load_data(
            self.loaded,
            None,
            sequences=self.held_out,
            sequence_length=SEQUENCE_LENGTH,
            split="held_out",
            seed=0,
        )
        self.batches = token_batches(held_out, self.config.batch_size, self.loaded.device)
        self.simulated = SimulatedModel(
            self.model,
            self.model_map.slots,
            {},
            self.calibration,
            container=Container.MODELOPT,
            scale_dtype=self.loaded.storage_dtype,
        )
        with torch.no_grad():
            self.reference = [forward_logits(self.model, ids) for ids in self.batches]
        self.costs: CostTable = build_cost_table(self.model_map, (*FORMATS, NONE))

    def score(self, name: str, options: Mapping[str, Any]) -> tuple[SensitivityTable, Any, float]:
        """(scores, arrays beside them, CPU seconds) of one estimator's pass."""

        def make(chosen: str) -> Estimator:
            return make_estimator(
                chosen,
                self.model,
                self.model_map,
                FORMATS,
                self.calibration,
                container=Container.MODELOPT,
                scale_dtype=self.loaded.storage_dtype,
                **options,
            )

        config = ScoringConfig(formats=FORMATS, estimator=name)
        task = scoring_task(self.loaded, self.data, config)
        started = time.process_time()
        estimator, contributions = ScoringPass(
            make=make,
            batches=len(task.batches),
            loss=task.loss,
            store=BatchesInMemory(),
            advance=lambda steps=1: None,
            note=print,
        ).run(name)
        seconds = time.process_time() - started
        return self.table(name, contributions, estimator.unit), estimator.results(), seconds

    def table(self, name: str, contributions: NDArray[Any], unit: str) -> SensitivityTable:
        """Scores as the solver takes them."""
        return SensitivityTable(
            groups=tuple(group.name for group in self.model_map.groups),
            formats=FORMATS,
            contributions=contributions,
            unit=unit,
            estimator=name,
        )

    def single_divergences(self) -> NDArray[np.float64]:
        """Measured divergence of quantising one group alone, [groups, formats]."""
        found = np.full((len(self.model_map.groups), len(FORMATS)), np.nan)
        batches = max(1, self.single_sequences // self.config.batch_size)
        for row, group in enumerate(self.model_map.groups):
            for column, name in enumerate(FORMATS):
                if all((slot, name) in self.calibration for slot in group.slots):
                    self.simulated.apply(dict.fromkeys(group.slots, name))
                    found[row, column] = self._divergence(batches)
        self.simulated.restore()
        return found

    def divergence(self, assignment: Assignment) -> float:
        """Measured divergence of a plan on all held-out sequences; measured once."""
        key = tuple(assignment[group.name] for group in self.model_map.groups)
        if key not in self.measured:
            self.simulated.apply(slot_formats_of(self.model_map, assignment))
            self.measured[key] = self._divergence(len(self.batches))
            self.simulated.restore()
        return self.measured[key]

    @torch.no_grad()
    def _divergence(self, batches: int) -> float:
        divergence: Callable[[Tensor, Tensor], Tensor] = divergence_of(output_kind(self.model))
        totals = [
            float(divergence(before, forward_logits(self.model, ids)).double().mean(dim=1).sum())
            for before, ids in zip(self.reference[:batches], self.batches[:batches], strict=True)
        ]
        return sum(totals) / sum(len(ids) for ids in self.batches[:batches])

    def plans(self, table: SensitivityTable, budgets: Sequence[float]) -> list[Assignment]:
        """The best assignments for all budgets."""
        return [solve(table, self.costs, budget).assignment for budget in budgets]


def run(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of one model, as plain data."""
    bench = Bench(folder, arguments.sequences, arguments.held_out, arguments.single_sequences)
    budgets = [float(text) for text in arguments.budgets.split(",")]
    singles = bench.single_divergences()
    rows: dict[str, Any] = {}

    def add(case: str, table: SensitivityTable, plans: Sequence[Assignment], seconds: Any) -> None:
        scores = table.scores()
        known = np.isfinite(scores) & np.isfinite(singles)
        rows[case] = {
            "rank_correlation": float(spearmanr(scores[known], singles[known]).statistic),
            "divergence": [bench.divergence(plan) for plan in plans],
            "cpu_seconds": seconds,
        }
        print(f"{folder}: {case} is through", file=sys.stderr, flush=True)

    for case in arguments.case or CASES:
        name, options = CASES[case]
        table, results, seconds = bench.score(name, options)
        add(case, table, bench.plans(table, budgets), seconds)
        if "interactions" in results and "interactions" not in rows:
            interactions = Interactions(
                groups=table.groups, formats=table.formats, gram=results["interactions"]
            )
            better = partial(_improved, bench.costs, table, interactions)
            add("interactions", table, [better(budget) for budget in budgets], seconds)
    measured = bench.table("measured", singles[None], "nats_per_token")
    add("measured", measured, bench.plans(measured, budgets), None)
    return {"model": Path(folder).name, "budgets": budgets, "rows": rows}


def _improved(
    costs: CostTable, table: SensitivityTable, interactions: Interactions, budget: float
) -> Assignment:
    plan = solve(table, costs, budget)
    return improve(plan, interactions, table, costs, budget, weight=INTERACTION_WEIGHT).assignment


def markdown(found: Mapping[str, Any]) -> str:
    """The table of one model."""
    budgets = [f"{budget:g}" for budget in found["budgets"]]
    first = next(iter(found["rows"].values()))
    lines = [
        f"| {found['model']} | rank | {' | '.join(budgets)} | geometric mean | CPU s | ratio |",
        "|---|---:|" + "---:|" * (len(budgets) + 3),
    ]
    for case, row in found["rows"].items():
        ratios = np.asarray(row["divergence"]) / np.asarray(first["divergence"])
        seconds = row["cpu_seconds"]
        cost = (
            "| |" if seconds is None else f"{seconds:.1f} | {seconds / first['cpu_seconds']:.2f} |"
        )
        cells = " | ".join(f"{value:.3e}" for value in row["divergence"])
        mean = float(np.exp(np.log(ratios).mean()))
        lines.append(f"| {case} | {row['rank_correlation']:.4f} | {cells} | {mean:.3f} | {cost}")
    return "\n".join(lines)


def main() -> None:
    """Run all models, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="model folder; repeatable")
    parser.add_argument("--case", action="append", choices=list(CASES), help="all if left out")
    parser.add_argument("--budgets", default=",".join(f"{budget:g}" for budget in BUDGETS))
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate and score on")
    parser.add_argument("--held-out", type=int, default=128, help="sequences for plans")
    parser.add_argument("--single-sequences", type=int, default=32, help="for groups alone")
    parser.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    arguments = parser.parse_args()
    found = []
    for folder in arguments.model or [str(model_path())]:
        found.append(run(folder, arguments))
        print(markdown(found[-1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
