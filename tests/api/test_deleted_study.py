"""A study that was deleted leaves its name free: a new one of that name is refined anew."""

from __future__ import annotations

import json

import optuna
import pytest
from sqlalchemy import create_engine, inspect, text

import autoq
from autoq.errors import StudyLockedError
from autoq.studies import StudyStore, trial_storage
from autoq.studies._trials import WORKER, worker_identity
from autoq.testing.postgresql import NoServerError, postgresql_url
from tests.api.refinements import QUICK, SMALL

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/autoq.db"
        return
    pytest.importorskip("psycopg")
    try:
        with postgresql_url() as found:
            yield found
    except NoServerError as error:
        pytest.skip(str(error))


def rows_of_optuna(url):
    """Table -> how many rows, of those that hold any."""
    engine = create_engine(url)
    with engine.connect() as connection:
        names = [name for name in inspect(connection).get_table_names() if _is_optunas(name)]
        counts = {name: connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in names}
    engine.dispose()
    return {name: count for name, count in counts.items() if count}


def _is_optunas(name):
    return name == "studies" or name.startswith(("study_", "trial"))


def refined(folder, url, seed):
    study = autoq.search(folder, **QUICK, store=url, name="mine", seed=seed)
    study.refine(trials=2, **SMALL)
    return study


def test_a_new_study_of_the_same_name_has_trials_of_its_own(llama_folder, url):
    study = refined(llama_folder, url, seed=1)
    storage = trial_storage(study.store.url)
    stranger = optuna.create_study(study_name="a user's own", storage=storage)
    stranger.ask()
    assert len(optuna.get_all_study_names(storage=storage)) == 2
    study.store.delete_study(study.id)
    assert rows_of_optuna(url) == {
        "studies": 1,
        "study_directions": 1,
        "trials": 1,
    }
    again = refined(llama_folder, url, seed=2)
    (name,) = [name for name in optuna.get_all_study_names(storage=storage) if "mine" in name]
    assert len(optuna.load_study(study_name=name, storage=storage).get_trials()) == 2
    assert again.record.seed == 2


@pytest.fixture
def store(tmp_path):
    with StudyStore.open(str(tmp_path / "autoq.db")) as opened:
        yield opened


def test_a_study_whose_trials_are_measured_is_not_deleted(store):
    from autoq.testing.synthetic_study import add_synthetic_study

    add_synthetic_study(store, groups=3, formats=2, sequences=2, name="mine")
    study_id = store.find("mine").id
    storage = trial_storage(store.url)
    trials = optuna.create_study(study_name="mine · 6 bits", storage=storage)
    trials.set_user_attr("autoq_study", "mine")
    running = trials.ask()
    running.set_user_attr(WORKER, worker_identity())
    storage.record_heartbeat(running._trial_id)
    with pytest.raises(StudyLockedError, match="trial 0 of 'mine · 6 bits' is being measured"):
        store.delete_study(study_id)
    assert len(trials.get_trials()) == 1
    host, namespace, _pid, _started = json.loads(worker_identity())
    running.set_user_attr(WORKER, json.dumps([host, namespace, 2**22 + 1, 0.0]))  # no such process
    store.delete_study(study_id)
    assert optuna.get_all_study_names(storage=storage) == []


def test_a_silent_worker_of_another_machine_keeps_no_study(store):
    from autoq.testing.synthetic_study import add_synthetic_study

    add_synthetic_study(store, groups=3, formats=2, sequences=2, name="mine")
    storage = trial_storage(store.url)
    trials = optuna.create_study(study_name="mine · 6 bits", storage=storage)
    trials.set_user_attr("autoq_study", "mine")
    running = trials.ask()
    running.set_user_attr(WORKER, json.dumps(["elsewhere", "", 1, 0.0]))
    storage.record_heartbeat(running._trial_id)
    measured = optuna.create_study(study_name="mine, measured plans", storage=storage)
    measured.set_user_attr("autoq_study", "mine")
    measured.set_user_attr("autoq_made_by", "measured plans")
    measured.ask()
    with pytest.raises(StudyLockedError, match="wait 60 s"):
        store.delete_study(store.find("mine").id)
    with storage.engine.begin() as connection:
        connection.execute(
            text("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-61 seconds')")
        )
    store.delete_study(store.find("mine").id)
    assert rows_of_optuna(store.url) == {}
