"""Memory and time of `autoq search --max-memory`, where blocks of the model are read one by one.

    OMP_NUM_THREADS=1 python benchmarks/streamed.py --gigabytes 4.1 --bound 0.8GB

Writes a random Llama-like model of that size, shard by shard, and scores it within the bound, in a
process of its own: peak resident memory over what must be there, which is the largest block's
weights in float32, its activations for a batch, and 600 MB for everything else. Then a model that
fits is scored in memory and within a bound, by turns: wall and processor time of the scoring pass,
as ratios, and whether the scores are equal, bit for bit. Everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from random_model import ModelShape, write_random_model

SHAPE = ModelShape(hidden=1024, intermediate=4096, vocabulary=8192, heads=16, shard_layers=8)


def main() -> None:
    """Make the models, run everything, print what came out."""
    arguments = parse_arguments()
    if arguments.run:
        return _run(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        large = write_random_model(folder / "large", arguments.gigabytes, SHAPE)
        found = _in_a_process(folder, "large", arguments.bound, arguments)
        print(memory_line(large, found, arguments), flush=True)
        write_random_model(folder / "small", arguments.small_gigabytes, SHAPE)
        runs = [
            (
                _in_a_process(folder, "small", "", arguments),
                _in_a_process(folder, "small", arguments.small_bound, arguments),
            )
            for _ in range(arguments.repeats)
        ]
    print(time_lines(runs))
    if arguments.json:
        record = _record(arguments, large, found, runs)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.1, help="size of the large model")
    parser.add_argument("--bound", default="0.8GB", help="on memory, for the large model")
    parser.add_argument("--small-gigabytes", type=float, default=0.3, help="of the model that fits")
    parser.add_argument("--small-bound", default="1.5GB", help="for the model that fits")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--formats", default="fp8,nvfp4")
    parser.add_argument("--calibration", default="max", help="as for autoq search")
    parser.add_argument("--repeats", type=int, default=1, help="by turns; the median is printed")
    parser.add_argument("--json", type=Path, help="where to write every run")
    parser.add_argument("--folder", type=Path, help="on the disk to use; the temporary folder's")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--max-memory", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(
    folder: Path, model: str, max_memory: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    options = ["--run", str(folder / model), "--max-memory", max_memory]
    for name in ("sequences", "sequence_length", "batch_size", "formats", "calibration"):
        options += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    finished = subprocess.run(
        [sys.executable, __file__, *options, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        sys.exit(f"{model} {max_memory} failed:\n{finished.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


def _run(arguments: argparse.Namespace) -> None:
    """Search without measuring, and print what scoring took."""
    import hashlib

    import numpy as np

    from autoq.api import pipeline
    from autoq.api.config import ScoringConfig
    from autoq.api.streamed.memory_bound import MemoryNeeds
    from autoq.memory import peak_rss_bytes

    tempfile.tempdir = str(arguments.folder)
    spent: list[tuple[float, float]] = []
    scoring = pipeline.run_sensitivity

    def timed(*args: Any, **options: Any) -> None:
        began = time.perf_counter(), time.process_time()
        scoring(*args, **options)
        spent.append((time.perf_counter() - began[0], time.process_time() - began[1]))

    pipeline.run_sensitivity = timed
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        ids = np.random.default_rng(0).integers(
            0, SHAPE.vocabulary, (2 * arguments.sequences, arguments.sequence_length)
        )
        np.save(f"{scratch}/ids.npy", ids)
        study = pipeline.search(
            arguments.run,
            effective_bits=6.0,
            formats=arguments.formats.split(","),
            calibration=arguments.calibration,
            calibration_data=f"{scratch}/ids.npy",
            calibration_sequences=arguments.sequences,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch_size,
            max_memory=arguments.max_memory or None,
            measure=False,
            store=f"sqlite:///{scratch}/autoq.db",
        )
        scores = study.sensitivity.contributions.tobytes()
        config: ScoringConfig = study.config
        needs = MemoryNeeds.of(study.loaded(), study.model_map, config)
    wall, processor = spent[0]
    print(
        json.dumps(
            {
                "wall_seconds": wall,
                "processor_seconds": processor,
                "peak_bytes": peak_rss_bytes(),
                "block_bytes": needs.block,
                "activation_bytes": needs.activations,
                "least_bytes": needs.least,
                "scores": hashlib.sha256(scores).hexdigest(),
            }
        )
    )


def _record(
    arguments: argparse.Namespace,
    size: int,
    large: dict[str, Any],
    runs: list[tuple[dict[str, Any], dict[str, Any]]],
) -> dict[str, Any]:
    """Everything that was run, as plain data."""
    options = ("sequences", "sequence_length", "batch_size", "formats", "calibration")
    return {
        **{option: getattr(arguments, option) for option in options},
        "large": {"weight_bytes": size, "bound": arguments.bound, **large},
        "small": [
            {"in_memory": whole, "streamed": streamed, "bound": arguments.small_bound}
            for whole, streamed in runs
        ],
    }


def memory_line(size: int, found: dict[str, Any], arguments: argparse.Namespace) -> str:
    """What scoring the large model took, beside what must be there."""
    must = found["block_bytes"] + found["activation_bytes"] + 600e6
    return (
        f"{size / 1e9:.2f} GB of bfloat16 weights within {arguments.bound}: peak resident memory "
        f"{found['peak_bytes'] / 1e6:.0f} MB, {found['peak_bytes'] / must:.2f} of a block "
        f"({found['block_bytes'] / 1e6:.0f} MB), its activations "
        f"({found['activation_bytes'] / 1e6:.0f} MB) and 600 MB; the weights are "
        f"{size / found['peak_bytes']:.1f} times the peak in bfloat16, "
        f"{2 * size / found['peak_bytes']:.1f} times in float32. Scoring: "
        f"{found['wall_seconds']:.0f} s, {found['processor_seconds']:.0f} s of processor time"
    )


def time_lines(runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Streamed over in memory."""
    equal = all(whole["scores"] == streamed["scores"] for whole, streamed in runs)
    lines = ["", "| a model that fits | in memory | streamed | ratio |", "|---|---:|---:|---:|"]
    for key, title in (
        ("wall_seconds", "scoring, s"),
        ("processor_seconds", "scoring, s of processor time"),
        ("peak_bytes", "peak memory, MB"),
    ):
        scale = 1e6 if key == "peak_bytes" else 1
        first, second = (median(run[place][key] for run in runs) / scale for place in (0, 1))
        lines.append(f"| {title} | {first:.1f} | {second:.1f} | {second / first:.2f} |")
    lines.append(f"\nScores equal, bit for bit: {'yes' if equal else 'NO'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
