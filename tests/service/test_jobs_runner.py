"""Runners and the processes that do jobs: events, ends, deaths, limits. The jobs are stand-ins.

The stand-ins are real processes that speak as `autoq.service.jobs.job` does, without loading torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from autoq.service.jobs._lines import LONGEST_LINE, EventLines, LogLines
from autoq.service.jobs.runner import Runner, RunnerSettings
from autoq.service.jobs.runner_pool import RunnerPool
from autoq.studies import MOST_DEATHS, JobStatus, StudyStore

PATIENCE_SECONDS = 240.0

SPEAKS = """
import json, os, signal, subprocess, sys, time
from autoq.service.jobs._parents import end_with
order = json.loads(sys.stdin.buffer.read())
end_with(order["parent"])
request = order["job"]["request"]
def say(**message):
    os.write(int(sys.argv[-1]), json.dumps(message).encode() + b"\\n")
def note(text):
    say(kind="note", data={"text": text})
"""

HANGS = """
note(f"pid {os.getpid()}")
time.sleep(600)
"""

RUNNER = """
import json, signal, sys
from autoq.service.jobs.runner import Runner, RunnerSettings
runner = Runner(RunnerSettings(**json.loads(sys.argv[1])), json.loads(sys.argv[2]))
signal.signal(signal.SIGTERM, runner.stop)
runner.run()
"""


def until(condition, what):
    """Wait for what another process does; the limit is only there to end a broken test."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)
    return found


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'autoq.db'}"


@pytest.fixture
def store(url):
    with StudyStore.open(url) as opened:
        yield opened


@pytest.fixture
def add(store):
    def add_job(**request):
        return store.add_job(kind="search", request=request, created_by="ada")[0]

    return add_job


@pytest.fixture
def command(tmp_path):
    """The command of a stand-in that runs some lines."""

    def write(script):
        path = tmp_path / f"job{abs(hash(script))}.py"
        path.write_text(SPEAKS + script)
        return (sys.executable, str(path))

    return write


@pytest.fixture
def settings(url):
    def make(**options):
        roots = {"models": [], "data": [], "exports": None}
        return RunnerSettings(store=url, roots=roots, **options)

    return make


@pytest.fixture
def run_all(settings, command):
    """Do all jobs that wait, in this process."""

    def run(script, **options):
        Runner(settings(once=True, **options), command(script)).run()

    return run


@pytest.fixture
def running(settings, command):
    """A runner in a thread, for as long as the block."""

    @contextmanager
    def start(script, **options):
        runner = Runner(settings(**options), command(script))
        thread = threading.Thread(target=runner.run)
        thread.start()
        try:
            yield runner
        finally:
            runner.stop()
            thread.join()

    return start


@pytest.fixture
def runner_process(settings, command):
    """A runner in a process of its own."""
    started = []

    def start(script, **options):
        arguments = json.dumps(settings(**options).to_json()), json.dumps(command(script))
        process = subprocess.Popen([sys.executable, "-c", RUNNER, *arguments])
        started.append(process)
        return process

    yield start
    for process in started:
        process.terminate()
        process.wait()


def notes(store, job):
    return [event.data["text"] for event in store.events_after(job=job.id, kind="note")]


def log(store, job):
    return [event.data for event in store.events_after(job=job.id, kind="log")]


def pid_of(store, job, count=1):
    """The number of the process of the job's attempt, once it has said it."""

    def said():
        pids = [int(text[4:]) for text in notes(store, job) if text.startswith("pid ")]
        return pids[count - 1] if len(pids) >= count else None

    return until(said, f"the process of attempt {count} says its number")


# What is said


def test_what_a_job_says_comes_in_its_order(store, add, run_all):
    job = add(plan=7)
    run_all(
        """
for number in range(50):
    note(str(number))
progress = {"task": "scoring", "done": 3, "total": 8, "seconds_left": 1.5}
say(kind="progress", data=progress)
say(study="found")
say(result={"plan": request["plan"]})
"""
    )
    done = store.job(job.id)
    assert (done.status, done.result, done.study) == (JobStatus.DONE, {"plan": 7}, "found")
    assert done.progress["done"] == 3
    assert notes(store, job) == [str(number) for number in range(50)]
    kinds = [event.kind for event in store.events_after(job=job.id)]
    assert kinds == ["status", "status", *["note"] * 50, "progress", "status"]


def test_what_a_job_prints_is_kept_line_by_line(store, add, run_all):
    job = add()
    run_all(
        f"""
print("out")
print("x" * {LONGEST_LINE + 5}, file=sys.stderr)
sys.stderr.write("bell \\a, password postgresql://ada:secret@host/db, no end")
say(result={{}})
"""
    )
    lines = {line["text"]: line["stream"] for line in log(store, job)}
    assert lines["out"] == "stdout"
    assert lines["x" * LONGEST_LINE + " [cut]"] == "stderr"
    (last,) = [text for text in lines if text.startswith("bell")]
    assert last == "bell �, password postgresql://ada:***@host/db, no end"


def test_a_job_that_prints_too_much_loses_lines_and_nothing_else(store, add, run_all):
    job = add()
    run_all(
        """
for number in range(60_000):
    print(number)
note("said")
say(result={})
"""
    )
    assert store.job(job.id).status is JobStatus.DONE
    assert notes(store, job) == ["said"]
    lines = log(store, job)
    assert len(lines) <= 5_000
    assert any("lines were left out" in line["text"] for line in lines)


def test_a_job_sees_no_secrets_and_others_see_none_of_it(store, add, run_all, url, monkeypatch):
    monkeypatch.setenv("AUTOQ_TOKEN", "hunter2")
    monkeypatch.setenv("AUTOQ_STORE", "postgresql://ada:hunter2@host/db")
    job = add()
    run_all(
        """
secret = [name for name, value in os.environ.items() if "hunter2" in value]
say(result={"secret": secret, "argv": sys.argv[1:], "store": order["store"]})
"""
    )
    result = store.job(job.id).result
    assert result["secret"] == []
    assert result["store"] == url
    assert all(argument.isdigit() for argument in result["argv"])


def test_temporary_files_go_with_the_job(store, add, run_all):
    job = add()
    run_all(
        """
import tempfile
path = tempfile.mkdtemp()
open(path + "/left", "w").close()
say(result={"path": path})
"""
    )
    assert not os.path.exists(store.job(job.id).result["path"])


# How it ends


def test_a_problem_is_the_jobs(store, add, run_all):
    job = add()
    problem = {"type": "urn:autoq:problem:model", "title": "t", "status": 422, "detail": "why"}
    run_all(f"say(problem={problem!r}); sys.exit(1)")
    failed = store.job(job.id)
    assert (failed.status, failed.problem) == (JobStatus.FAILED, problem)


def test_an_end_without_a_word_is_told_with_what_was_printed_last(store, add, run_all):
    job = add()
    run_all("print('no such library', file=sys.stderr); sys.exit(3)")
    failed = store.job(job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.problem["detail"].endswith("exit code 3 and without a result: no such library")


def test_a_process_that_keeps_dying_is_not_begun_for_ever(store, add, run_all):
    job = add()
    run_all("note(f'pid {os.getpid()}'); os.kill(os.getpid(), signal.SIGKILL)")
    failed = store.job(job.id)
    assert (failed.status, failed.attempts) == (JobStatus.FAILED, MOST_DEATHS)
    assert "it was killed by signal 9" in failed.problem["detail"]
    assert len([text for text in notes(store, job) if text.startswith("pid")]) == MOST_DEATHS


def test_a_job_that_takes_too_much_memory_is_ended(store, add, run_all):
    job = add()
    run_all(
        """
note(f"pid {os.getpid()}")
held = bytearray(300_000_000)
held[::4096] = b"x" * len(held[::4096])
time.sleep(600)
""",
        max_job_memory=200_000_000,
    )
    failed = store.job(job.id)
    assert failed.status is JobStatus.FAILED
    assert failed.problem["type"] == "urn:autoq:problem:too-large"
    assert "0.20 GB of memory here (--max-job-memory)" in failed.problem["detail"]
    assert not is_running(pid_of(store, job))


def test_memory_of_processes_that_a_job_starts_counts(store, add, run_all):
    job = add()
    run_all(
        """
child = "held = b'x' * 300_000_000; import time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
""",
        max_job_memory=200_000_000,
    )
    assert store.job(job.id).problem["type"] == "urn:autoq:problem:too-large"


# Cancelled


def test_a_cancelled_job_is_gone_with_all_it_started(store, add, running):
    job = add()
    stubborn = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
note(f"pid {child.pid}")
note(f"pid {os.getpid()}")
time.sleep(600)
"""
    with running(stubborn):
        pids = pid_of(store, job, 1), pid_of(store, job, 2)
        assert all(map(is_running, pids))
        store.request_cancel(job.id)
        until(lambda: store.job(job.id).status.is_ended, "the job has ended")
        assert store.job(job.id).status is JobStatus.CANCELLED
        until(lambda: not any(map(is_running, pids)), "both processes are gone")


@pytest.fixture
def patient(monkeypatch):
    """A job's process that is asked to end is killed late: a busy machine may be slow to run it."""
    monkeypatch.setattr("autoq.service.jobs._process.GRACE_SECONDS", PATIENCE_SECONDS)


def test_a_job_that_is_asked_to_end_may_tidy_up(store, add, running, tmp_path, patient):
    job = add()
    tidy = f"""
def end(*_):
    open({str(tmp_path / "tidy")!r}, "w").close()
    raise SystemExit(143)
signal.signal(signal.SIGTERM, end)
{HANGS.strip()}
"""
    with running(tidy):
        pid_of(store, job)
        store.request_cancel(job.id)
        until(lambda: store.job(job.id).status.is_ended, "the job has ended")
    assert (tmp_path / "tidy").exists()


def test_what_a_job_says_while_it_is_ended_counts(store, add, running, patient):
    """It was just done: the work is not lost, nor what was said of it."""
    job = add()
    done = f"""
def end(*_):
    note("the last word")
    say(result={{"study": "s"}})
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
{HANGS.strip()}
"""
    with running(done):
        pid_of(store, job)
        store.request_cancel(job.id)
        until(lambda: store.job(job.id).status.is_ended, "the job has ended")
    assert store.job(job.id).status is JobStatus.DONE
    assert store.job(job.id).result == {"study": "s"}
    assert notes(store, job)[-1] == "the last word"


def test_the_next_job_is_done_after_a_cancelled_one(store, add, running):
    first, second = add(hang=True), add(hang=False)
    with running("note(f'pid {os.getpid()}')\nif request['hang']: time.sleep(600)\nsay(result={})"):
        pid_of(store, first)
        store.request_cancel(first.id)
        until(lambda: store.job(second.id).status.is_ended, "the second job is done")
    assert store.job(first.id).status is JobStatus.CANCELLED
    assert store.job(second.id).status is JobStatus.DONE


# Runners that end


def test_a_runner_that_is_asked_to_end_gives_its_job_back(store, add, runner_process):
    job = add()
    runner = runner_process(HANGS)
    pid = pid_of(store, job)
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(PATIENCE_SECONDS) == 0
    back = store.job(job.id)
    assert (back.status, back.attempts, back.deaths) == (JobStatus.QUEUED, 1, 0)
    assert not is_running(pid)
    assert store.live_runners() == 0


def test_a_killed_runner_takes_its_job_with_it_and_another_goes_on(store, add, runner_process):
    job = add()
    killed = runner_process(HANGS)
    first = pid_of(store, job)
    killed.kill()
    killed.wait()
    until(lambda: not is_running(first), "the job's process ended with its runner")
    runner_process("note(f'pid {os.getpid()}'); say(result={})")
    until(lambda: store.job(job.id).status is JobStatus.DONE, "another runner did the job")
    done = store.job(job.id)
    assert (done.attempts, done.deaths) == (2, 1)
    assert not list(Path(tempfile.gettempdir()).glob(f"autoq-{job.id[:12]}-*"))


def test_a_runner_whose_server_is_killed_gives_its_job_back(store, add, settings, command):
    job = add()
    script = (
        "import json, os, subprocess, sys, time\n"
        "settings = {**json.loads(sys.argv[2]), 'parent': os.getpid()}\n"
        "runner = subprocess.Popen([sys.executable, '-c', sys.argv[1], json.dumps(settings),"
        " sys.argv[3]])\n"
        "print(runner.pid, flush=True); time.sleep(600)"
    )
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            RUNNER,
            json.dumps(settings().to_json()),
            json.dumps(command(HANGS)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        runner = int(server.stdout.readline())
        pid = pid_of(store, job)
        server.kill()
        server.wait()
        until(lambda: not is_running(runner), "the runner ended without its server")
        assert store.job(job.id).status is JobStatus.QUEUED
        assert not is_running(pid)
    finally:
        server.kill()
        server.communicate()


def test_two_runners_share_one_job(store, add, runner_process):
    job = add()
    for _ in range(2):
        runner_process("note(f'pid {os.getpid()}'); time.sleep(0.5); say(result={})")
    until(lambda: store.live_runners() == 2, "both runners wait for jobs")
    until(lambda: store.job(job.id).status.is_ended, "one of them did the job")
    assert store.job(job.id).attempts == 1
    assert len(notes(store, job)) == 1


def test_a_runner_holds_no_torch():
    probe = "import sys, autoq.service.jobs.runner; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_a_job_that_cannot_be_started_is_tried_less_and_less_often(
    store, add, settings, monkeypatch
):
    """Each attempt is told, and a disk may stay full for days."""
    job = add()
    runner = Runner(settings(), ["/nowhere/at/all"])
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 8:
            runner.stop()

    monkeypatch.setattr(runner, "_sleep", sleep)
    runner.run()
    assert slept == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert store.job(job.id).status is JobStatus.QUEUED


# Lines


def test_characters_that_come_in_two_parts_are_whole():
    lines = LogLines("stdout")
    euro = "\N{EURO SIGN}".encode()
    assert lines.add(b"5 " + euro[:1]) == []
    (message,) = lines.add(euro[1:] + b"\n")
    assert message.event.data["text"] == "5 \N{EURO SIGN}"
    assert lines.add(b"cut " + euro[:2]) == []
    (last,) = lines.rest()
    assert last.event.data["text"] == "cut \N{REPLACEMENT CHARACTER}"


def test_a_line_that_is_too_long_is_left_out_whole(monkeypatch):
    monkeypatch.setattr("autoq.service.jobs._lines.LONGEST_EVENT_BYTES", 30)
    lines = EventLines()
    assert lines.add(b'{"result": {"a": "' + b"x" * 30) == []
    assert lines.add(b"x" * 40) == []
    (message,) = lines.add(b'"}}\n{"study": "next"}\n')
    assert message.study == "next"


# Pools


def test_ctrl_c_is_the_servers_alone(settings):
    """It goes to the whole group of a terminal; runners that end first would be started again."""
    with RunnerPool(settings(), 1) as pool:
        (runner,) = pool.pids
        assert os.getpgid(runner) == runner != os.getpgid(0)


def test_a_pool_starts_a_runner_again_that_died_and_ends_all(store, settings):
    with RunnerPool(settings(), 2) as pool:
        first = until(lambda: len(pool.pids) == 2 and pool.pids, "both run")
        until(lambda: store.live_runners() == 2, "both wait for jobs")
        os.kill(first[0], signal.SIGKILL)
        until(lambda: first[0] not in pool.pids and pool.alive == 2, "it is started again")
        until(lambda: store.live_runners() == 2, "it waits for jobs")
        pids = pool.pids
    assert not any(map(is_running, pids))
    assert store.live_runners() == 0


def test_runners_of_a_pool_end_when_the_server_is_killed(store, settings):
    script = (
        "import json, sys, time\n"
        "from autoq.service.jobs.runner import RunnerSettings\n"
        "from autoq.service.jobs.runner_pool import RunnerPool\n"
        "with RunnerPool(RunnerSettings(**json.loads(sys.argv[1])), 1) as pool:\n"
        "    print(*pool.pids, flush=True)\n"
        "    time.sleep(600)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(settings().to_json())],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        runner = int(server.stdout.readline())
        until(lambda: store.live_runners() == 1, "the runner waits for jobs")
        server.kill()
        server.wait()
        until(lambda: not is_running(runner), "the runner ended without its server")
    finally:
        server.kill()
        server.communicate()
        with suppress(ProcessLookupError):
            os.kill(runner, signal.SIGKILL)
