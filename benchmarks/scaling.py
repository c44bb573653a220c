"""Scoring by two processes beside one, the cost of merging, and what follows for many on paper.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--sequences 128] [--rounds 3] \
        [--output benchmarks/results/scaling.json]

A study of the bundled model is calibrated once. Copies of it are then scored, by turns, by one
process and by two, each in a fresh Python with one thread, and the scores are compared bit for bit.
Measured is the scoring stage from its beginning to its last stored batch, the second process's
reading of the model included. Its imports are not: a search starts it before calibration, and here
they are waited for instead. What it used before, `start_seconds`, is stated. `wall` is by the clock,
which a busy machine spoils; `processor` is the processor time of the busiest process, which is what
the clock would show with a core for each. `batch_seconds` is the steady state, that of hours of
scoring: the time for a batch from the moment on when every process has scored its first.

Merging is what the owner of the study does for a batch that somebody else scored: taking it from a
pipe, adding its cross terms and storing it. Nobody else can do that, so scoring cannot take less
time than all batches need for it. The table for 1 to 64 workers is computed from these numbers, not
measured: workers that are as fast as the one that was, a start for each at the same time, and
whole batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

import autoq
from autoq.api import open_study, pipeline, stages
from autoq.api.distribution.dealing import Dealer
from autoq.api.distribution.messages import Message, receive, send
from autoq.api.scoring import ScoringPass
from autoq.bundled import model_path
from autoq.search.estimators._gram import GramMatrix

WORKERS_ON_PAPER = (1, 2, 4, 8, 16, 32, 64)
GPU_BATCHES = 512
"""Batches of a large search on paper: with fewer, 64 workers would not have eight each."""

IDLE_SECONDS = 4.0
"""A process that uses no processor for so long waits to be told what to read."""


class CalibratedError(Exception):
    """The study has what scoring needs."""


def main() -> None:
    """Measure and write the results."""
    arguments = parse_arguments()
    if arguments.run is not None:
        print(json.dumps(scored(arguments.store, arguments.run, arguments.sequences)))
        return
    with tempfile.TemporaryDirectory() as name:
        results = measured(Path(name), arguments.sequences, arguments.rounds)
    results["on_paper"] = on_paper(results)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output")
    parser.add_argument("--run", type=int, help="internal: score with so many processes")
    parser.add_argument("--store", help="internal: the study to score")
    return parser.parse_args()


def search(store: str, sequences: int, devices: int) -> Any:
    """The search that is measured."""
    return autoq.search(
        model_path(),
        effective_bits=5.0,
        calibration_sequences=sequences,
        calibration="max",
        device="cpu",
        measure=False,
        store=store,
        devices=devices,
    )


def calibrate(store: str, sequences: int) -> None:
    """Leave a study that is calibrated and not scored."""

    def stop(*_arguments: Any, **_options: Any) -> None:
        raise CalibratedError

    pipeline.run_sensitivity = stop
    try:
        search(store, sequences, 1)
    except CalibratedError:
        return
    finally:
        pipeline.run_sensitivity = stages.run_sensitivity


def scored(store: str, devices: int, sequences: int) -> dict[str, Any]:
    """Score a calibrated study, and say what it took."""
    seconds: dict[str, float] = {}

    def timed(*arguments: Any, **options: Any) -> None:
        if devices > 1:
            wait_for_imports()
        seconds["start"] = processor_seconds_of_children()
        started, used = time.perf_counter(), time.process_time()
        stages.run_sensitivity(*arguments, **options)
        seconds["wall"] = time.perf_counter() - started
        seconds["owner"] = time.process_time() - used

    came = watch_batches(devices)
    pipeline.run_sensitivity = timed
    study = search(store, sequences, devices)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    worker = max(0.0, children.ru_utime + children.ru_stime - seconds["start"])
    worker = worker if devices > 1 else 0.0
    payload = study.store.stage(study.id, "sensitivity").payload
    return {
        "wall": seconds["wall"],
        "processor": max(seconds["owner"], worker),
        "processor_of_all": seconds["owner"] + worker,
        "batch_seconds": steady_seconds(came),
        "start_seconds": seconds["start"],
        "workers": {entry["name"]: entry["batches"] for entry in payload.get("workers", ())},
    }


def watch_batches(devices: int) -> list[tuple[str, float]]:
    """A list that will have, of every batch that is scored from now on, by whom and when."""
    came: list[tuple[str, float]] = []
    dealt, alone = Dealer._came, ScoringPass._batch

    def watched(dealer: Dealer, name: str, *rest: Any) -> None:
        came.append((name, time.perf_counter()))
        dealt(dealer, name, *rest)

    def watched_alone(*arguments: Any) -> Any:
        found = alone(*arguments)
        came.append(("owner", time.perf_counter()))
        return found

    if devices > 1:
        Dealer._came = watched
    else:
        ScoringPass._batch = watched_alone
    return came


def steady_seconds(came: list[tuple[str, float]]) -> float:
    """Seconds for a batch, from when everybody has scored one to the last that all worked on."""
    first = max(min(when for name, when in came if name == who) for who, _ in came)
    last = min(max(when for name, when in came if name == who) for who, _ in came)
    return (last - first) / sum(first < when <= last for _, when in came)


def wait_for_imports() -> None:
    """Wait as calibration would: until the other process has nothing to do."""
    before = -1.0
    while (used := processor_seconds_of_children()) < 1.0 or used > before:
        before = used
        time.sleep(IDLE_SECONDS)


def processor_seconds_of_children() -> float:
    """What the processes that this one has started have used so far."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return sum(entry.user + entry.system for entry in times)


def measured(folder: Path, sequences: int, rounds: int) -> dict[str, Any]:
    """Runs with one and two processes by turns, and the cost of merging one batch."""
    (folder / "calibrated").mkdir()
    calibrate(f"sqlite:///{folder / 'calibrated' / 'studies.db'}", sequences)
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    scores = set()
    for turn in range(rounds):
        for devices, found in runs.items():
            place = folder / f"{devices}-{turn}"
            shutil.copytree(folder / "calibrated", place)
            store = f"sqlite:///{place / 'studies.db'}"
            found.append(in_fresh_python(store, devices, sequences))
            study = open_study(None, store)
            scores.add(study.sensitivity.contributions.tobytes())
            batches = len(study.store.score_batches(study.id))
            if devices == 2 and turn == rounds - 1:
                merging = merge_seconds(study)
            study.store.close()
    medians = {
        what: [statistics.median(run[what] for run in runs[devices]) for devices in (1, 2)]
        for what in ("wall", "processor", "batch_seconds")
    }
    return {
        "model": "bundled",
        "sequences": sequences,
        "batches": batches,
        "scores_are_bit_equal": len(scores) == 1,
        "one_process": runs[1],
        "two_processes": runs[2],
        "medians_of_one_and_two": medians,
        "speedup": {what: one / two for what, (one, two) in medians.items()},
        "merge_seconds_per_batch": merging,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def in_fresh_python(store: str, devices: int, sequences: int) -> dict[str, Any]:
    """What `scored` says in a process of its own."""
    options = ["--run", str(devices), "--store", store, "--sequences", str(sequences)]
    found = subprocess.run(
        [sys.executable, __file__, *options], capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    print(devices, result, file=sys.stderr)
    return result


def merge_seconds(study: Any, repeats: int = 50) -> float:
    """Median time of receiving a batch through a pipe, adding its terms, and storing it."""
    scores = study.store.score_batches(study.id)[0]
    groups, formats = len(study.sensitivity.groups), len(study.sensitivity.formats)
    gram = GramMatrix({group: row for row, group in enumerate(study.sensitivity.groups)}, formats)
    gram.keep_batches_apart()
    cells = groups * formats
    addition = {"term/0": study.interactions.gram.reshape(cells, cells).copy()}
    addition["tokens"] = gram.addition()["tokens"]
    seconds: list[float] = []
    with study.store.lease(study.id):
        study.store.reset_stage(study.id, "sensitivity")  # a finished one takes no batch
        study.store.begin_stage(study.id, "sensitivity")
        for index in range(repeats):
            reader, writer = (
                os.fdopen(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
            )
            message = Message({}, {"scores": scores, **addition})
            sender = threading.Thread(target=send, args=(writer, message))
            started = time.perf_counter()
            sender.start()
            arrays = dict(receive(reader).arrays)
            found = arrays.pop("scores")
            gram.add_all(arrays)
            study.store.put_score_batch(study.id, index, found, 0.0)
            seconds.append(time.perf_counter() - started)
            sender.join()
            reader.close()
            writer.close()
    return statistics.median(seconds)


def on_paper(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Computed, not measured: workers that are as fast as the process that was measured."""
    merging = results["merge_seconds_per_batch"]
    batch = results["medians_of_one_and_two"]["batch_seconds"][0]
    rows = []
    for workers in WORKERS_ON_PAPER:
        scoring = math.ceil(GPU_BATCHES / workers) * batch
        seconds = max(scoring, GPU_BATCHES * merging) + merging
        rows.append(
            {
                "workers": workers,
                "batches": GPU_BATCHES,
                "seconds": seconds,
                "speedup": GPU_BATCHES * batch / seconds,
                "owner_is_busy": GPU_BATCHES * merging / seconds,
            }
        )
    return rows


if __name__ == "__main__":
    main()
