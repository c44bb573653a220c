"""Trials are read from Optuna's tables as Optuna itself reads them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path

import optuna
import pytest

from autoq.errors import StoreError
from autoq.service.reading.reader import StudyReader
from autoq.studies import StudyStore, trial_storage
from autoq.testing.synthetic_study import add_synthetic_study


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StudyStore]:
    with StudyStore.open(f"sqlite:///{tmp_path}/autoq.db") as opened:
        for name in ("mine", "other"):
            add_synthetic_study(opened, groups=5, formats=2, sequences=2, name=name)
        yield opened


pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


def refinement(store: StudyStore, owner: str, label: str) -> optuna.Study:
    study = optuna.create_study(
        study_name=f"{owner} · {label}",
        storage=trial_storage(store.url),
        directions=["minimize", "minimize"],
    )
    study.set_user_attr("autoq_study", owner)
    return study


def test_before_anything_was_refined_there_are_no_trials(store: StudyStore) -> None:
    page = StudyReader(store, str).trials("mine", 5)
    assert (page.items, page.total, page.next_cursor) == ((), 0, None)


def test_trials_are_those_of_optuna(store: StudyStore) -> None:
    first = refinement(store, "mine", "4.8 bits")
    for number in range(3):
        trial = first.ask()
        trial.set_user_attr("effective_bits", 4.5 + number)
        trial.set_user_attr("predicted_loss", 0.25)
        trial.set_user_attr("metrics", '{"kl_divergence": 0.5}')
        trial.set_user_attr("plan", '{"a": "fp8"}')
        trial.set_user_attr("worker", '["host", "", 1, 0.0]')
        trial.set_user_attr("sealed", {"attributes": ["plan"], "sha256": "0" * 64})
        if number == 1:
            trial.set_user_attr("failure", "no room in /secret/place/file")
            first.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            first.tell(trial, [0.5 * number, 4.5])
    running = refinement(store, "mine", "6 bits").ask()
    refinement(store, "other", "4.8 bits").ask()
    shown = optuna.create_study(study_name="measured", storage=trial_storage(store.url))
    shown.set_user_attr("autoq_study", "mine")
    shown.set_user_attr("autoq_made_by", "measured plans")
    shown.ask()

    reader = StudyReader(store, str)
    page = reader.trials("mine", 3)
    rest = reader.trials("mine", 3, page.next_cursor)
    assert (page.total, len(page.items), len(rest.items), rest.next_cursor) == (4, 3, 1, None)
    expected = first.get_trials()
    for entry, known in zip(page.items, expected, strict=True):
        assert (entry.number, entry.refinement) == (known.number, "mine · 4.8 bits")
        assert entry.state == known.state.name.lower()
        assert list(entry.values) == (known.values or [])
        assert entry.effective_bits == known.user_attrs["effective_bits"]
        assert entry.attributes["metrics"] == {"kl_divergence": 0.5}
        assert not {"plan", "worker", "sealed"} & set(entry.attributes)
        started = known.datetime_start
        assert started is not None
        assert entry.started == started.astimezone(UTC).isoformat(timespec="microseconds")
    assert page.items[1].attributes["failure"] == "no room in file"
    assert (rest.items[0].state, rest.items[0].number) == ("running", running.number)
    assert rest.items[0].finished is None


def test_an_attribute_that_is_damaged_is_named(store: StudyStore) -> None:
    refinement(store, "mine", "4.8 bits").ask().set_user_attr("metrics", "{}")
    with sqlite3.connect(str(store.file)) as connection:
        connection.execute("UPDATE trial_user_attributes SET value_json = '\"{}'")
    connection.close()
    with pytest.raises(StoreError, match="attribute 'metrics' of a trial is damaged"):
        StudyReader(store, str).trials("mine", 3)
