"""Search a model with autoq, and measure its plans at the bits of the peer's and at its budgets.

Reads what `quality_modelopt.py` wrote. With `--peer-assignments` the peer's plans are measured under
autoq's quantiser too, so that nothing but the choice of formats differs. With `--refine` autoq's
plans at the bits of the peer's rescaled ones are refined by as many measured trials, and nothing else
is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence import Reference, token_batches
from run_autoq import ROUNDING, SEED, effective_bits_of

if TYPE_CHECKING:
    from autoq.api import Study

RESCALED = "rescaled"


def main() -> None:
    """Search once; solve and measure for every bit count that the tables ask for."""
    arguments = _arguments()
    import torch

    torch.set_num_threads(arguments.threads)
    import transformers

    started = time.perf_counter()
    with _searched(arguments) as study:
        seconds = time.perf_counter() - started
        measurer = Measurer(study, arguments)
        peer = [_peer_plan(measurer, arguments, *entry) for entry in _peer_plans(arguments)]
        if arguments.refine:
            own = _refined(measurer, study, arguments, {plan["effective_bits"] for plan in peer})
        else:
            own = {repr(limit): measurer.own(limit) for limit in _limits(peer, arguments.bits)}
        result = {
            "versions": {
                "autoq": study.record.versions["autoq"],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "search_seconds": seconds,
            "estimator": study.sensitivity.estimator,
            "groups": len(study.model_map.groups),
            "peer_plans": peer,
            "own": own,
        }
    arguments.out.write_text(json.dumps(result, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--held-out", type=Path, required=True, help=".npy of token ids")
    parser.add_argument("--peer-plans", type=Path, nargs="+", required=True)
    parser.add_argument("--peer-assignments", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", type=lambda text: text.split(","), required=True)
    parser.add_argument("--bits", type=lambda text: [float(b) for b in text.split(",")])
    parser.add_argument("--calibration", help="as in autoq.search; its default if left out")
    parser.add_argument("--estimator", help="as in autoq.search; its default if left out")
    parser.add_argument(
        "--refine", type=int, metavar="TRIALS", help="measured trials for each plan"
    )
    parser.add_argument("--refine-sequences", type=int, default=64, help="to measure trials on")
    parser.add_argument("--fresh-sequences", type=int, default=128, help="to confirm the best on")
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


@contextmanager
def _searched(arguments: argparse.Namespace) -> Iterator[Study]:
    from autoq.api import search

    options: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("calibration", "estimator")
        if getattr(arguments, name)
    }
    with tempfile.TemporaryDirectory() as folder:
        yield search(
            arguments.model,
            effective_bits=arguments.bits[-1],
            formats=arguments.formats,
            calibration_sequences=arguments.sequences,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch,
            dtype=arguments.dtype,
            seed=SEED,
            store=f"sqlite:///{folder}/autoq.db",
            measure=False,
            **options,
        )


class Measurer:
    """Measures assignments of a study, each distinct one once."""

    def __init__(self, study: Study, arguments: argparse.Namespace) -> None:
        self._study = study
        self._batches = token_batches(arguments.held_out, arguments.batch)
        self._known: dict[tuple[Any, ...], list[float]] = {}

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self._forward, self._batches)

    @property
    def _forward(self) -> Any:
        from autoq.models.forward import forward_logits

        return partial(forward_logits, self._study.loaded().model)

    def own(self, limit: float) -> dict[str, Any]:
        """Autoq's plan for a budget, with what it takes and its divergence."""
        plan = self._study.solve(limit + ROUNDING)
        return self.of_assignment(plan.assignment)

    def of_assignment(self, assignment: Mapping[Any, Any]) -> dict[str, Any]:
        """An assignment of formats to groups, with what it takes and its divergence."""
        formats = {
            slot: assignment[group] for slot, group in self._study.model_map.group_of().items()
        }
        return {
            "effective_bits": self.effective_bits(formats),
            "assignment": dict(assignment),
            "kl_per_sequence": self.divergences(formats),
        }

    def slot_formats(self, formats: Mapping[str, str]) -> dict[Any, str]:
        """The format of every slot, where the peer names modules that hold several slots, too."""
        return {name: _of_nearest_parent(name, formats) for name in self._study.model_map.slots}

    def effective_bits(self, slot_formats: Mapping[Any, str]) -> float:
        """Bits per searched weight as stored."""
        return effective_bits_of(self._study, slot_formats)

    def divergences(self, slot_formats: Mapping[Any, Any]) -> list[float]:
        """KL from the original of every held-out sequence, in nats per token."""
        key = tuple(sorted(slot_formats.items()))
        if key not in self._known:
            self._known[key] = self._measure(slot_formats)
        return self._known[key]

    def _measure(self, slot_formats: Mapping[Any, Any]) -> list[float]:
        from autoq.layers.simulate import SimulatedModel

        study = self._study
        reference = self._reference  # before anything is quantised
        simulated = SimulatedModel(
            study.loaded().model,
            study.model_map.slots,
            slot_formats,
            study.calibration,
            container=study.config.container,
            scale_dtype=study.storage_dtype,
        )
        try:
            return reference.divergences(self._forward)
        finally:
            simulated.restore()


def _of_nearest_parent(name: str, formats: Mapping[str, str]) -> str:
    """The format given to a module, or else to the nearest module that holds it."""
    path = name
    while path not in formats:
        path, _, last = path.rpartition(".")
        if not last:
            raise KeyError(f"the peer gave no format to {name}")
    return formats[path]


def _peer_plans(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in arguments.peer_plans:
        for plan in json.loads(path.read_text())["plans"]:
            if not arguments.refine or plan["solver"] == RESCALED:
                yield path.stem, plan


def _peer_plan(
    measurer: Measurer, arguments: argparse.Namespace, source: str, plan: dict[str, Any]
) -> dict[str, Any]:
    formats = measurer.slot_formats(plan["formats"])
    return {
        "source": source,
        "solver": plan["solver"],
        "budget_bits": plan["budget_bits"],
        "effective_bits": measurer.effective_bits(formats),
        "kl_per_sequence": measurer.divergences(formats) if arguments.peer_assignments else None,
    }


def _refined(
    measurer: Measurer, study: Study, arguments: argparse.Namespace, limits: set[float]
) -> dict[str, Any]:
    """Limit -> the plan that scores lead to, and what refinement makes of it."""
    from refining import Refiner

    refiner = Refiner(
        study,
        trials=arguments.refine,
        sequences=arguments.refine_sequences,
        fresh=arguments.fresh_sequences,
    )
    found = {}
    for limit in sorted(limits):
        start = study.solve(limit + ROUNDING).to_plan()
        refined = refiner.refine(start)
        found[repr(limit)] = {
            "start": measurer.of_assignment(start.assignment),
            "best": measurer.of_assignment(refined.best),
            **measurer.of_assignment(refined.kept),
            "trials": refined.trials,
            "stopped_early": refined.stopped_early,
        }
    return found


def _limits(peer: list[dict[str, Any]], budgets: list[float]) -> list[float]:
    """Bits of all the peer's plans, and the budgets; where it overruns one, so may autoq."""
    overrun = {
        max(plan["budget_bits"], plan["effective_bits"])
        for plan in peer
        if plan["solver"] != RESCALED
    }
    return sorted({plan["effective_bits"] for plan in peer} | overrun | set(budgets))


if __name__ == "__main__":
    main()
