"""Ranks of a launch score for rank 0, find it, and end with it."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import autoq
from autoq.api import open_study
from autoq.api.distribution import streams
from autoq.api.distribution.dealing import BatchWorker, WorkerLostError
from autoq.api.distribution.messages import Message, send
from autoq.api.distribution.ranks import Launch, RanksCrew, launch_of, serve_rank
from autoq.api.scoring import ScoredBatch
from autoq.errors import InputError
from tests.api.distribution.studies import EIGHT_BATCHES, assert_same, search_in, workers_of

BY_TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def launch(rank: int, port: int, ranks: int = 2) -> Launch:
    return Launch(
        rank=rank,
        ranks=ranks,
        local_rank=rank,
        address="127.0.0.1",
        port=port,
        attempt="0",
        agent_store=False,
    )


def test_a_launch_is_read_from_the_environment() -> None:
    found = launch_of(BY_TORCHRUN)
    assert found == Launch(
        rank=3,
        ranks=4,
        local_rank=1,
        address="10.0.0.1",
        port=29500,
        attempt="2",
        agent_store=True,
    )
    assert found.device("cpu") == "cpu"


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_process_on_its_own_is_no_launch(missing: str) -> None:
    assert launch_of({k: v for k, v in BY_TORCHRUN.items() if k != missing}) is None
    assert launch_of({**BY_TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}) is None


def test_ranks_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="must be as torchrun sets them"):
        launch_of({**BY_TORCHRUN, "RANK": "first"})


def test_a_search_asks_for_one_kind_of_workers(llama_folder: Path, quick: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="ranks that a launcher started score already"):
        autoq.search(llama_folder, **quick, ranks=True, devices=2)
    with pytest.raises(InputError, match="for rank 0 of a launch"):
        autoq.search(llama_folder, **quick, ranks=True)


class FakeScorer:
    """Takes the place of `BatchScorer`: the score is the number of the batch."""

    def __init__(self, order: Message, *, device: str, threads: int) -> None:
        assert order.header["model"] == "given"
        self._device = device

    def about(self) -> dict[str, Any]:
        return {"device": self._device}

    def score(self, index: int, estimator: str) -> ScoredBatch:
        return ScoredBatch(np.full((1, 1, 1), float(index)), {"term/0": np.ones(2)})


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RanksCrew, list[threading.Thread]]]:
    """Rank 0, and two others in threads of this process."""
    monkeypatch.setattr(streams, "BatchScorer", FakeScorer)
    port = free_port()
    ranks = [
        threading.Thread(
            target=serve_rank,
            args=(launch(rank, port, 3),),
            kwargs={"device": "cpu"},
            daemon=True,
        )
        for rank in (1, 2)
    ]
    gathered = RanksCrew(launch(0, port, 3))
    for rank in ranks:
        rank.start()
    yield gathered, ranks
    gathered.close()


def ask(worker: BatchWorker) -> list[float]:
    assert worker.begin(Message({"model": "given"})) == {"device": "cpu"}
    return [float(worker.score(index, "any").scores[0, 0, 0]) for index in (4, 2)]


def test_ranks_serve_pass_after_pass_and_end_with_rank_0(
    crew: tuple[RanksCrew, list[threading.Thread]],
) -> None:
    gathered, ranks = crew
    for _ in range(2):
        workers = gathered.workers()
        assert len(workers) == 2
        assert [ask(worker) for worker in workers] == [[4.0, 2.0]] * 2
        for worker in workers:
            worker.close()
    gathered.close()
    for rank in ranks:
        rank.join(20)
        assert not rank.is_alive()


def test_a_rank_that_never_came_is_given_up(
    crew: tuple[RanksCrew, list[threading.Thread]],
) -> None:
    gathered, _ = crew
    workers = [*gathered.workers(), gathered.workers()[0]]
    for worker in workers[:2]:
        ask(worker)
    lost: list[str] = []

    def wait() -> None:
        try:
            workers[2].begin(Message({"model": "given"}))
        except WorkerLostError as error:
            lost.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    workers[2].close()
    waiting.join(20)
    assert lost == ["it did not connect"]


def test_strangers_are_not_let_in(crew: tuple[RanksCrew, list[threading.Thread]]) -> None:
    gathered, _ = crew
    address = gathered._listener.getsockname()
    silent = socket.create_connection(address)  # the others do not wait for it
    for hello in (
        Message({"token": "guessed"}),
        Message({}),
        Message({"token": "größer"}),
        Message({"token": "guessed" * 1000}),
        Message({"token": "guessed"}, {"large": np.zeros(1)}),
    ):
        with socket.create_connection(address) as stranger, stranger.makefile("wb") as writer:
            send(writer, hello)
            stranger.settimeout(20)
            with suppress(ConnectionResetError):  # what was sent was not read to its end
                assert stranger.recv(1) == b""
    workers = gathered.workers()
    assert [ask(worker) for worker in workers] == [[4.0, 2.0]] * 2
    silent.close()


SEARCH_ON_OTHERS = """
from autoq.api.distribution.ranks import RanksCrew
from autoq.cli import main
RanksCrew.scores_here = False  # or rank 0 may be the quicker
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", [True, False], ids=["python_m_autoq", "others_only"])
def test_torchrun_gives_the_study_of_one_process(
    llama_folder: Path, tmp_path: Path, module: bool
) -> None:
    program = ["-m", "autoq"]
    if not module:
        (tmp_path / "program.py").write_text(SEARCH_ON_OTHERS)
        program = [str(tmp_path / "program.py")]
    store = f"sqlite:///{tmp_path / 'ranks.db'}"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--bits", "6", "--formats", "fp8,nvfp4", "--calib-sequences", "8", "--no-measure"]
    options += ["--sequence-length", "32", "--batch-size", "1", "--draws", "2", "--store", store]
    options += ["--calibration", "max"]
    found = subprocess.run(
        [*run, *program, "search", str(llama_folder), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("study: ") == 1
    by_ranks = open_study(None, store)
    if not module:
        assert workers_of(by_ranks) == {"rank 1": EIGHT_BATCHES["calibration_sequences"]}
    assert_same(by_ranks, autoq.search(**search_in(llama_folder, tmp_path / "alone.db")))


def test_who_is_let_in_while_the_crew_ends_is_turned_away(
    crew: tuple[RanksCrew, list[threading.Thread]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered, _ = crew
    looked: queue.Queue[Any] = queue.Queue()
    ended = threading.Event()

    def slowly(connection: socket.socket) -> bool:
        looked.put(connection.getpeername())
        return ended.wait(60)

    monkeypatch.setattr(gathered, "_is_known", slowly)
    with socket.create_connection(gathered._listener.getsockname()) as late:
        while looked.get(timeout=60) != late.getsockname():
            pass  # a rank of the crew's own, which came late as well
        gathered.close()
        ended.set()
        late.settimeout(60)
        assert late.recv(1) == b""
