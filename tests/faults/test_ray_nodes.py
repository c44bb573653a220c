"""Machines of a Ray cluster that vanish, come late or hang: nothing is lost, and no bit differs.

Each machine is a raylet of its own on this one, as Ray's own tests have them.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.api.distribution import ray_cluster
from autoq.api.distribution.ray_cluster import RayWorker
from autoq.api.refinement._trials import LOSSES, PLAN, POSITION
from autoq.api.refinement._worker import Worker
from autoq.api.refinement.refining import RefineOptions, open_trials
from autoq.studies import WORKER, worker_identity
from tests.api.distribution.studies import Notes, assert_same, search_in, workers_of
from tests.api.refinements import SMALL
from tests.faults.commands import tally

pytestmark = pytest.mark.slow

_MEMORY = 100 << 20  # bytes of each machine for objects; they are tiny here
_LONGEST_SECONDS = 240.0


class Machines:
    """A cluster whose head computes nothing, so that each of the others can be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": _MEMORY, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, Any] = {}

    def add(self, name: str) -> None:
        self.nodes[name] = self.cluster.add_node(num_cpus=1, object_store_memory=_MEMORY)

    def lose(self, name: str) -> None:
        """As by a power cut."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)


@pytest.fixture
def machines() -> Iterator[Machines]:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'autoq[ray]'")
    made = Machines()
    ray.init(address=made.cluster.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    with suppress(Exception):
        made.cluster.shutdown()


class Stopper:
    """Stops the process of the actor that is given a certain batch, in the middle of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
        self.has_stopped = threading.Event()
        self.process = 0
        begin, score = RayWorker.begin, RayWorker.score
        processes: dict[str, int] = {}

        def beginning(worker: RayWorker, order: Any) -> dict[str, Any]:
            answer = begin(worker, order)
            processes[worker.name] = answer["process"]
            return answer

        def scoring(worker: RayWorker, asked: int, estimator: str) -> Any:
            if asked == index and not self.has_stopped.is_set():
                self.process = processes[worker.name]
                os.kill(self.process, signal.SIGSTOP)
                self.has_stopped.set()
            return score(worker, asked, estimator)

        monkeypatch.setattr(RayWorker, "begin", beginning)
        monkeypatch.setattr(RayWorker, "score", scoring)

    def kill(self) -> None:
        """Processes of a machine end with it."""
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)


def test_a_machine_is_lost_and_another_comes_while_batches_are_scored(
    machines: Machines, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.add("first")
    stopper, notes = Stopper(monkeypatch, 3), Notes()
    asked = search_in(model, tmp_path / "ray.db")
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(autoq.search, **asked, ray="auto", devices=1, progress=notes)
        assert stopper.has_stopped.wait(_LONGEST_SECONDS), search.result()
        machines.lose("first")
        stopper.kill()
        machines.add("late")
        found = search.result()
    assert_same(found, autoq.search(**search_in(model, tmp_path / "alone.db")))
    assert sum(workers_of(found).values()) == 8
    # An actor that is put on the machine before its end is known is lost without a batch.
    lost = [text for text in notes.texts if "is lost" in text]
    assert any("its batch goes to another" in text for text in lost), lost
    tally("Ray machines lost while scoring", {"lost": 1, "came late": 1, "losses": 0})


def test_the_only_actor_hangs_and_another_takes_its_place(
    machines: Machines, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.add("only")
    monkeypatch.setattr(ray_cluster, "SILENCE_SECONDS", 15.0)
    monkeypatch.setattr(ray_cluster, "_SIGN_SECONDS", 1.0)
    stopper, notes = Stopper(monkeypatch, 3), Notes()
    asked = search_in(model, tmp_path / "ray.db")
    found = autoq.search(**asked, ray="auto", devices=1, progress=notes)
    assert_same(found, autoq.search(**search_in(model, tmp_path / "alone.db")))
    assert stopper.has_stopped.is_set()
    assert [text for text in notes.texts if "no sign of life for 15 s" in text]


def test_a_machine_is_lost_and_another_comes_while_trials_are_measured(
    machines: Machines, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_lost, take_one = threading.Event(), Worker._take_one

    def taking(self: Worker) -> None:
        assert was_lost.wait(_LONGEST_SECONDS)  # this process leaves the first trials to others
        take_one(self)

    monkeypatch.setattr(Worker, "_take_one", taking)

    def searched(name: str) -> Any:
        return autoq.search(**search_in(model, tmp_path / name))

    study = searched("ray.db")
    machines.add("first")
    with ThreadPoolExecutor(1) as pool:
        refined = pool.submit(study.refine, trials=8, workers=2, ray="auto", **SMALL)
        _wait_until_measured_elsewhere(study)
        machines.lose("first")
        machines.add("late")
        was_lost.set()
        result = refined.result()
    assert result.trials == 8
    measured = _measured(study)
    assert [place for place, _, _ in measured] == list(range(8))
    alone = searched("alone.db")
    undisturbed = alone.refine(trials=8, **SMALL)
    known = {plan: losses for _, plan, losses in _measured(alone)}
    both = [losses == known[plan] for _, plan, losses in measured if plan in known]
    assert len(both) >= 1
    assert all(both)
    assert result.plan.assignment == undisturbed.plan.assignment
    tally("Ray machines lost while measuring trials", {"lost": 1, "came late": 1, "losses": 0})


def _wait_until_measured_elsewhere(study: Any) -> None:
    here = json.loads(worker_identity())
    trials = open_trials(study, study.unrefined_plan(), RefineOptions(**SMALL))
    end = time.monotonic() + _LONGEST_SECONDS
    while time.monotonic() < end:
        for entry in trials.get_trials(deepcopy=False):
            worker = json.loads(entry.user_attrs.get(WORKER, "null"))
            if worker not in (None, here) and PLAN in entry.user_attrs:
                return
        time.sleep(0.02)
    raise AssertionError("no trial was measured elsewhere")


def _measured(study: Any) -> list[tuple[int, str, str]]:
    """(place, plan, losses) of all trials that count."""
    trials = open_trials(study, study.unrefined_plan(), RefineOptions(**SMALL))
    counted = [entry.user_attrs for entry in trials.get_trials() if LOSSES in entry.user_attrs]
    return sorted((told[POSITION], told[PLAN], told[LOSSES]) for told in counted)
