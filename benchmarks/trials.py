"""How many trials of a refinement fit into a minute, beside quantising the whole model for each.

    OMP_NUM_THREADS=1 python benchmarks/trials.py --cache DIR [--trials 100] [--out FILE.json]

A refinement of the bundled model at 5 bits is run first; its plans, in their order, are then
measured in five ways, all five for one plan before the next, each in a model of its own:

- anew: the original runs, every layer is quantised from its own weights, the quantised model runs;
- kept outputs: as anew, but the original ran once, before;
- changed layers: only layers whose format differs from the plan before are quantised;
- caches: quantised weights and outputs of first blocks that were seen before are not computed again;
- early stopping: as caches, and a trial ends as soon as the rule says that it is hopeless.

All but the last give the same losses bit for bit, and the last the first ones of them; that is
checked. Times are this process's CPU seconds, which other work on the machine moves less than
seconds on the clock; both are in the JSON file. Ratios are of sums over all trials, and medians of
the ratios trial by trial.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoq.api import open_study, search
from autoq.api.refinement._data import refine_data
from autoq.api.refinement._trials import as_trial
from autoq.api.refinement.measure import TrialMeasurer
from autoq.api.refinement.refining import RefineOptions, open_trials
from autoq.api.study import Study
from autoq.bundled import model_path
from autoq.data import TokenData
from autoq.models import Assignment
from autoq.search.refine import Refinement, Trial

ANEW = "anew"
WAYS = (ANEW, "kept outputs", "changed layers", "caches", "early stopping")
CACHE_BYTES = 1 << 30


def main() -> None:
    """Run the refinement, measure its plans in every way, print the table."""
    arguments = _arguments()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{arguments.cache / 'trials.db'}"
    study = search(
        model_path(),
        effective_bits=5.0,
        calibration_sequences=64,
        sequence_length=arguments.sequence_length,
        measure=False,
        store=store,
    )
    options = RefineOptions(
        trials=arguments.trials, sequences=arguments.sequences, fresh_sequences=8
    )
    started = time.perf_counter(), time.process_time()
    study.refine(trials=options.trials, sequences=options.sequences, fresh_sequences=8)
    whole = time.perf_counter() - started[0], time.process_time() - started[1]
    plans = _plans(study, options)
    rows = _measured_in_every_way(store, study, plans, options)
    found = {
        "trials": len(plans),
        "sequences": options.sequences,
        "sequence_length": arguments.sequence_length,
        "threads": torch.get_num_threads(),
        "sources": [plan.source.value for plan in plans],
        "whole_refinement_seconds": dict(zip(("clock", "cpu"), whole, strict=True)),
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"\nthe whole refinement, proposals and storing included: {whole[1]:.1f} CPU seconds")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _plans(study: Study, options: RefineOptions) -> list[Trial]:
    """The refinement's trials, in their order."""
    trials = open_trials(study, study.unrefined_plan(), options).get_trials()
    found = [as_trial(entry) for entry in trials if "losses" in entry.user_attrs]
    return sorted(found, key=lambda trial: trial.number)


def _measured_in_every_way(
    store: str, study: Study, plans: Sequence[Trial], options: RefineOptions
) -> list[dict[str, Any]]:
    tokens = refine_data(study, options).selection
    start = study.unrefined_plan().to_plan()
    refinement = Refinement(
        study.sensitivity, study.costs(), start.budgets, start, trials=options.trials
    )
    ways = _Ways(store, tokens, options, refinement)
    rows = []
    with torch.no_grad():
        for plan in plans:
            rows.append(ways.row(plan.assignment))
    return rows


class _Ways:
    """Each way with a study, and so a model, of its own."""

    def __init__(
        self, store: str, tokens: TokenData, options: RefineOptions, refinement: Refinement
    ) -> None:
        self._tokens, self._aim, self._refinement = tokens, options.aim, refinement
        self._anew = open_study(None, store)
        self._measurers = {
            way: TrialMeasurer(
                open_study(None, store),
                tokens,
                options.aim,
                cache_bytes=0 if way in WAYS[1:3] else CACHE_BYTES,
            )
            for way in WAYS[1:]
        }
        self._best: tuple[float, ...] = ()

    def row(self, assignment: Assignment) -> dict[str, Any]:
        """Seconds of each way for one plan."""
        run: Mapping[str, Callable[[], tuple[float, ...]]] = {
            ANEW: lambda: self._losses_anew(assignment),
            "kept outputs": lambda: self._losses_of_all_layers(assignment),
            "changed layers": lambda: self._measurers["changed layers"].measure(assignment).losses,
            "caches": lambda: self._measurers["caches"].measure(assignment).losses,
            "early stopping": lambda: self._losses_until_hopeless(assignment),
        }
        losses, seconds = {}, {}
        for way in WAYS:
            started = time.perf_counter(), time.process_time()
            losses[way] = run[way]()
            seconds[way] = {
                "clock": time.perf_counter() - started[0],
                "cpu": time.process_time() - started[1],
            }
        _check_equal(losses)
        if not self._best or sum(losses[ANEW]) < sum(self._best):
            self._best = losses[ANEW]
        return {"seconds": seconds, "sequences": len(losses["early stopping"])}

    def _losses_anew(self, assignment: Assignment) -> tuple[float, ...]:
        with TrialMeasurer(self._anew, self._tokens, self._aim, cache_bytes=0) as measurer:
            return measurer.measure(assignment).losses

    def _losses_of_all_layers(self, assignment: Assignment) -> tuple[float, ...]:
        measurer = self._measurers["kept outputs"]
        if measurer._simulated is not None:
            measurer._simulated.restore()
        return measurer.measure(assignment).losses

    def _losses_until_hopeless(self, assignment: Assignment) -> tuple[float, ...]:
        def stop(so_far: Sequence[float]) -> bool:
            return bool(self._best) and self._refinement.hopeless(self._best, so_far)

        return self._measurers["early stopping"].measure(assignment, stop=stop).losses


def _check_equal(losses: Mapping[str, tuple[float, ...]]) -> None:
    for way, values in losses.items():
        expected = losses[ANEW][: len(values)]
        if values != expected or (way != WAYS[-1] and len(values) != len(losses[ANEW])):
            raise AssertionError(f"{way} gives other losses than quantising anew")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: trials per minute of each way, and how much more than anew.

    The first trial is left out: what it computes for the others is in none of them.
    """
    cpu = {
        way: np.array([row["seconds"][way]["cpu"] for row in rows[1:]], dtype=np.float64)
        for way in WAYS
    }
    lines = [
        "| each trial | CPU seconds, median | trials per CPU minute | as many as anew | median of ratios |",
        "|---|---|---|---|---|",
    ]
    for way, seconds in cpu.items():
        ratio = cpu[ANEW].sum() / seconds.sum()
        lines.append(
            f"| {way} | {np.median(seconds):.2f} | {60 / seconds.mean():.0f} | {ratio:.1f}x | "
            f"{np.median(cpu[ANEW] / seconds):.1f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
