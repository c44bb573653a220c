"""`autoq --server URL COMMAND`: what is asked, what is refused, how it ends."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from autoq.cli import app
from autoq.cli._app import app as commands
from autoq.cli._remote import COMMANDS
from autoq.cli._servers import ASKABLE
from autoq.errors import BudgetInfeasibleError
from autoq.service.problems import problem_of
from autoq.testing.scripted_server import Answer, job, stream
from autoq.wire import EventKind, JobStatus

DONE = stream((1, EventKind.STATUS, {"status": "done"}))

UNKNOWN = {"type": "urn:autoq:problem:not-found", "title": "t", "status": 404, "detail": "none"}


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """Ask the scripted server, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments, **options):
        return CliRunner().invoke(app, ["--server", server.url, *arguments], **options)

    return invoke


def finishes(server, result, **fields):
    """A server whose one job is done at once and gives that."""

    def route(asked):
        if asked.path.endswith("/events"):
            return Answer(200, DONE)
        if asked.method == "POST":
            return Answer(202, job(**fields))
        if asked.path.startswith("/v1/studies"):
            return Answer(200, detail())
        return Answer(200, job(JobStatus.DONE, result=result, **fields))

    server.route = route


def detail(name="llama-1"):
    empty = {"plan": None, "target": None, "unit": None, "job": None, "groups": None}
    lists = dict.fromkeys(
        ("stages", "formats", "excluded", "rules", "plans", "measurements", "exports"), ()
    )
    texts = {"architecture": "a", "model_fingerprint": "f", "configuration": {}, "versions": {}}
    return {**entry(name), **empty, **lists, **texts}


def entry(name="llama-1"):
    return {
        "name": name,
        "model": "bundled",
        "status": "done",
        "created": "2026-01-01T00:00:00+00:00",
        "updated": "2026-01-02T03:04:05+00:00",
        "budgets": [5.0],
        "other_budgets": ["3 GB"],
        "exports": 1,
    }


def test_every_command_for_servers_is_known_and_takes_only_its_own_options():
    assert set(COMMANDS) == ASKABLE
    registered = {info.name: info.callback for info in commands.registered_commands}
    for name, command in COMMANDS.items():
        assert command.takes <= set(inspect.signature(registered[name]).parameters), name


def test_list_asks_for_one_page_and_prints_the_table(run, server):
    page = {"items": [entry()], "total": 3, "next_cursor": None}
    server.answers = [Answer(200, page)]
    result = run("list", "--limit", "1")
    assert result.exit_code == 0
    assert "llama-1   done     5, 3 GB   1         2026-01-02 03:04   bundled" in result.stdout
    assert "1 of 3 studies, those worked on last" in result.stdout
    assert [asked.path for asked in server.asked] == ["/v1/studies?limit=1"]


def test_the_environment_names_the_server_and_the_token(server, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOQ_SERVER", server.url)
    monkeypatch.setenv("OURS", "autoq_abc")
    server.answers = [Answer(200, {"items": [], "next_cursor": None})]
    result = CliRunner().invoke(app, ["--token-env", "OURS", "jobs", "--status", "running"])
    assert result.stdout == f"no jobs on {server.url}\n"
    assert server.asked[0].headers["Authorization"] == "Bearer autoq_abc"
    assert server.asked[0].path == "/v1/jobs?status=running&limit=50"


def test_the_environments_server_is_no_matter_to_commands_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOQ_SERVER", "http://127.0.0.1:1")
    result = CliRunner().invoke(app, ["kernels", "list", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("show", "--store", "x.db"),
            "--store cannot be asked of a server: the server has a store",
        ),
        (("search", "m", "--bits", "5", "--trust-remote-code"), "never runs for the network"),
        (("search", "m", "--bits", "5", "--dry-run"), "--dry-run cannot be asked"),
        (("search", "m", "--bits", "5", "--draws", "2"), "--draws cannot be asked of a server"),
        (("search", "m"), "a search needs a budget"),
        (("frontier", "--max-gb", "3"), "--max-gb cannot be asked"),
        (("generate", "x", "--prompt", "a"), "`autoq generate` works on this machine only"),
        (("store", "check"), "`autoq store` works on this machine only"),
        (("search", "m", "--bits", "-1"), "effective_bits: input should be greater than 0"),
    ],
)
def test_what_a_server_does_not_take_is_refused_before_it_is_asked(run, server, arguments, said):
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert server.asked == []


@pytest.mark.parametrize("command", ["jobs", "cancel", "resume"])
def test_commands_of_servers_say_how_to_name_one(command):
    result = CliRunner().invoke(app, [command, *([] if command == "jobs" else ["x"])])
    assert result.exit_code == 2
    assert f"autoq --server URL {command}" in result.stderr


def test_detach_needs_a_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["search", "m", "--bits", "5", "--detach"])
    assert result.exit_code == 2
    assert "--detach is for a server's jobs" in result.stderr


def test_a_detached_search_sends_its_options_and_prints_the_id(run, server):
    server.answers = [Answer(202, job())]
    options = ("--bits", "5", "--formats", "nvfp4, fp8", "--rule", "a=fp8", "--no-measure")
    result = run("search", "bundled", *options, "--seed", "3", "--detach")
    assert (result.exit_code, result.stdout) == (0, "j1\n")
    assert (server.asked[0].method, server.asked[0].path) == ("POST", "/v1/studies")
    defaults = {
        "calibration_sequences": 128,
        "sequence_length": 512,
        "batch_size": 4,
        "held_out_sequences": 32,
        "dtype": "auto",
        "device": "auto",
        "calibration": "best",
        "latency_tokens": 1,
        "overwrite": False,
        "compare_uniform": False,
        "refine": 0,
    }
    assert server.asked[0].body == {
        **defaults,
        "model": "bundled",
        "effective_bits": 5.0,
        "formats": ["nvfp4", "fp8"],
        "rules": ["a=fp8"],
        "measure": False,
        "seed": 3,
    }


def test_a_job_that_fails_ends_the_command_as_its_search_would_here(run, server):
    error = BudgetInfeasibleError(2.0, 4.5, 16.0)
    failed = job(JobStatus.FAILED, problem=problem_of(error).model_dump(mode="json"))

    def route(asked):
        if asked.path.endswith("/events"):
            return Answer(200, stream((1, EventKind.STATUS, {"status": "failed"})))
        return Answer(202, job()) if asked.method == "POST" else Answer(200, failed)

    server.route = route
    result = run("search", "bundled", "--bits", "2")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["job j1 on the server", f"error: {error}"]


def test_whoever_interrupts_is_told_that_the_job_goes_on(run, server, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    server.answers = [Answer(202, job())]
    monkeypatch.setattr("autoq.client.JobHandle.result", interrupted)
    result = run("search", "bundled", "--bits", "5")
    assert result.exit_code == 130
    assert "the job goes on" in result.stderr
    assert f"`autoq --server {server.url} cancel j1` ends it" in result.stderr


def test_export_prints_what_was_written(run, server):
    written = {"path": "exports/a", "container": "modelopt", "stored_bytes": 18336, "files": []}
    finishes(server, {"study": "llama-1", "plan": 1, "export": written})
    result = run("export", "llama-1", "exports/a", "--bits", "5.5", "--container", "modelopt")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (
        "checkpoint: exports/a (modelopt, 17.91 KiB, read back and verified)\n"
    )
    posted = next(asked for asked in server.asked if asked.method == "POST")
    assert posted.path == "/v1/studies/llama-1/exports"
    assert posted.body["effective_bits"] == 5.5


VERIFIED = {
    "checkpoint": "exports/a",
    "container": "modelopt",
    "sound": True,
    "runs_in": ["vllm"],
    "faults": [],
    "layers": [
        {
            "module": "model.layers.0.mlp.up_proj",
            "stored": "fp8",
            "outcomes": {"vllm": {"does": "native", "runs": True, "reason": ""}},
        }
    ],
    "kv_cache": {
        "stored": "fp8",
        "outcomes": {"vllm": {"does": "kept", "runs": True, "reason": "scales are stored"}},
    },
}


@pytest.mark.parametrize(
    ("change", "code"),
    [({}, 0), ({"faults": ["a tensor is missing"]}, 4), ({"layers": []}, 3)],
)
def test_verify_prints_and_ends_as_it_does_here(run, server, change, code):
    finishes(server, {**VERIFIED, **change})
    result = run("verify", "exports/a")
    assert result.exit_code == code, result.stderr
    assert result.stdout.startswith("exports/a: modelopt\n")
    assert ("WRONG: a tensor is missing" in result.stdout) == (code == 4)


def test_verifys_json_is_the_jobs_result(run, server):
    finishes(server, VERIFIED)
    result = run("verify", "exports/a", "--json")
    assert json.loads(result.stdout) == VERIFIED


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("0a1b", ["/v1/jobs/0a1b/cancel"]),
        ("llama-1", ["/v1/studies/llama-1/cancel"]),
        ("cafe", ["/v1/jobs/cafe/cancel", "/v1/studies/cafe/cancel"]),  # no job, but a study
    ],
)
def test_cancel_takes_a_job_or_a_study(run, server, name, paths):
    def route(asked):
        if asked.path == "/v1/jobs/cafe/cancel":
            return Answer(404, UNKNOWN)
        return Answer(202, job(JobStatus.CANCELLING))

    server.route = route
    result = run("cancel", name)
    assert result.stdout == "job j1: cancelling\n"
    assert [asked.path for asked in server.asked] == paths


def test_the_beginning_of_a_name_is_enough_if_one_study_has_it(run, server):
    entries = [entry("llama-1"), entry("llama-2"), entry("my-llama")]

    def route(asked):
        if asked.path.startswith("/v1/studies?"):
            return Answer(200, {"items": entries, "total": 3, "next_cursor": None})
        return Answer(404, UNKNOWN) if asked.method == "GET" else Answer(202, job())

    server.route = route
    result = run("refine", "llama", "--trials", "5", "--detach")
    assert result.exit_code == 2
    assert "llama-1, llama-2; give more of the name" in result.stderr
    assert run("refine", "my", "--trials", "5", "--detach").stdout == "j1\n"
    assert server.asked[-1].path == "/v1/studies/my-llama/refinements"


def test_commands_of_this_machine_load_no_client():
    script = (
        "import sys, autoq.cli; "
        "sys.exit(', '.join({'httpx', 'pydantic', 'autoq.client'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
