"""What a further format costs in scoring: medians of one batch with one, two and three formats.

    OMP_NUM_THREADS=1 python benchmarks/format_cost.py [--model DIR] [--batches 8]

All in one process on the same batches, by turns, in processor time, which a busy machine changes
less; ratios are to one forward pass of the same batch.
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
from autoq.search.estimators import TokenProjection

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
        count: TokenProjection(
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
    parser.add_argument("--batches", type=int, default=8)
    return parser.parse_args()


def timed(work: Callable[[], object]) -> float:
    """Processor seconds that `work` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def report(medians: dict[int, float]) -> None:
    """Print ratios to a forward pass, and of each further format to scoring with one."""
    print(f"{'formats':>8} {'score / forward':>16} {'further format / one format':>28}")
    for count in range(1, len(medians)):
        further = (medians[count] - medians[count - 1]) / medians[1] if count > 1 else 0.0
        print(f"{count:>8} {medians[count] / medians[0]:>16.2f} {further:>28.2f}")


if __name__ == "__main__":
    main()
