"""Scoring by several processes gives the bits of one, whoever of them is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.api.distribution import WorkersLostError
from autoq.api.distribution.crew import LocalCrew
from autoq.api.distribution.dealing import WorkerLostError, WorkerRefusedError
from autoq.api.distribution.messages import Message, receive, send
from autoq.api.distribution.processes import ProcessWorker
from autoq.api.distribution.scorer import BatchScorer, scoring_order
from autoq.api.task import load_data
from autoq.errors import InputError, ModelError
from autoq.studies import StudyStore
from autoq.testing.tiny_models import make_tiny_model
from tests.api.distribution.studies import Notes, assert_same, search_in, workers_of


@pytest.fixture
def asked(llama_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return search_in(llama_folder, tmp_path / "studies.db")


def after_question(index: int, do: Callable[[ProcessWorker], None]) -> Any:
    """`StreamWorker._answer`, with something that happens when batch `index` is first asked for."""
    answer = ProcessWorker._answer
    to_come = [index]

    def answering(self: ProcessWorker, question: Message) -> Message:
        if question.header.get("index") not in to_come:
            return answer(self, question)
        to_come.clear()
        reader, writer = self._streams()
        send(writer, question)
        do(self)
        try:
            return receive(reader)
        except EOFError:
            raise WorkerLostError(self._last_words()) from None

    return answering


def kill(worker: ProcessWorker) -> None:
    os.kill(worker.process, signal.SIGKILL)


def test_a_process_scores_as_this_one_does(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = autoq.search(**asked)
    monkeypatch.setattr(LocalCrew, "scores_here", False)  # or this one may be the quicker
    asked["store"] = f"sqlite:///{tmp_path / 'two.db'}"
    both = autoq.search(**asked, devices=2)
    assert workers_of(both) == {"process 1": 8}
    assert_same(both, alone)


@pytest.mark.slow
def test_a_process_that_is_killed_in_the_middle_is_made_up_for(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = autoq.search(**asked)
    monkeypatch.setattr(LocalCrew, "scores_here", False)
    monkeypatch.setattr(ProcessWorker, "_answer", after_question(3, kill))
    asked["store"] = f"sqlite:///{tmp_path / 'three.db'}"
    notes = Notes()
    three = autoq.search(**asked, devices=3, progress=notes)
    lost = [text for text in notes.texts if "is lost: killed by signal 9" in text]
    assert len(lost) == 1 and lost[0].endswith("its batch goes to another")
    assert_same(three, alone)


@pytest.mark.slow
def test_what_is_done_stays_when_the_last_process_is_killed(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = autoq.search(**asked)
    asked["store"] = f"sqlite:///{tmp_path / 'killed.db'}"
    with monkeypatch.context() as patch:
        patch.setattr(LocalCrew, "scores_here", False)
        patch.setattr(ProcessWorker, "_answer", after_question(5, kill))
        with pytest.raises(WorkersLostError, match="what was scored is stored"):
            autoq.search(**asked, devices=2)
    store = StudyStore.open(asked["store"])
    assert list(store.score_batches(1)) == [0, 1, 2, 3, 4]
    store.close()
    assert_same(autoq.search(**asked), alone)


@pytest.mark.slow
def test_scoring_that_is_sure_early_ends_where_one_process_ends(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked |= {"calibration_sequences": 24, "confidence": 0.05}
    alone = autoq.search(**asked)
    assert len(alone.store.score_batches(1)) < 24
    monkeypatch.setattr(LocalCrew, "scores_here", False)
    asked["store"] = f"sqlite:///{tmp_path / 'early.db'}"
    assert_same(autoq.search(**asked, devices=2), alone)


def test_an_estimator_that_sums_up_scores_alone_and_says_so(asked: dict[str, Any]) -> None:
    notes = Notes()
    asked |= {"estimator": "factored", "draws": 1, "calibration_sequences": 2}
    study = autoq.search(**asked, devices=2, progress=notes)
    assert study.sensitivity.estimator == "factored"
    assert any("one process scores all batches" in text for text in notes.texts)


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"devices": 0}, "devices must be >= 1, got 0"), ({"devices": 2}, "is in memory")],
)
def test_workers_that_cannot_be_are_refused(
    quick: dict[str, Any], given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        autoq.search(make_tiny_model("llama"), **quick, **given)


class TestWorkersOwnChecks:
    """What a worker refuses before it scores anything."""

    @pytest.fixture
    def order(self, asked: dict[str, Any]) -> Message:
        study = autoq.search(**asked)
        config = study.config
        data = load_data(
            study.loaded(),
            None,
            sequences=config.calibration_sequences,
            sequence_length=config.sequence_length,
            split="calibration",
            seed=config.seed,
        )
        return scoring_order(study, study.loaded(), data)

    @pytest.mark.parametrize(
        ("changed", "error", "reason"),
        [
            ({"versions": {"torch": "1.0"}}, InputError, "instead of 1.0; install those"),
            ({"fingerprint": "0"}, ModelError, "is another"),
            ({"projection_dtype": "torch.int8"}, InputError, "machines of one kind"),
            ({"device_type": "cuda"}, InputError, "kind of device"),
        ],
        ids=["versions", "model", "hardware", "device"],
    )
    def test_it_must_score_as_the_owner_does(
        self, order: Message, changed: dict[str, Any], error: type[Exception], reason: str
    ) -> None:
        other = Message({**order.header, **changed}, order.arrays)
        with pytest.raises(error, match=reason):
            BatchScorer(other, device="cpu", threads=1)

    def test_a_refusal_reaches_the_owner(self, order: Message) -> None:
        worker = ProcessWorker("a", device="cpu", threads=1)
        try:
            with pytest.raises(WorkerRefusedError, match=r"instead of 1\.0"):
                worker.begin(Message({**order.header, "versions": {"torch": "1.0"}}))
        finally:
            worker.close()


def test_workers_hold_the_model_which_a_bound_on_memory_forbids(
    llama_folder: Path, quick: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="leave --devices, --ray and torchrun or --max-memory out"):
        autoq.search(llama_folder, **quick, devices=2, max_memory="4GB")
