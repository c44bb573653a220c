"""A store in PostgreSQL holds what one in SQLite holds: search, show, refine, workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from wsgiref.util import setup_testing_defaults

import optuna
import pytest

import autoq
from autoq.api import list_studies, open_study
from autoq.api.dashboards.dashboard import dashboard_application, prepare_store
from autoq.api.refinement._trials import LOSSES, PLAN, POSITION
from autoq.errors import StudyLockedError
from autoq.studies import StudyStore, trial_storage
from autoq.testing.postgresql import NoServerError, postgresql_url

pytestmark = pytest.mark.slow

SMALL = {"sequences": 4, "fresh_sequences": 4, "held_out_sequences": 2}


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("psycopg")
    try:
        with postgresql_url() as url:
            yield url
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def url(server, request):
    """A schema of its own for each test: tables of ours and of Optuna's, both without a prefix."""
    import sqlalchemy

    schema = f"t{abs(hash(request.node.name)) % 10**8}"
    engine = sqlalchemy.create_engine(server)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"CREATE SCHEMA {schema}"))
    yield f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{schema}"
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest.fixture
def study(llama_folder, quick, url):
    return autoq.search(llama_folder, **{**quick, "store": url})


def trials_of(study):
    storage = trial_storage(study.store.url)
    names = [entry.study_name for entry in optuna.get_all_study_summaries(storage=storage)]
    if not names:
        return []
    return optuna.load_study(study_name=names[0], storage=storage).get_trials()


def plans_of(study):
    """Place -> plan and losses of every trial that was measured."""
    return {
        entry.user_attrs[POSITION]: (entry.user_attrs[PLAN], entry.user_attrs[LOSSES])
        for entry in trials_of(study)
        if LOSSES in entry.user_attrs
    }


def test_a_search_gives_the_same_plan_scores_and_measurements_as_in_sqlite(
    llama_folder, quick, study, url
):
    beside = autoq.search(llama_folder, **quick)
    again = open_study(study.name, url)
    assert again.plan().assignment == beside.plan().assignment
    assert again.summary()["measured"] == beside.summary()["measured"]
    assert again.sensitivity.scores().tolist() == beside.sensitivity.scores().tolist()
    assert [entry["name"] for entry in list_studies(url)] == [study.name]


def test_a_search_that_is_repeated_finds_its_results(llama_folder, quick, study, url):
    before = study.store.stages(study.id)
    again = autoq.search(llama_folder, **{**quick, "store": url})
    assert again.id == study.id
    kept = {stage.name: stage.finished for stage in again.store.stages(study.id)}
    assert all(kept[stage.name] == stage.finished for stage in before if stage.name != "solve")


def test_one_process_at_a_time_works_on_a_study(study, url):
    with study.store.lease(study.id), StudyStore.open(url) as other:
        lease = other.lease(study.id)
        with pytest.raises(StudyLockedError, match="one process at a time"):
            lease.__enter__()


def test_refinement_shares_the_database_and_gives_the_trials_of_sqlite(llama_folder, quick, study):
    result = study.refine(trials=6, **SMALL)
    assert result.trials == 6
    beside = autoq.search(llama_folder, **quick)
    beside.refine(trials=6, **SMALL)
    assert plans_of(study) == plans_of(beside)


def test_two_workers_share_trials_and_one_that_is_killed_is_made_up_for(study):
    script = (
        "import sys\n"
        "from autoq.api import open_study\n"
        "study = open_study(None, sys.argv[1])\n"
        "study.refine(trials=8, sequences=4, fresh_sequences=4, held_out_sequences=2)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, study.store.url],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while len(trials_of(study)) < 3:
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    result = study.refine(trials=8, workers=2, **SMALL)
    assert result.trials == 8
    assert sorted(plans_of(study)) == list(range(8))


def test_the_command_line_takes_the_url(study, tmp_path):
    url = study.store.url
    for command in (["show", "--json"], ["refine", "--trials", "3", "--json", "--quiet"]):
        small = ["--sequences", "4", "--fresh-sequences", "4", "--held-out-sequences", "2"]
        extra = small if command[0] == "refine" else []
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from autoq.cli import main; main()",
                *command,
                *extra,
                "--store",
                url,
            ],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        assert json.loads(done.stdout)["study"] == study.name


def test_the_dashboard_shows_what_is_in_postgresql_and_keeps_what_users_wrote(study, tmp_path):
    """Refinement, measured plans, notes, plots and files; numbers that changed, in place."""
    dashboard = pytest.importorskip("optuna_dashboard")
    study.refine(trials=2, annotate=True, **SMALL)
    first = prepare_store(study.store, tmp_path)
    assert first.skipped == ()
    (refinement,) = first.shown
    page = answer_of(first, "/api/studies")
    assert [entry["study_name"] for entry in page["study_summaries"]] == [refinement]
    shown = answer_of(first, f"/api/studies/{page['study_summaries'][0]['study_id']}")
    assert study.name in shown["note"]["body"].replace("\\", "")
    assert len(shown["trials"]) == 2
    assert {entry["id"] for entry in shown["plotly_graph_objects"]} == {
        "frontier",
        "predicted-and-measured",
        "layers",
    }
    for entry in shown["artifacts"]:
        assert (tmp_path / entry["artifact_id"]).stat().st_size > 0

    storage = trial_storage(study.store.url)
    optuna.delete_study(study_name=refinement, storage=storage)
    (name,) = prepare_store(study.store, tmp_path).shown
    assert name.endswith("measured plans")
    measured = optuna.load_study(study_name=name, storage=storage)
    dashboard.save_note(measured, "my own words")
    plan = study.plan()
    (record,) = (
        record
        for record in study.store.measurements(study.id)
        if (record.plan_id, record.metric) == (plan.id, "kl_divergence")
    )
    changed = {"plan_id": plan.id, "label": record.label, "data_sha256": record.data_sha256}
    study.store.add_measurement(study.id, metric="kl_divergence", value=0.125, **changed)
    prepare_store(study.store, tmp_path)
    again = optuna.load_study(study_name=name, storage=trial_storage(study.store.url))
    assert again._study_id == measured._study_id
    assert dashboard.get_note(again) == "my own words"
    (values,) = [
        trial.values
        for trial in again.trials
        if json.loads(trial.user_attrs["plan"]) == plan.assignment
    ]
    assert values[1] == 0.125


def answer_of(prepared, path):
    """What the dashboard's own server answers to its page's request."""
    environ = {}
    setup_testing_defaults(environ)
    environ |= {"PATH_INFO": path, "HTTP_ACCEPT_ENCODING": "identity"}
    answer = dashboard_application(prepared)(environ, lambda *_: None)
    return json.loads(b"".join(answer))
