"""What a further format costs in scoring: medians of one batch with one, two and three formats.

    OMP_NUM_THREADS=1 python benchmarks/format_cost.py [--model DIR] [--batches 16]

All in one process on the same batches, by turns, in processor time, which a busy machine changes
less. The base pass is the scoring pass with one format: a forward, a backward and that format's
projections. It is the least that a search can do, and it shrinks as the rest of the pass gets
faster, so a ratio to it can rise while a further format costs less; read the milliseconds, too.

A further format costs a matrix product of every gradient with the error of a weight, and the
quantisation of the inputs where no format before it leaves the same of them: `fp8` and `w4a8_awq`
share theirs unless AWQ scales came between. The order of the formats is that of the table. Weights
are quantised once, before the clock runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from autoq.api.config import ScoringConfig
from autoq.api.task import load, load_data, own_distribution_task
from autoq.bundled import model_path
from autoq.calibration import calibrate
from autoq.formats import FormatName
from autoq.layers.quantize import Container
from autoq.models import discover
from autoq.search.estimators import DEFAULT_ESTIMATOR, make_estimator

FORMATS = tuple(FormatName(name) for name in ("fp8", "nvfp4", "w4a8_awq"))


def main() -> None:
    """Print the table."""
    arguments = parse_arguments()
    config = ScoringConfig(formats=FORMATS, calibration_sequences=4 * arguments.batches)
    loaded = load(config, arguments.model)
    data = load_data(
        loaded,
        None,
        sequences=config.calibration_sequences,
        sequence_length=256,
        split="calibration",
        seed=0,
    )
    task = own_distribution_task(loaded, data, config)
    model_map = discover(loaded.model)
    calibration = calibrate(
        loaded.model,
        model_map,
        FORMATS,
        task.batches,
        task.run,
        run_small=task.run_small,
        container=Container.MODELOPT,
        scale_dtype=loaded.storage_dtype,
    )
    scorers = {
        count: make_estimator(
            DEFAULT_ESTIMATOR,
            loaded.model,
            model_map,
            FORMATS[:count],
            calibration,
            container=Container.MODELOPT,
            scale_dtype=loaded.storage_dtype,
        )
        for count in range(1, len(FORMATS) + 1)
    }
    for scorer in scorers.values():
        scorer.score_batch(0, partial(task.loss, 0))  # quantises the weights, once
    seconds: dict[int, list[float]] = {count: [] for count in (0, *scorers)}
    for index, batch in enumerate(task.batches):
        with torch.no_grad():
            seconds[0].append(timed(partial(task.run, batch)))
        for count, scorer in scorers.items():
            seconds[count].append(
                timed(partial(scorer.score_batch, index, partial(task.loss, index)))
            )
    report({count: statistics.median(times) for count, times in seconds.items()})


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(model_path()))
    parser.add_argument("--batches", type=int, default=16)
    return parser.parse_args()


def timed(work: Callable[[], object]) -> float:
    """Processor seconds that `work` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def report(medians: dict[int, float]) -> None:
    """Print milliseconds, ratios to a forward pass, and of each further format to the base pass."""
    print(f"one forward: {1e3 * medians[0]:.0f} ms")
    print(
        f"{'formats':<22} {'ms':>5} {'score / forward':>16} {'further, ms':>12} {'/ base pass':>12}"
    )
    for count in range(1, len(medians)):
        names = FORMATS[0] if count == 1 else f"{count} (+ {FORMATS[count - 1]})"
        line = f"{names:<22} {1e3 * medians[count]:>5.0f} {medians[count] / medians[0]:>16.2f}"
        if count > 1:
            further = medians[count] - medians[count - 1]
            line += f" {1e3 * further:>12.0f} {further / medians[1]:>12.3f}"
        print(line)
    most = len(medians) - 1
    mean = (medians[most] - medians[1]) / (most - 1)
    print(f"mean further format: {1e3 * mean:.0f} ms, {mean / medians[1]:.3f} of the base pass")


if __name__ == "__main__":
    main()
