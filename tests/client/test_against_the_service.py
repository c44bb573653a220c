"""The client and the command line against the real service, over a real socket."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import autoq
from autoq.cli import app
from autoq.errors import UnknownNameError
from autoq.service.settings import ServiceSettings
from autoq.studies import StudyStore
from autoq.testing.served import served
from autoq.testing.synthetic_study import add_synthetic_study

NAME = "synthetic-12"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('store')}/autoq.db"
    with StudyStore.open(url) as opened:
        add_synthetic_study(opened, groups=8, formats=3, name="other")
        add_synthetic_study(opened, groups=12, formats=4, name=NAME)
    return url


@pytest.fixture(scope="module")
def url(store):
    with served(ServiceSettings(store=store)) as address:
        yield address


@pytest.fixture
def client(url):
    with autoq.Client(url) as connected:
        yield connected


def here(store, *arguments):
    return CliRunner().invoke(app, [*arguments, "--store", store])


def there(url, *arguments):
    return CliRunner().invoke(app, ["--server", url, *arguments])


def test_what_the_server_is(client):
    assert (client.me().name, client.me().scope, client.me().authentication) == (
        "local",
        "admin",
        False,
    )
    readiness = client.ready()  # no runner was started: that is an answer, and no failure
    assert (readiness.ready, readiness.store, readiness.workers) == (False, True, 0)
    assert "nvfp4" in {entry.name for entry in client.formats()}
    assert "vllm:h200" in {entry.target for entry in client.targets()}
    assert [entry.path for entry in client.models()] == ["bundled"]


def test_show_is_the_same_here_and_there(store, url):
    remote, local = (
        json.loads(result.stdout)
        for result in (there(url, "show", NAME, "--json"), here(store, "show", NAME, "--json"))
    )
    # Folders of the server are not told.
    local["model"] = local["model"].rsplit("/", 1)[-1]
    if local["export"] is not None:
        local["export"]["path"] = local["export"]["path"].rsplit("/", 1)[-1]
    assert remote == local


def test_tables_are_the_same_here_and_there(store, url):
    remote, local = there(url, "show", NAME), here(store, "show", NAME)
    assert remote.exit_code == 0, remote.stderr
    assert "effective bits" in remote.stdout
    own = [line for line in local.stdout.splitlines() if "model " not in line]
    assert set(own) - set(remote.stdout.splitlines()) <= {
        line for line in own if line.startswith("checkpoint:")
    }


def test_an_unknown_plan_is_refused_in_one_sentence(client):
    with pytest.raises(UnknownNameError, match="keeps no plan 999"):
        client.summary(NAME, plan=999)
    with pytest.raises(UnknownNameError, match="nothing"):
        client.summary("nothing")


def test_list_is_the_same_here_and_there(store, url):
    remote, local = (
        json.loads(result.stdout)["studies"]
        for result in (there(url, "list", "--json"), here(store, "list", "--json"))
    )
    for entry in local:  # folders of the server are not told
        entry["model"] = entry["model"].rsplit("/", 1)[-1]
    by_name = {entry["name"]: entry for entry in remote}
    assert by_name == {entry["name"]: entry for entry in local}
    assert {NAME, "other"} <= set(by_name)


def test_frontiers_are_the_same_here_and_there(store, url):
    remote, local = (
        json.loads(result.stdout)
        for result in (
            there(url, "frontier", NAME, "--points", "8", "--json"),
            here(store, "frontier", NAME, "--points", "8", "--json"),
        )
    )
    for plan in local["plans"]:
        del plan["assignment"]
    for plan in remote["plans"]:
        plan.pop("assignment", None)
    assert remote == local
    tables = there(url, "frontier", NAME), here(store, "frontier", NAME)
    assert tables[0].stdout == tables[1].stdout


def test_pictures_of_a_frontier_are_written_here(url, tmp_path):
    page, picture = tmp_path / "f.html", tmp_path / "f.png"
    result = there(url, "frontier", NAME, "--html", str(page), "--png", str(picture))
    assert result.exit_code == 0, result.stderr
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plan_is_the_one_that_is_solved_here(store, client):
    plan = client.plan(NAME, effective_bits=5.0)
    with StudyStore.open(store) as opened:
        from autoq.api.study_tables import StudyTables

        solved = StudyTables(opened, opened.find(NAME)).solve(5.0)
    assert plan.assignment == dict(solved.assignment)
    assert (plan.effective_bits, plan.stored_bytes) == (solved.effective_bits, solved.stored_bytes)
    assert plan.id is None  # only computed
    kept = client.plan(NAME, effective_bits=5.25, keep=True)
    assert kept.id is not None
    assert client.stored_plan(NAME, kept.id).assignment == kept.assignment


@pytest.mark.parametrize(
    "limits",
    [
        {"effective_bits": 1.0},
        {"max_gb": 1e-6},
        {"effective_bits": 5.0, "max_gb": 1e-6},
        {"max_kl": 1e-12, "effective_bits": 5.0},
        {"effective_bits": 5.0, "rules": ["nothing=fp8"]},
        {"max_latency_ms": 1.0},
        {},
    ],
)
def test_refusals_of_plans_are_those_of_this_machine(store, client, limits):
    from autoq.api.study_tables import StudyTables
    from autoq.errors import AutoqError

    with StudyStore.open(store) as opened:
        tables = StudyTables(opened, opened.find(NAME))
        if not limits:
            assert client.plan(NAME).effective_bits == tables.plan().effective_bits
            return
        with pytest.raises(AutoqError) as here_raised:
            tables.solve(**limits)
    with pytest.raises(AutoqError) as there_raised:
        client.plan(NAME, **limits)
    assert type(there_raised.value) is type(here_raised.value)
    assert str(there_raised.value) == str(here_raised.value)


def test_tables_trials_and_exports_are_read(client):
    found = client.sensitivity(NAME)
    assert (len(found.groups), len(found.formats)) == (12, 4)
    assert len(found.scores) == 12
    assert list(client.trials(NAME)) == []
    assert [export.container for export in client.exports(NAME)] == [
        export.container for export in client.study(NAME).exports
    ]


def test_a_report_is_the_page_of_this_machine(store, url, tmp_path):
    remote, local = tmp_path / "there.html", tmp_path / "here.html"
    assert there(url, "report", NAME, "--output", str(remote)).exit_code == 0
    assert here(store, "report", NAME, "--output", str(local)).exit_code == 0
    assert remote.read_text().startswith("<!DOCTYPE html>")
    assert len(remote.read_text()) == pytest.approx(
        len(local.read_text()), rel=0.01
    )  # its model's path


def test_jobs_are_made_listed_cancelled_and_queued_again(url, client):
    first = client.search("bundled", effective_bits=5.0, name="waits")
    second = client.search("bundled", effective_bits=5.0, name="waits")
    assert first.id != second.id  # two calls are two jobs
    assert [handle.id for handle in client.jobs(status="queued", limit=2)] == [second.id, first.id]
    result = there(url, "cancel", first.id)
    assert result.stdout == f"job {first.id}: cancelled\n"
    assert there(url, "resume", first.id).stdout == f"job {first.id}: queued\n"
    again = there(url, "resume", first.id)
    assert again.exit_code == 2
    assert "is queued" in again.stderr
    assert second.cancel().status == "cancelled"
    assert [event.data["status"] for event in second.events()] == ["queued", "cancelled"]
    assert first.cancel().status == "cancelled"


def test_a_study_is_deleted(store, client):
    with StudyStore.open(store) as opened:
        add_synthetic_study(opened, groups=4, formats=2, name="goes")
    client.delete("goes")
    with pytest.raises(UnknownNameError):
        client.study("goes")


def test_a_token_is_asked_for_and_its_scope_holds(store, tmp_path, monkeypatch):
    from autoq.errors import InputError
    from autoq.service.guard.tokens import create_token
    from autoq.wire import Scope

    tokens = tmp_path / "tokens"
    token = create_token(tokens, "ada", Scope.READ)
    with served(ServiceSettings(store=store, token_file=tokens)) as address:
        with autoq.Client(address) as nobody, pytest.raises(InputError, match="needs a token"):
            nobody.me()
        with autoq.Client(address, token=token) as ada:
            assert (ada.me().name, ada.me().scope) == ("ada", "read")
            with pytest.raises(InputError, match="scope run"):
                ada.search("bundled", effective_bits=5.0)
        monkeypatch.setenv("ADAS", token)
        listed = CliRunner().invoke(app, ["--server", address, "--token-env", "ADAS", "list"])
        assert NAME in listed.stdout
        refused = CliRunner().invoke(app, ["--server", address, "list"])
        assert refused.exit_code == 2
        assert token not in refused.stderr
