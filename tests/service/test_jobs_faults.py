"""A database server that goes away while jobs run: nothing that a job said is lost."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from autoq.service.jobs.runner import Runner, RunnerSettings
from autoq.studies import JobStatus, StudyStore
from autoq.testing.postgresql import NoServerError, postgresql_server

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 120.0

TALKS = """
import json, os, sys, time
order = json.loads(sys.stdin.buffer.read())
def say(**message):
    os.write(int(sys.argv[-1]), json.dumps(message).encode() + b"\\n")
for number in range(60):
    say(kind="note", data={"text": str(number)})
    time.sleep(0.05)
say(result={"said": 60})
"""


def until(condition, what):
    """Wait for what another process does; the limit is only there to end a broken test."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


@pytest.fixture
def server():
    pytest.importorskip("psycopg")
    try:
        with postgresql_server() as found:
            if found.restart is None:
                pytest.skip("the server is somebody else's and cannot be restarted")
            yield found
    except NoServerError as error:
        pytest.skip(str(error))


def test_a_restarted_database_costs_a_job_nothing(server, tmp_path):
    script = tmp_path / "talks.py"
    script.write_text(TALKS)
    with StudyStore.open(server.url) as store:
        job, _ = store.add_job(kind="search", request={"model": "m"}, created_by="ada")
        roots = {"models": [], "data": [], "exports": None}
        runner = Runner(
            RunnerSettings(store=server.url, roots=roots), (sys.executable, str(script))
        )
        thread = threading.Thread(target=runner.run)
        thread.start()
        try:
            until(lambda: store.events_after(job=job.id, kind="note"), "the job speaks")
            server.restart()
            with StudyStore.open(server.url) as again:
                until(lambda: again.job(job.id).status.is_ended, "the job has ended")
                done = again.job(job.id)
                assert (done.status, done.attempts) == (JobStatus.DONE, 1)
                said = [e.data["text"] for e in again.events_after(job=job.id, kind="note")]
                assert said == [str(number) for number in range(60)]
                # The runner asks the server again, and does the next job.
                second, _ = again.add_job(kind="search", request={"model": "n"}, created_by="ada")
                until(lambda: again.job(second.id).status.is_ended, "the next job is done")
        finally:
            runner.stop()
            thread.join()
