"""Which share of the possible gain refinement finds where the true losses are known.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/refine_synthetic.py [--seeds 3] [--layers 49]
        [--out FILE.json]

196 groups in four formats at 5 bits. True losses are the predicted ones times log-normal errors, one
for each cell, or partly shared by the layers of a type and depth; pairs of cells interact, and every
evaluation has 32 sequences that differ from one another. Possible is the optimum of the true losses,
which the solver proves (but for the interactions). The figure is the mean over seeds of
(start - found) / (start - possible) in true loss, for the plan of least measured loss after 30 and
after all evaluations; `possible` is what could be gained, as a share of the start's loss.

The multipliers are suggested by Optuna's TPE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from autoq.search import solve
from autoq.search.refine import EVERY_STRATEGY, Refinement, Source, Trial
from tests.search.refining import World, trial_of

BITS = 5.0
EARLY = 30
STRATEGIES: Mapping[str, tuple[Source, ...]] = {
    "diverse": (Source.DIVERSE,),
    "exchanges": (Source.SWAP,),
    "multipliers": (Source.MULTIPLIERS,),
    "whole": EVERY_STRATEGY,
}
ERRORS: Mapping[str, Mapping[str, float]] = {
    "each cell, sigma 1": {"sigma": 1.0},
    "each cell, sigma 0.3": {"sigma": 0.3},
    "each cell 0.3, type and depth 0.5": {"sigma": 0.3, "class_sigma": 0.5},
}


def main() -> None:
    """Run every case, print the table."""
    arguments = _arguments()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows: list[dict[str, Any]] = []
    print(f"| errors | possible | strategy | at {EARLY} | at {arguments.trials} |")
    print("| --- | --- | --- | --- | --- |")
    for label, options in ERRORS.items():
        for strategy, sources in STRATEGIES.items():
            runs = [_run(seed, options, sources, arguments) for seed in range(arguments.seeds)]
            means = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            rows.append({"errors": label, "strategy": strategy, **means, "runs": runs})
            print(
                f"| {label} | {means['possible']:.1%} | {strategy} | {means['early']:.0%} | "
                f"{means['final']:.0%} |",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=49, help="of four groups each")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def _run(
    seed: int,
    options: Mapping[str, float],
    strategies: tuple[Source, ...],
    arguments: argparse.Namespace,
) -> dict[str, float]:
    world = World.of(seed, layers=arguments.layers, **options)
    finished = _trials(world, strategies, arguments.trials, seed)
    losses = [world.loss(trial.assignment) for trial in finished]
    best = world.loss(world.best(BITS).assignment)

    def share(count: int) -> float:
        found = min(range(min(count, len(finished))), key=lambda place: finished[place].loss)
        return float((losses[0] - losses[found]) / (losses[0] - best))

    return {
        "possible": float(1 - best / losses[0]),
        "early": share(EARLY),
        "final": share(len(finished)),
    }


def _trials(world: Any, strategies: tuple[Source, ...], trials: int, seed: int) -> list[Trial]:
    start = solve(world.sensitivity, world.costs, BITS)
    refinement = Refinement(
        world.sensitivity,
        world.costs,
        BITS,
        start,
        trials=trials,
        strategies=strategies,
        seed=seed,
    )
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    finished: list[Trial] = []
    for number in range(trials):
        asked = study.ask()
        proposal = refinement.propose(finished, [], number, asked.suggest_float)
        if proposal is None:
            break
        finished.append(trial_of(world, proposal, number))
        study.tell(asked, finished[-1].loss)
    return finished


if __name__ == "__main__":
    main()
