"""How fast the study store is, and whether it loses or doubles anything under load.

    python benchmarks/store.py --output benchmarks/results/store.json

Trial writes: processes store measured numbers of a study, one transaction each (`add_measurement`),
and, apart from it, whole trials of a refinement as autoq does through Optuna (made, two attributes,
a value: several transactions each). `autoq list` on a store of many studies, in a process of its
own. Stress: processes write arrays, score batches and measurements of shared studies, several of
them the same ones, take leases from each other, and afterwards every row must be there once.
PostgreSQL is that of `autoq.testing.postgresql`; without one its rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoq.errors import StudyLockedError
from autoq.studies import StudyStore, maintenance

STUDY: dict[str, Any] = {
    "model_path": "models/m",
    "fingerprint": "f",
    "architecture": "a",
    "configuration": {"formats": ["fp8"]},
    "versions": {},
    "seed": 0,
}
WISHES = {"budgets": [{"resource": "effective_bits", "limit": 5.0}]}


def main() -> None:
    """Measure, print and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--writes", type=int, default=1000, help="by every worker")
    parser.add_argument("--trials", type=int, default=40, help="by every worker")
    parser.add_argument("--studies", type=int, default=10_000)
    parser.add_argument("--stress-workers", type=int, default=16)
    parser.add_argument("--stress-writes", type=int, default=200, help="by every worker")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        ROLES[arguments.role](arguments)
        return
    results: dict[str, Any] = {"workers": arguments.workers, "load_before": os.getloadavg()[0]}
    for name, stores in (("sqlite", sqlite_stores()), ("postgresql", postgresql_stores())):
        with stores as new:
            if new is None:
                continue
            results[name] = measured(arguments, new)
            print(name, json.dumps(results[name], indent=1), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(arguments: argparse.Namespace, new: Any) -> dict[str, Any]:
    """All figures of one kind of database; `new` gives the URL of an empty one."""
    return {
        "measurement_writes_per_second": writes(arguments, new(), "measure", arguments.writes),
        "optuna_trials_per_second": writes(arguments, new(), "trial", arguments.trials),
        "cost_of_one": {role: cost(new(), role) for role in ("measure", "trial")},
        "list": listed(new(), arguments.studies),
        "stress": stress(arguments, new()),
    }


@contextmanager
def sqlite_stores() -> Iterator[Any]:
    """Files in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(100))
        yield lambda: f"sqlite:///{folder}/{next(numbers)}.db"


@contextmanager
def postgresql_stores() -> Iterator[Any]:
    """Schemas of a server that is started for it; None where there is none."""
    import sqlalchemy

    from autoq.testing.postgresql import NoServerError, postgresql_url

    try:
        with postgresql_url() as server:
            numbers = iter(range(100))

            def new() -> str:
                name = f"s{next(numbers)}"
                engine = sqlalchemy.create_engine(server)
                with engine.begin() as connection:
                    connection.execute(sqlalchemy.text(f"CREATE SCHEMA {name}"))
                engine.dispose()
                return f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{name}"

            yield new
    except NoServerError as error:
        print(f"PostgreSQL is left out: {error}")
        yield None


def crowd(arguments: argparse.Namespace, url: str, role: str, workers: int) -> float:
    """Run workers of a role, from one starting shot on; seconds until the last has ended."""
    command = [sys.executable, __file__, "--role", role, "--url", url]
    command += ["--writes", str(arguments.writes), "--trials", str(arguments.trials)]
    command += ["--stress-writes", str(arguments.stress_writes)]
    children = [
        subprocess.Popen(
            [*command, "--number", str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(workers)
    ]
    for child in children:  # ready once they have imported everything and opened the store
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    started = time.perf_counter()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    failed = [number for number, child in enumerate(children) if child.wait() != 0]
    seconds = time.perf_counter() - started
    if failed:
        raise SystemExit(f"workers {failed} failed")
    return seconds


def wait_for_the_shot() -> None:
    """As a worker: say that all is ready, and wait."""
    print("ready", flush=True)
    sys.stdin.readline()


def writes(arguments: argparse.Namespace, url: str, role: str, by_each: int) -> float:
    """How many of a role's writes all workers together do in a second."""
    make_shared_study(url)
    seconds = crowd(arguments, url, role, arguments.workers)
    return float(round(arguments.workers * by_each / seconds, 1))


def make_shared_study(url: str) -> None:
    """The study that all workers write to."""
    with StudyStore.open(url) as store:
        store.create_or_get(name="shared", key="a" * 64, **STUDY)


def cost(url: str, role: str, count: int = 50) -> dict[str, float]:
    """Of one write by one process alone: statements, transactions, processor time here."""
    from sqlalchemy import Engine, event

    found: Counter[str] = Counter()
    make_shared_study(url)
    write = WRITERS[role](url, 0)
    write(0)  # what is loaded or made once
    event.listen(Engine, "before_cursor_execute", lambda *_: found.update(["statements"]))
    event.listen(Engine, "commit", lambda _: found.update(["transactions"]))
    started = time.process_time()
    for index in range(1, count + 1):
        write(index)
    milliseconds = (time.process_time() - started) * 1e3
    each = {name: number / count for name, number in found.items()}
    return {**each, "processor_milliseconds": round(milliseconds / count, 2)}


def measure_role(arguments: argparse.Namespace) -> None:
    """Store measured numbers, a transaction each."""
    write = measurement_writer(arguments.url, arguments.number)
    wait_for_the_shot()
    for index in range(arguments.writes):
        write(index)


def measurement_writer(url: str, number: int) -> Callable[[int], object]:
    """What stores one worker's measured number with an index."""
    store = StudyStore.open(url)
    study = store.find("shared")
    return lambda index: store.add_measurement(
        study.id, label=f"{number}/{index}", metric="kl", value=0.5, tokens=8
    )


def trial_role(arguments: argparse.Namespace) -> None:
    """Make, describe and end trials, as a refinement's worker does."""
    write = trial_writer(arguments.url, arguments.number)
    wait_for_the_shot()
    for index in range(arguments.trials):
        write(index)


def trial_writer(url: str, _number: int) -> Callable[[int], object]:
    """What makes, describes and ends a trial."""
    import optuna

    from autoq.studies import trial_storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Trials take no time here, so nothing is lost without signs of life.
    warnings.filterwarnings("ignore", message="Heartbeat of storage")
    storage = trial_storage(url)
    study = optuna.create_study(storage=storage, study_name="refinement", load_if_exists=True)

    def write(index: int) -> None:
        trial = study.ask()
        trial.set_user_attr("plan", json.dumps({f"layers.{n}": "fp8" for n in range(32)}))
        trial.set_user_attr("losses", [0.5] * 32)
        study.tell(trial, float(index))

    return write


def listed(url: str, studies: int) -> dict[str, Any]:
    """`autoq list` on a store of so many finished studies, in a process of its own."""
    from sqlalchemy import insert

    from autoq.studies._encoding import utc_now
    from autoq.studies._schema import PlanRow, StageRow, StudyRow
    from autoq.studies._seals import sealed

    numbers, now = range(1, studies + 1), utc_now()
    study = {"created": now, "updated": now, "status": "done", "schema_version": 3, "seed": 0}
    study |= {"model_fingerprint": "f" * 64, "architecture": "a", "versions": {}}
    bits = dict.fromkeys(
        ("effective_bits", "peer_effective_bits", "stored_bits_per_weight", "budget_bits"), 5.0
    )
    plan = {**bits, "label": "5 bits", "created": now, "stored_bytes": 1, "details": WISHES}
    plan["assignment"] = {f"layers.{n}": "fp8" for n in range(32)}
    stage = {"status": "done", "started": now, "finished": now, "seconds": 1.0, "payload": {}}
    with StudyStore.open(url) as store, store._database.write() as session:
        session.execute(
            insert(StudyRow),
            [
                sealed(
                    StudyRow,
                    {
                        **study,
                        "name": f"model-{n:08x}",
                        "key": f"{n:064x}",
                        "model_path": f"/models/{n}",
                        "configuration": {"formats": ["fp8", "nvfp4"]},
                    },
                )
                for n in numbers
            ],
        )
        names = ("discovery", "calibration", "sizes", "sensitivity", "solve", "measure")
        session.execute(
            insert(StageRow),
            [
                sealed(StageRow, {**stage, "study_id": n, "name": name})
                for n in numbers
                for name in names
            ],
        )
        session.execute(
            insert(PlanRow),
            [
                sealed(PlanRow, {**plan, "study_id": n, "content_sha256": f"{n:064x}"})
                for n in numbers
            ],
        )
    ways = {"newest": [], "all": ["--all"], "json": ["--json"]}
    return {"studies": studies, **{name: timed_list(url, way) for name, way in ways.items()}}


def timed_list(url: str, options: list[str]) -> dict[str, Any]:
    """How long the command takes with these options, and how many studies it names."""
    wall, processor = [], []
    for _ in range(5):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = "import sys; from autoq.cli import main; sys.argv[0] = 'autoq'; main()"
        done = subprocess.run(
            [sys.executable, "-c", command, "list", *options, "--store", url],
            capture_output=True,
            text=True,
            check=True,
        )
        wall.append(time.perf_counter() - started)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {
        "listed": done.stdout.count("model-"),
        "wall_seconds_best_of_5": round(min(wall), 3),
        "processor_seconds_best_of_5": round(min(processor), 3),
    }


def stress(arguments: argparse.Namespace, url: str) -> dict[str, Any]:
    """Workers write at the same time, in part the same rows; count what is there afterwards."""
    workers, count = arguments.stress_workers, arguments.stress_writes
    with StudyStore.open(url) as store:
        for name in ("shared", "leased"):
            store.create_or_get(name=name, key=name[0] * 64, **STUDY)
    seconds = crowd(arguments, url, "stress", workers)
    with StudyStore.open(url) as store:
        shared, leased = store.find("shared").id, store.find("leased").id
        labels = [record.label for record in store.measurements(shared)]
        own = {f"{worker}/{index}" for worker in range(workers) for index in range(count)}
        arrays = store.arrays(shared, "calibration")
        wanted = {f"{worker}/{index}" for worker in range(workers) for index in range(count // 10)}
        batches = store.score_batches(shared)
        turns = [record.label for record in store.measurements(leased)]
    faults = maintenance.check(url)
    return {
        "workers": workers,
        "seconds": round(seconds, 1),
        "rows_wanted": len(own) + len(wanted) + count + workers,
        "rows_lost": len(own - set(labels))
        + len(wanted - set(arrays))
        + len(set(range(count)) - set(batches))
        + (workers - len(set(turns))),
        "rows_doubled": len(labels) - len(set(labels)) + len(turns) - len(set(turns)),
        "faults_of_check": len(faults),
    }


def stress_role(arguments: argparse.Namespace) -> None:
    """Own rows, rows that all workers write alike, and turns under a lease."""
    import numpy as np

    with StudyStore.open(arguments.url) as store:
        shared, leased = store.find("shared").id, store.find("leased").id
        wait_for_the_shot()
        for index in range(arguments.stress_writes):
            label = f"{arguments.number}/{index}"
            store.add_measurement(shared, label=label, metric="kl", value=0.5)
            # Every worker the same batch, with the same bits: one of them is stored.
            put_again_if_another_was_first(store, shared, index, np.full((2, 2), index))
            if index < arguments.stress_writes // 10:
                store.put_array(shared, "calibration", label, np.full(64, index))
        take_a_turn(store, leased, arguments.number)


def put_again_if_another_was_first(
    store: StudyStore, study_id: int, index: int, array: Any
) -> None:
    """Store a batch; where another process stored it in the same instant, look again."""
    from autoq.studies._database import StoreConflictError

    try:
        store.put_score_batch(study_id, index, array, 0.01)
    except StoreConflictError:
        store.put_score_batch(study_id, index, array, 0.01)


def take_a_turn(store: StudyStore, study_id: int, number: int) -> None:
    """Wait for the lease, and see that nobody else writes while it is held."""
    with store.lease(study_id, wait_seconds=600):
        before = len(store.measurements(study_id))
        store.add_measurement(study_id, label=f"{number}", metric="turn", value=1.0)
        time.sleep(0.02)
        if len(store.measurements(study_id)) != before + 1:
            raise StudyLockedError("another worker wrote while the lease was held")


WRITERS = {"measure": measurement_writer, "trial": trial_writer}
ROLES = {"measure": measure_role, "trial": trial_role, "stress": stress_role}

if __name__ == "__main__":
    main()
