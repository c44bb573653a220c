"""How fast the service answers plans inside its process, and what memory that takes.

    python benchmarks/service.py --output benchmarks/results/service.json

A process that has never loaded torch reads a synthetic study (1,000 groups x 12 formats) and answers
plans for random budgets, each with its reply as JSON. Time is processor time of the one thread that
answers, and beside it the wall's, which whatever else runs on the machine makes longer; `load` says how
much that was. Some of the plans are compared with what `Study.solve` finds without any cache. The same
over HTTP, and with many readers, is `benchmarks/service_load.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from autoq import open_study
from autoq.service.reading.reader import StudyReader
from autoq.studies import StudyStore
from autoq.testing.synthetic_study import add_synthetic_study
from autoq.wire import PlanReply, PlanRequest

HEAVY = ("torch", "transformers", "optuna", "matplotlib", "pandas")
MEBIBYTE = 1 << 20
COMPARED = 20


def main() -> None:
    """Measure in a process of its own, print, and write what was measured."""
    arguments = parse_arguments()
    if arguments.url is not None:
        print(json.dumps(answer(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/autoq.db"
        with StudyStore.open(url) as store:
            add_synthetic_study(
                store, groups=arguments.groups, formats=arguments.formats, name="synthetic"
            )
        command = [sys.executable, __file__, "--url", url, "--budgets", str(arguments.budgets)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    results = {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count()},
        "study": {"groups": arguments.groups, "formats": arguments.formats},
        **json.loads(done.stdout),
    }
    print(json.dumps(results, indent=1))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--formats", type=int, default=12)
    parser.add_argument("--budgets", type=int, default=500)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser.parse_args()


def answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every measurement, in this process."""
    memory = {"imported_mib": resident_mib()}
    load = os.getloadavg()[0]
    with StudyStore.open(arguments.url) as store:
        reader = StudyReader(store, str)
        first = timed(lambda: reader.solve("synthetic", PlanRequest(effective_bits=8.0)))
        random = np.random.default_rng(0)
        reach = reader.frontier("synthetic", 2)
        bits = random.uniform(reach.budget_floor, reach.budget_ceiling, arguments.budgets)
        least = reader.solve("synthetic", PlanRequest(effective_bits=reach.budget_floor))
        gigabytes = least.takes["stored_bytes"] / 1e9 * random.uniform(1.02, 3.0, 100)
        plans = {
            "effective_bits": measured(
                reader, (PlanRequest(effective_bits=float(b)) for b in bits)
            ),
            "max_gb": measured(reader, (PlanRequest(max_gb=float(g)) for g in gigabytes)),
        }
        memory["answered_mib"] = resident_mib()
        same = compared(reader, store, bits[:COMPARED].tolist())
        table = timed(lambda: reader.sensitivities("synthetic"))
        report = timed(lambda: reader.report("synthetic"))
    return {
        "load": load,
        "first_plan_processor_seconds": first,
        "plans": plans,
        "equal_to_study_solve": same,
        "sensitivities_processor_seconds": table,
        "report_processor_seconds": report,
        "memory": {**memory, "all_mib": resident_mib()},
        "heavy_packages_loaded": [name for name in HEAVY if name in sys.modules],
    }


def measured(reader: StudyReader, requests: Iterable[PlanRequest]) -> dict[str, Any]:
    """Milliseconds of answers, and how far from proved they were."""
    processor: list[float] = []
    wall: list[float] = []
    gaps: list[float] = []
    for request in requests:
        begun, started = time.perf_counter(), time.process_time()
        reply = reader.solve("synthetic", request)
        reply.model_dump_json()
        processor.append(1e3 * (time.process_time() - started))
        wall.append(1e3 * (time.perf_counter() - begun))
        gaps.append(reply.gap or 0.0)
    return {
        "requests": len(processor),
        "processor_ms": percentiles(processor),
        "wall_ms": percentiles(wall),
        "largest_gap": max(gaps),
    }


def compared(reader: StudyReader, store: StudyStore, bits: list[float]) -> str:
    """How many plans are those that a study solves by itself."""
    study = open_study("synthetic", store)
    replies: list[PlanReply] = [
        reader.solve("synthetic", PlanRequest(effective_bits=budget)) for budget in bits
    ]
    equal = [
        reply.assignment == study.solve(budget).assignment
        for budget, reply in zip(bits, replies, strict=True)
    ]
    return f"{sum(equal)} of {len(equal)}"


def timed(work: Callable[[], object]) -> float:
    """Processor seconds."""
    started = time.process_time()
    work()
    return time.process_time() - started


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    median, high, most = np.percentile(values, [50, 99, 100])
    return {"p50": float(median), "p99": float(high), "max": float(most)}


def resident_mib() -> float:
    """MiB of this process."""
    return float(psutil.Process().memory_info().rss / MEBIBYTE)


if __name__ == "__main__":
    main()
