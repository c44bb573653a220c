"""What measured refinement gains over the plan that the scores lead to, strategy by strategy.

    OMP_NUM_THREADS=1 python benchmarks/refine.py --cache DIR [--out FILE.json] [--only NAME ...]

Models: the bundled one and its variant with activation outliers. For each budget the plan that is
optimal by the scores is refined with the same number of evaluations by (a) diverse plans only, (b)
exchanges only, (c) multipliers by layer type and depth under Optuna's TPE only, and by the whole
procedure; then by the whole procedure from scores that were made wrong on purpose, every one
multiplied by a log-normal error (sigma 1).

Three sets of tokens: evaluations are made on some of the calibration's sequences; finalists are
accepted or refused on other text; figures are KL divergences, in nats per token, on held-out
sequences that took no part. Trials stop early by the rule that the product uses.

A figure is the improvement of the refined plan over its start, 1 - refined / start, with a 95 %
interval from resampling the held-out sequences, pairs kept together. A plan that is not accepted
counts as no improvement. Of wrong scores the table says which share of the possible gain came back:
possible is the best plan that any run found for the case, by its held-out divergence.

Divergences and results are kept in the cache, so what was stopped goes on where it was, and several
processes may share the work by `--only`; delete what is out of date.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from numpy.typing import NDArray
from refine_tables import bootstrap, markdown

from autoq.api import search
from autoq.api.task import load_data, token_batches
from autoq.bundled import model_path
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models import Assignment
from autoq.models.forward import forward_logits
from autoq.search import CostTable, Plan, SensitivityTable, solve
from autoq.search.refine import EVERY_STRATEGY, Refinement, Source, Trial, accepted

if TYPE_CHECKING:
    from autoq.api.study import Study

FORMATS = ("nvfp4", "fp8", "w4a8_awq")
BUDGETS = (4.5, 5.0, 6.0)
WRONG = "whole, wrong scores"
WRONG_SIGMA = 1.0
RUNS: Mapping[str, tuple[Source, ...]] = {
    "whole": EVERY_STRATEGY,
    WRONG: EVERY_STRATEGY,
    "exchanges": (Source.SWAP,),
    "multipliers": (Source.MULTIPLIERS,),
    "diverse": (Source.DIVERSE,),
}

SEQUENCE_LENGTH = 128
CALIBRATION_SEQUENCES = 64
TOKENS: Mapping[str, tuple[str, int, int]] = {  # set -> split, sequences, seed of the text
    "selection": ("calibration", 32, 0),
    "fresh": ("calibration", 192, 1),
    "held_out": ("held_out", 128, 0),
}
BATCH = 8
"""Sequences per batch; after each a trial may be stopped."""


def main() -> None:
    """Run every case, print the tables, write the JSON file."""
    arguments = _arguments()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    models = _models(arguments)
    if not arguments.known:
        _run_all(models, arguments)
    rows = [
        row for name in models for bits in arguments.bits for row in _rows(name, bits, arguments)
    ]
    print(markdown(rows))
    if arguments.out:
        settings = {
            "trials": arguments.trials,
            "tokens": {name: [*text, SEQUENCE_LENGTH] for name, text in TOKENS.items()},
            "formats": FORMATS,
            "wrong_sigma": WRONG_SIGMA,
        }
        arguments.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def _run_all(models: Mapping[str, Path], arguments: argparse.Namespace) -> None:
    """Every case of one strategy before the next, so that a part is of use, too."""
    cases = [
        Cases(MeasuredModel(name, folder, arguments.cache), arguments)
        for name, folder in models.items()
    ]
    for strategy in RUNS:
        for model in cases:
            for bits in arguments.bits:
                model.run(bits, strategy)


def _rows(name: str, bits: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All results of a case, with the share of the possible gain that each made."""
    paths = [_result_path(arguments.cache, name, bits, strategy) for strategy in RUNS]
    rows = [json.loads(path.read_text()) for path in paths if path.is_file()]
    best = min((row[kl] for row in rows for kl in ("start_kl", "best_kl", "kept_kl")), default=0.0)
    for row in rows:
        possible = row["start_kl"] - best
        gained = row["start_kl"] - row["kept_kl"]
        row["share_of_possible"] = gained / possible if possible > 0.0 else None
    return rows


def _result_path(cache: Path, name: str, bits: float, strategy: str) -> Path:
    return cache / f"{name} {bits:g} {strategy}.json"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder for divergences")
    parser.add_argument("--only", nargs="*", help="names of models; all if left out")
    parser.add_argument("--bits", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument(
        "--known", action="store_true", help="report what the cache has; run nothing"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def _models(arguments: argparse.Namespace) -> dict[str, Path]:
    outliers = arguments.cache / "outliers"
    if not (outliers / "config.json").is_file():
        command = [sys.executable, "-m", "autoq.bundled.outliers", str(model_path()), str(outliers)]
        subprocess.run(command, check=True)
    models = {"bundled": Path(model_path()), "outliers": outliers}
    return {name: path for name, path in models.items() if name in (arguments.only or models)}


class MeasuredModel:
    """A searched model whose assignments are measured on any of the sets of tokens."""

    def __init__(self, name: str, folder: Path, cache: Path) -> None:
        self.name = name
        self._path = cache / f"{name}.json"
        self._known: dict[str, list[float]] = (
            json.loads(self._path.read_text()) if self._path.is_file() else {}
        )
        self._study = _searched(folder, cache / f"{name}.db")
        self.sensitivity: SensitivityTable = self._study.sensitivity
        self.costs: CostTable = self._study.costs()
        self._batches = {text: self._token_batches(*TOKENS[text]) for text in TOKENS}
        self._references: dict[str, list[Any]] = {}
        self._simulated: SimulatedModel | None = None

    def losses(self, assignment: Assignment, text: str) -> list[float]:
        """KL divergence of every sequence of one set of tokens, in nats per token."""
        found: list[float] = []
        for batch in range(len(self._batches[text])):
            found += self.batch_losses(assignment, text, batch)
        return found

    def batch_losses(self, assignment: Assignment, text: str, batch: int) -> list[float]:
        """The same of one batch."""
        formats = [assignment[group] for group in self.costs.groups]
        key = f"{text} {batch} {' '.join(formats)}"
        if key not in self._known:
            self._known[key] = self._measure(assignment, text, batch)
        return self._known[key]

    def batches(self, text: str) -> int:
        """Batches of a set of tokens."""
        return len(self._batches[text])

    def save(self) -> None:
        """Keep what was measured."""
        self._path.write_text(json.dumps(self._known))

    def _measure(self, assignment: Assignment, text: str, batch: int) -> list[float]:
        import torch

        with torch.no_grad():
            expected, ids = self._reference(text)[batch], self._batches[text][batch]
            self._apply(assignment)
            found = forward_logits(self._study.loaded().model, ids).float().log_softmax(-1)
            per_token = (expected.exp() * (expected - found)).sum(-1).double()
        return [float(value) for value in per_token.mean(-1)]

    def _reference(self, text: str) -> list[Any]:
        if text not in self._references:
            if self._simulated is not None:
                self._simulated.restore()
            model = self._study.loaded().model
            self._references[text] = [
                forward_logits(model, ids).float().log_softmax(-1) for ids in self._batches[text]
            ]
        return self._references[text]

    def _apply(self, assignment: Assignment) -> None:
        study = self._study
        formats = slot_formats_of(study.model_map, assignment)
        if self._simulated is not None:
            self._simulated.apply(formats)
            return
        self._simulated = SimulatedModel(
            study.loaded().model,
            study.model_map.slots,
            formats,
            study.calibration,
            container=study.config.container,
            scale_dtype=study.storage_dtype,
        )

    def _token_batches(self, split: Any, sequences: int, seed: int) -> list[Any]:
        loaded = self._study.loaded()
        tokens = load_data(
            loaded,
            None,
            sequences=sequences,
            sequence_length=SEQUENCE_LENGTH,
            split=split,
            seed=seed,
        )
        return list(token_batches(tokens, BATCH, loaded.device))


def _searched(folder: Path, store: Path) -> Study:
    return search(
        folder,
        effective_bits=max(BUDGETS),
        formats=list(FORMATS),
        calibration_sequences=CALIBRATION_SEQUENCES,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH,
        dtype="float32",
        seed=0,
        store=f"sqlite:///{store}",
        measure=False,
    )


@dataclass(frozen=True, slots=True)
class Cases:
    """One model at every budget, with every strategy; what has a result already is not run."""

    model: MeasuredModel
    arguments: argparse.Namespace

    def run(self, bits: float, strategy: str) -> None:
        """One refinement, its result kept in the cache."""
        path = _result_path(self.arguments.cache, self.model.name, bits, strategy)
        if path.is_file():
            return
        started = time.process_time()
        table = self.model.sensitivity
        table = _made_wrong(table) if strategy == WRONG else table
        run = Run(self.model, table, bits, RUNS[strategy], self.arguments.trials)
        row = {"model": self.model.name, "bits": bits, "strategy": strategy, **run.result()}
        row["cpu_seconds"] = round(time.process_time() - started, 1)
        self.model.save()
        path.write_text(json.dumps(row))
        _note(f"{path.stem}: {row['improvement']} {row['cpu_seconds']} CPU seconds")


def _made_wrong(table: SensitivityTable) -> SensitivityTable:
    """Every score times its own log-normal error."""
    generator = np.random.default_rng(0)
    errors = generator.lognormal(0.0, WRONG_SIGMA, table.contributions.shape[1:])
    return replace(table, contributions=table.contributions * errors)


@dataclass(frozen=True, slots=True)
class Run:
    """One refinement."""

    model: MeasuredModel
    sensitivity: SensitivityTable
    bits: float
    strategies: Sequence[Source]
    trials: int

    def result(self) -> dict[str, Any]:
        """Refine, accept or refuse, and measure what is kept on the held-out tokens."""
        start = solve(self.sensitivity, self.model.costs, self.bits)
        refinement = Refinement(
            self.sensitivity,
            self.model.costs,
            self.bits,
            start,
            trials=self.trials,
            strategies=self.strategies,
        )
        finished = self._trials(refinement)
        finalists = refinement.finalists(finished)
        kept, reason = self._confirmed(finalists)
        best = finalists[1] if len(finalists) > 1 else finalists[0]
        return {
            **self._held_out(start, best.assignment, kept.assignment),
            "trials": len(finished),
            "stopped_early": sum(not trial.complete for trial in finished),
            "found_by": best.source.value,
            "found_in_trial": best.number,
            "accepted": kept is not finalists[0],
            "reason": reason,
        }

    def _trials(self, refinement: Refinement) -> list[Trial]:
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        finished: list[Trial] = []
        for number in range(self.trials):
            asked = study.ask()
            proposal = refinement.propose(finished, [], number, asked.suggest_float)
            if proposal is None:
                break
            complete = [trial for trial in finished if trial.complete]
            best = min(complete, key=lambda trial: trial.loss, default=None)
            losses, whole = self._measured(refinement, proposal.plan, best)
            study.tell(asked, float(np.mean(losses)))
            finished.append(
                Trial(
                    number=number,
                    source=proposal.source,
                    assignment=proposal.plan.assignment,
                    losses=tuple(losses),
                    complete=whole,
                )
            )
        return finished

    def _measured(
        self, refinement: Refinement, plan: Plan, best: Trial | None
    ) -> tuple[list[float], bool]:
        losses: list[float] = []
        batches = self.model.batches("selection")
        for batch in range(batches):
            losses += self.model.batch_losses(plan.assignment, "selection", batch)
            if best and batch + 1 < batches and refinement.hopeless(best.losses, losses):
                return losses, False
        return losses, True

    def _confirmed(self, finalists: Sequence[Trial]) -> tuple[Trial, str]:
        """The finalist that is accepted with the least loss on fresh tokens; else the start."""
        start, *others = finalists
        known = {id(trial): self.model.losses(trial.assignment, "fresh") for trial in finalists}
        verdicts = [
            (accepted(known[id(start)], known[id(trial)], candidates=len(others)), trial)
            for trial in others
        ]
        good = [
            (verdict.difference, place) for place, (verdict, _) in enumerate(verdicts) if verdict
        ]
        if good:
            verdict, trial = verdicts[min(good)[1]]
            return trial, verdict.reason
        return start, verdicts[0][0].reason if verdicts else "no plan looked better"

    def _held_out(self, start: Plan, best: Assignment, kept: Assignment) -> dict[str, Any]:
        measured: dict[str, NDArray[np.float64]] = {
            name: np.array(self.model.losses(assignment, "held_out"))
            for name, assignment in (
                ("start", start.assignment),
                ("best", best),
                ("kept", kept),
            )
        }
        return {
            **{f"{name}_kl": float(losses.mean()) for name, losses in measured.items()},
            "improvement": bootstrap(measured["start"], measured["kept"]),
            "improvement_before_acceptance": bootstrap(measured["start"], measured["best"]),
        }


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
