"""How the service answers plans: one reader alone, and hundreds while a search runs.

    python benchmarks/service_load.py --output benchmarks/results/service_load.json

Starts `autoq serve` on a new store that holds a synthetic study (1,000 groups x 12 formats), and asks
`POST /v1/studies/{study}/plans` for random budgets over real sockets: first on one connection with
nothing else going on, then on many while a job searches the bundled model. Many are measured twice: readers
who ask again two seconds after each answer, as people who drag a slider do at most, and readers who
ask again at once, which is as much as the server can give. Latency is from sending to the last
byte, the reader's own work included; readers, server and search share the machine's cores, with
whatever else runs there, so the web process's own processor time is given for the lone reader, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from autoq.client import Client, JobHandle
from autoq.studies import StudyStore
from autoq.testing.synthetic_study import add_synthetic_study
from autoq.wire import JobStatus

START_SECONDS = 60.0
WARM_UP = 20
MEBIBYTE = 1 << 20


def main() -> None:
    """Measure, print, and write what was measured."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        store = f"sqlite:///{folder}/autoq.db"
        study = synthetic_study(store, arguments.groups, arguments.formats)
        with serving(store, arguments.core) as server:
            results = {
                "machine": machine(),
                "study": shape(arguments),
                **run(arguments, server, study),
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
    parser.add_argument("--alone", type=int, default=1000, help="requests on one connection")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each crowd")
    parser.add_argument(
        "--pause", type=float, default=2.0, help="seconds between a reader's requests"
    )
    parser.add_argument("--core", type=int, help="let the web process run on this core only")
    return parser.parse_args()


def synthetic_study(store: str, groups: int, formats: int) -> str:
    """Name of a finished study in a new store."""
    with StudyStore.open(store) as opened:
        return add_synthetic_study(opened, groups=groups, formats=formats).name


class Server:
    """A running `autoq serve`."""

    def __init__(self, process: psutil.Process, url: str) -> None:
        self.process = process
        self.url = url

    def memory(self) -> float:
        """MiB of the web process."""
        return self.process.memory_info().rss / MEBIBYTE

    def processor_seconds(self) -> float:
        """Of all threads of the web process so far, by the scheduler's own count (Linux)."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


@contextmanager
def serving(store: str, core: int | None) -> Iterator[Server]:
    """A server with one worker, on a free port of this machine."""
    command = [sys.executable, "-m", "autoq", "serve", "--store", store, "--port", "0"]
    command += ["--rate-limit", "0"]  # all readers have one address here
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert started.stdout is not None
        greeting = started.stdout.readline()
        found = re.search(r"http://\S+", greeting)
        if found is None:
            raise SystemExit(f"the server did not start: {greeting!r}")
        process = psutil.Process(started.pid)
        if core is not None:
            process.cpu_affinity([core])
        yield Server(process, found[0])
    finally:
        started.terminate()
        started.wait(60)


def run(arguments: argparse.Namespace, server: Server, study: str) -> dict[str, Any]:
    """Every measurement, in turn."""
    with Client(server.url) as client:
        client.ready()
        idle = server.memory()
        found = client.frontier(study, points=2)
        bits = (found.budget_floor, min(found.budget_ceiling, 8.0))
        alone = measured_alone(server, study, bits, arguments.alone)
        job = client.search("bundled", effective_bits=5.0, compare_uniform=True)
        await_running(job)
        crowd = (server, study, bits, arguments.connections, arguments.seconds)
        paused = measured_crowd(*crowd, arguments.pause, job)
        at_once = measured_crowd(*crowd, 0.0, job)
        memory = {"idle_mib": idle, "loaded_mib": server.memory()}
        status = client.job(job.id).wait().status
    return {
        "alone": alone,
        "crowd": paused,
        "crowd_without_pause": at_once,
        "web_process": memory,
        "search": status.value,
    }


def await_running(job: JobHandle) -> None:
    """Until a worker has taken it."""
    begun = time.monotonic()
    while job.refresh().status is not JobStatus.RUNNING:
        if time.monotonic() - begun > START_SECONDS:
            raise SystemExit(f"the search did not start: {job.job}")
        time.sleep(0.05)


def measured_alone(
    server: Server, study: str, bits: tuple[float, float], requests: int
) -> dict[str, Any]:
    """One connection, one request after another."""
    budgets = random.Random(0)
    seconds: list[float] = []
    spent: list[float] = []
    faults: Counter[str] = Counter()
    with httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as client:
        for number in range(WARM_UP + requests):
            budget = budgets.uniform(*bits)
            before, begun = server.processor_seconds(), time.perf_counter()
            reply = client.post(f"/v1/studies/{study}/plans", json={"effective_bits": budget})
            took = time.perf_counter() - begun
            if fault := fault_of(reply, budget):
                faults[fault] += 1
            elif number >= WARM_UP:
                seconds.append(took)
                spent.append(server.processor_seconds() - before)
    processor = {f"server_processor_{name}": value for name, value in percentiles(spent).items()}
    return {**figures(seconds, faults), **processor}


def measured_crowd(
    server: Server,
    study: str,
    bits: tuple[float, float],
    connections: int,
    seconds: float,
    pause: float,
    job: JobHandle,
) -> dict[str, Any]:
    """Many connections for some time."""
    before, begun = server.processor_seconds(), time.perf_counter()
    load = os.getloadavg()[0]
    found, faults = asyncio.run(crowd(server.url, study, bits, connections, seconds, pause))
    took = time.perf_counter() - begun
    return {
        "connections": connections,
        "pause_seconds": pause,
        **figures(found, faults),
        "requests_per_second": len(found) / took,
        "server_share_of_a_core": (server.processor_seconds() - before) / took,
        "load_average_before": load,
        "search_at_the_end": job.refresh().status.value,
    }


async def crowd(
    url: str,
    study: str,
    bits: tuple[float, float],
    connections: int,
    seconds: float,
    pause: float,
) -> tuple[list[float], Counter[str]]:
    """Seconds of every answer that was right, and what was wrong with the others."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    found: list[float] = []
    faults: Counter[str] = Counter()
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=60.0, trust_env=False
    ) as client:
        ends = time.perf_counter() + seconds

        async def read(number: int) -> None:
            budgets = random.Random(number)
            await asyncio.sleep(budgets.uniform(0.0, max(pause, 0.5)))  # they do not come at once
            while time.perf_counter() < ends:
                budget = budgets.uniform(*bits)
                begun = time.perf_counter()
                try:
                    reply = await client.post(
                        f"/v1/studies/{study}/plans", json={"effective_bits": budget}
                    )
                except httpx.HTTPError as error:
                    faults[type(error).__name__] += 1
                    continue
                took = time.perf_counter() - begun
                if fault := fault_of(reply, budget):
                    faults[fault] += 1
                else:
                    found.append(took)
                await asyncio.sleep(pause)

        await asyncio.gather(*(read(number) for number in range(connections)))
    return found, faults


def fault_of(reply: httpx.Response, budget: float) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if reply.status_code != 200:
        return str(reply.status_code)
    return None if reply.json()["effective_bits"] <= budget else "over the budget"


def figures(seconds: Sequence[float], faults: Counter[str]) -> dict[str, Any]:
    """Of one crowd, in milliseconds."""
    return {"requests": len(seconds), **percentiles(seconds), "errors": dict(faults)}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds; none of fewer than two."""
    if len(seconds) < 2:
        return {}
    found = statistics.quantiles(seconds, n=100, method="inclusive")
    return {
        "p50_ms": 1e3 * found[49],
        "p99_ms": 1e3 * found[98],
        "longest_ms": 1e3 * max(seconds),
    }


def machine() -> dict[str, Any]:
    """What it ran on, and what else ran."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "load_average_before": os.getloadavg()[0],
    }


def shape(arguments: argparse.Namespace) -> dict[str, int]:
    """Of the synthetic study."""
    return {"groups": arguments.groups, "formats": arguments.formats}


if __name__ == "__main__":
    main()
