"""Peak memory and speed of `autoq compress`, beside copying the same tensors.

    OMP_NUM_THREADS=1 python benchmarks/compress.py --gigabytes 2 --formats fp8_pc_pt,int4_awq

Makes a random Llama-like model of that size on disk, shard by shard, and runs each of these in a
process of its own, by turns, again and again, all threads on one core: a copy of all tensors through
safetensors, file by file, to the same disk; and compress to each format, which quantises, writes,
hashes, and reads everything back. Prints medians of wall and processor seconds, the median of each
turn's ratio to the copy of that turn with the smallest and the largest, and the peak resident memory
above the imports.

What does not grow with the model, most of it transformers' table of how checkpoints are renamed, is
measured on a model of one block and printed beside: it is part of every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_model import ModelShape, write_random_model

COPY = "copy"
SHAPE = ModelShape(hidden=2048, intermediate=8192, vocabulary=8192, heads=16, shard_layers=4)


def main() -> None:
    """Make the model, run everything, print the table."""
    arguments = parse_arguments()
    if arguments.run:
        return _run(arguments)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        size = write_random_model(folder / "model", arguments.gigabytes, SHAPE)
        write_random_model(folder / "small", 0.0, SHAPE)
        names = [COPY, *arguments.formats.split(",")]
        small = _in_a_process(folder, "small", names[-1], arguments)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(arguments.repeats):
            for name, measured in runs.items():
                measured.append(_in_a_process(folder, "model", name, arguments))
    print(table(size, runs, small))
    if arguments.json:
        arguments.json.write_text(
            json.dumps(_record(arguments, size, runs, small), indent=1) + "\n"
        )
    return None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the model, 10^9 bytes"
    )
    parser.add_argument("--formats", default="fp8_pc_pt,nvfp4_wo,int4_awq")
    parser.add_argument("--calibration", default="max", help="as for autoq compress")
    parser.add_argument("--container", default="compressed-tensors")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--json", type=Path, help="where to write every run")
    parser.add_argument("--folder", type=Path, help="on the disk to use; the temporary folder's")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(
    folder: Path, model: str, work: str, arguments: argparse.Namespace
) -> dict[str, float]:
    out = folder / f"out-{work}"
    options = ["--run", work, "--model", str(folder / model), "--out", str(out)]
    options += ["--calibration", arguments.calibration, "--container", arguments.container]
    finished = subprocess.run(
        [sys.executable, __file__, *options], capture_output=True, text=True, check=False
    )
    shutil.rmtree(out, ignore_errors=True)
    if finished.returncode:
        sys.exit(f"{work} failed:\n{finished.stderr[-4000:]}")
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return result


def _run(arguments: argparse.Namespace) -> None:
    _take_one_core()
    import safetensors.torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from autoq.api import compress
    from autoq.memory import peak_rss_bytes

    _take_memory_back(arguments.model, arguments.out)
    imports = peak_rss_bytes()
    wall, processor = time.perf_counter(), time.process_time()
    if arguments.run == COPY:
        copy_tensors(arguments.model, arguments.out)
    else:
        compress(
            arguments.model,
            arguments.out,
            fmt=arguments.run,
            calibration=arguments.calibration,
            container=arguments.container,
        )
    print(
        json.dumps(
            {
                "wall_seconds": time.perf_counter() - wall,
                "processor_seconds": time.process_time() - processor,
                "imports_bytes": imports,
                "peak_bytes": peak_rss_bytes(),
            }
        )
    )


def _take_one_core() -> None:
    """Threads of this process, those that wait for the disk included, share one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)


def _take_memory_back(model: Path, out: Path) -> None:
    """Have the system hold as much free memory as a copy of the model takes.

    Virtual machines give free memory back to their hosts within seconds, and taking it again costs
    up to ten times as much as writing to it: more than all that is measured here, and by chance.
    """
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    scratch = out.with_name(f"{out.name}.scratch")
    zeros = bytes(16 << 20)
    with scratch.open("wb", buffering=0) as stream:
        for _ in range(size // len(zeros)):
            stream.write(zeros)
    scratch.unlink()


def copy_tensors(source: Path, destination: Path) -> None:
    """Every tensor of every file, read and written through safetensors, and flushed to the disk."""
    from safetensors.torch import load_file, save_file

    destination.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), destination / file.name, metadata={"format": "pt"})
        with (destination / file.name).open("rb") as stream:
            os.fsync(stream.fileno())


def table(size: int, runs: dict[str, list[dict[str, float]]], small: dict[str, float]) -> str:
    """Markdown of what was measured."""
    wall, processor = small["wall_seconds"], small["processor_seconds"]
    lines = [
        f"A model of {size / 1e9:.2f} GB, {len(runs[COPY])} turns:",
        f"(of one block {wall:.2f} s, {processor:.2f} s of the processor)",
        "",
        "| | wall, s | over the copy's | processor, s | over the copy's | peak memory above imports, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, measured in runs.items():
        cells = []
        for measure in ("wall_seconds", "processor_seconds"):
            ratios = over_copy(measured, runs[COPY], measure)
            cells.append(f"{statistics.median(run[measure] for run in measured):.2f}")
            cells.append(
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        above = max(run["peak_bytes"] - run["imports_bytes"] for run in measured) / 1e6
        lines.append(f"| {name} | {' | '.join(cells)} | {above:.0f} |")
    return "\n".join(lines)


def over_copy(
    runs: list[dict[str, float]], copies: list[dict[str, float]], measure: str
) -> list[float]:
    """Each turn's time over that of its copy."""
    return [run[measure] / copy[measure] for run, copy in zip(runs, copies, strict=True)]


def _record(
    arguments: argparse.Namespace,
    size: int,
    runs: dict[str, list[dict[str, float]]],
    small: dict[str, float],
) -> dict[str, Any]:
    return {
        "bytes": size,
        "calibration": arguments.calibration,
        "container": arguments.container,
        "one_block": small,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
