"""A Ray cluster scores and measures as one process does, whoever of its actors is killed."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import autoq
from autoq.api.distribution.dealing import BatchFailedError, WorkersLostError
from autoq.api.distribution.ray_cluster import RayWorker, Share, connect, share_of
from autoq.api.distribution.ray_trials import refuse_files_elsewhere
from autoq.errors import InputError
from tests.api.distribution.studies import Notes, assert_same, search_in, workers_of
from tests.api.refinements import SMALL


def cluster_with(hosts: tuple[str, ...] = ("here",), **resources: float) -> Any:
    nodes = [{"Alive": host != "gone", "NodeManagerHostname": host} for host in hosts]
    return SimpleNamespace(cluster_resources=lambda: resources, nodes=lambda: nodes)


@pytest.mark.parametrize(
    ("resources", "workers", "device", "share"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, None, "auto", Share(8, 1, 8)),
        ({"CPU": 64.0, "GPU": 8.0}, 4, "auto", Share(4, 1, 16)),
        ({"CPU": 64.0, "GPU": 8.0}, 4, "cpu", Share(4, 0, 16)),
        ({"CPU": 6.0}, None, "auto", Share(2, 0, 3)),
        ({"CPU": 6.0}, 4, "auto", Share(4, 0, 1)),
    ],
)
def test_workers_share_the_cluster(
    resources: dict[str, float], workers: int | None, device: str, share: Share
) -> None:
    cluster = cluster_with(("a", "b", "gone"), **resources)
    assert share_of(cluster, workers, device=device) == share
    assert share.resources == {"num_gpus": share.gpus, "num_cpus": share.threads}


@pytest.mark.parametrize(
    ("resources", "reason"),
    [({"CPU": 64.0, "GPU": 2.0}, "the cluster's 2 GPUs, and 3"), ({"CPU": 2.0}, "2 cores, and 3")],
)
def test_more_workers_than_there_is_room_for_are_refused(
    resources: dict[str, float], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        share_of(cluster_with(**resources), 3)


def test_a_file_is_shared_on_one_machine_only(tmp_path: Path) -> None:
    study: Any = SimpleNamespace(store=SimpleNamespace(file=tmp_path / "studies.db"))
    refuse_files_elsewhere(cluster_with((platform.node(), platform.node(), "gone")), study)
    if platform.node() != "gone":
        with pytest.raises(
            InputError, match=r"another-host cannot lock safely; use --store postgres"
        ):
            refuse_files_elsewhere(cluster_with((platform.node(), "another-host")), study)
    study.store.file = None  # a database server
    refuse_files_elsewhere(cluster_with(("another-host",)), study)


def test_without_ray_it_is_said_how_to_have_it(
    llama_folder: Path, quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'autoq\[ray\]'"):
        autoq.search(llama_folder, **quick, ray="auto")


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'autoq[ray]'")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
    )
    yield ray
    ray.shutdown()


def kill_once_asked(ray: Any, index: int, times: int) -> Any:
    """`RayWorker.score` that kills its actor after batch `index` was asked for, so many times."""
    score = RayWorker.score
    left = [times]

    def scoring(self: RayWorker, asked: int, estimator: str) -> Any:
        if asked == index and left[0]:
            left[0] -= 1
            reference = self._actor.score.remote(asked, estimator)
            ray.kill(self._actor)
            self._got(reference, None)
        return score(self, asked, estimator)

    return scoring


@pytest.mark.slow
def test_actors_score_as_one_process_does_also_when_one_is_killed(
    ray: Any, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = autoq.search(**search_in(llama_folder, tmp_path / "alone.db"))
    monkeypatch.setattr(RayWorker, "score", kill_once_asked(ray, 3, times=1))
    notes = Notes()
    found = autoq.search(
        **search_in(llama_folder, tmp_path / "ray.db"), ray="auto", devices=2, progress=notes
    )
    assert_same(found, alone)
    assert sum(workers_of(found).values()) == 8
    assert set(workers_of(found)) <= {"actor 1", "actor 2"}
    assert len([text for text in notes.texts if "is lost" in text]) == 1


@pytest.mark.slow
def test_a_pass_that_lost_all_actors_goes_on_when_it_is_run_again(
    ray: Any, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = search_in(llama_folder, tmp_path / "ray.db")
    with monkeypatch.context() as patch:
        patch.setattr(RayWorker, "restarts", 0)
        patch.setattr(RayWorker, "score", kill_once_asked(ray, 2, times=1))
        with pytest.raises(WorkersLostError, match="run the same command again"):
            autoq.search(**asked, ray="auto", devices=1)
    found = autoq.search(**asked, ray="auto", devices=1)
    assert_same(found, autoq.search(**search_in(llama_folder, tmp_path / "alone.db")))


@pytest.mark.slow
def test_tasks_of_the_cluster_measure_trials(ray: Any, study: Any) -> None:
    result = study.refine(trials=6, workers=2, ray="auto", **SMALL)
    assert result.trials == 6


@pytest.mark.slow
def test_what_an_actor_cannot_do_is_told(ray: Any) -> None:
    worker = RayWorker(connect("auto"), "a", Share(1, 0, 1), orders=None)  # type: ignore[arg-type]

    class Failing:
        def score(self, index: int, estimator: str) -> None:
            raise ArithmeticError(f"batch {index}")

        def sign_of_life(self) -> bool:
            return True

    worker._actor = ray.remote(Failing).remote()
    with pytest.raises(BatchFailedError, match="ArithmeticError: batch 4"):
        worker.score(4, "any")
    worker.close()
