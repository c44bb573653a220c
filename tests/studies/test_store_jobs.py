"""Jobs: queued once, claimed by one process at a time, ended in every way, with their events."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from datetime import timedelta

import numpy as np
import pytest

from autoq.errors import StudyLockedError, UnknownNameError
from autoq.studies import (
    MOST_DEATHS,
    IdempotencyError,
    JobEvent,
    JobStateError,
    JobStatus,
    StudyStore,
    _clock,
)
from autoq.studies._encoding import utc_now
from autoq.studies._job_events import MOST_KEPT

REQUEST = {"model": "bundled", "effective_bits": 5.0}

CLAIM_ALL = """
import sys
from autoq.studies import StudyStore

with StudyStore.open(sys.argv[1]) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    while (claim := store.claim_job()) is not None:
        print(claim.job.id, flush=True)
        store.finish_job(claim, {"by": sys.argv[2]})
"""

CLAIM_AND_HANG = """
import sys, time
from autoq.studies import StudyStore

with StudyStore.open(sys.argv[1]) as store:
    print(store.claim_job().job.id, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def add(store):
    def add_job(number=0, **options):
        values = {"kind": "search", "created_by": "ada", **options}
        job, is_new = store.add_job(request={**REQUEST, "seed": number}, **values)
        assert is_new
        return job

    return add_job


def told(store, job, kind=None):
    return [event.data for event in store.events_after(job=job.id, kind=kind)]


def statuses(store, job):
    return [data["status"] for data in told(store, job, "status")]


# Asked for


def test_a_job_is_as_it_was_asked_for(store):
    job, is_new = store.add_job(kind="search", request=REQUEST, created_by="ada", study="demo")
    assert is_new
    assert (job.kind, job.status, job.study) == ("search", JobStatus.QUEUED, "demo")
    assert (job.request, job.created_by, job.attempts) == (REQUEST, "ada", 0)
    assert (job.started, job.finished, job.problem, job.result) == (None, None, None, None)
    assert store.job(job.id) == job
    assert statuses(store, job) == ["queued"]


def test_a_key_stands_for_one_request(store):
    first, _ = store.add_job(kind="search", request=REQUEST, created_by="a", idempotency_key="k")
    again = store.add_job(kind="search", request=REQUEST, created_by="a", idempotency_key="k")
    assert again == (first, False)
    other = {**REQUEST, "effective_bits": 6.0}
    with pytest.raises(
        IdempotencyError, match=r"'k' was given with another before .*use a new key"
    ):
        store.add_job(kind="search", request=other, created_by="a", idempotency_key="k")
    with pytest.raises(IdempotencyError):
        store.add_job(kind="refine", request=REQUEST, created_by="a", idempotency_key="k")
    with pytest.raises(IdempotencyError):
        store.add_job(
            kind="search", request=REQUEST, created_by="a", idempotency_key="k", study="other"
        )
    _, is_new = store.add_job(kind="search", request=other, created_by="b", idempotency_key="k")
    assert is_new
    assert len(store.jobs()) == 2


def test_jobs_without_keys_are_all_new(store, add):
    assert add().id != add().id


def test_an_unknown_job_is_refused(store):
    with pytest.raises(UnknownNameError, match="no job has id 'nothing'"):
        store.job("nothing")


def test_pages_and_filters(store, add):
    jobs = [add(n, kind=("search", "refine")[n % 2], study=f"study {n // 2}") for n in range(6)]
    newest_first = [job.id for job in reversed(jobs)]
    first = store.jobs(limit=4)
    rest = store.jobs(limit=4, before=first[-1].number)
    assert [job.id for job in (*first, *rest)] == newest_first
    assert [job.id for job in store.jobs(kind="refine")] == newest_first[0::2]
    assert [job.id for job in store.jobs(study="study 1")] == newest_first[2:4]
    store.request_cancel(jobs[3].id)
    assert [job.id for job in store.jobs(status="cancelled")] == [jobs[3].id]
    assert store.count_jobs()[JobStatus.QUEUED] == 5
    assert store.count_jobs()[JobStatus.CANCELLED] == 1


# Claimed


def test_jobs_are_claimed_in_their_order(store, add):
    jobs = [add(n) for n in range(2)]
    claims = [store.claim_job() for _ in range(3)]
    assert [claim.job.id for claim in claims[:2]] == [job.id for job in jobs]
    assert claims[2] is None
    claimed = claims[0].job
    assert (claimed.status, claimed.attempts) == (JobStatus.RUNNING, 1)
    assert claimed.worker.endswith(f":{os.getpid()}")
    assert claimed.started is not None


def test_one_job_of_a_study_runs_at_a_time(store, add):
    add(0, study="demo")
    second = add(1, study="demo")
    third = add(2, study="other")
    first_claim = store.claim_job()
    assert store.claim_job().job.id == third.id
    assert store.claim_job() is None
    store.finish_job(first_claim, {})
    assert store.claim_job().job.id == second.id


def test_no_more_run_than_may(store, add):
    for number in range(3):
        add(number)
    first = store.claim_job(most_running=1)
    assert store.claim_job(most_running=1) is None
    assert store.claim_job(most_running=2) is not None
    store.finish_job(first, {})
    assert store.claim_job(most_running=1) is None
    assert store.claim_job(most_running=2) is not None


def test_claimers_that_race_never_get_the_same_job(store, add, start_child):
    jobs = {add(number).id for number in range(40)}
    children = [start_child(CLAIM_ALL, number) for number in range(3)]
    for child in children:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
    claimed = []
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        output, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
        claimed += output.split()
    assert len(claimed) == len(jobs)
    assert set(claimed) == jobs
    assert {job.attempts for job in store.jobs()} == {1}


# At work


def test_events_come_in_order_and_after_the_last_one_seen(store, add):
    job = add()
    claim = store.claim_job()
    events = [JobEvent(kind="note", data={"text": str(n)}) for n in range(5)]
    store.append_events(claim, events[:3])
    seen = store.events_after(job=job.id)
    store.append_events(claim, events[3:])
    new = store.events_after(seen[-1].id, job=job.id)
    assert [event.data["text"] for event in new] == ["3", "4"]
    ids = [event.id for event in (*seen, *new)]
    assert ids == sorted(set(ids))
    assert store.newest_event() == ids[-1]
    assert store.events_after(ids[-1]) == []


def test_events_of_a_study_are_those_of_its_jobs(store, add):
    one, other, third = add(0, study="demo"), add(1), add(2, study="demo")
    found = store.events_after(study="demo")
    assert [event.job for event in found] == [one.id, third.id]
    assert [event.job for event in store.events_after(limit=2)] == [one.id, other.id]


def test_what_is_known_while_it_runs_is_in_the_job(store, add):
    add()
    claim = store.claim_job()
    progress = {"task": "scoring", "done": 1, "total": 8, "seconds_left": 3.5}
    store.append_events(claim, [JobEvent(kind="progress", data=progress)], progress=progress)
    store.append_events(claim, [], study="found")
    job = store.job(claim.job.id)
    assert (job.progress, job.study) == (progress, "found")


def test_old_log_lines_go_and_what_matters_stays(store, add, monkeypatch):
    monkeypatch.setitem(MOST_KEPT, "log", 10)
    job = add()
    claim = store.claim_job()
    for start in range(0, 30, 6):
        lines = [JobEvent(kind="log", data={"text": str(n)}) for n in range(start, start + 6)]
        store.append_events(claim, [JobEvent(kind="note", data={"text": "kept"}), *lines])
    assert [data["text"] for data in told(store, job, "log")] == [str(n) for n in range(20, 30)]
    assert len(told(store, job, "note")) == 5


def test_ids_of_events_that_went_are_not_given_again(store, add, store_path):
    add()
    last = store.newest_event()
    with closing(sqlite3.connect(store_path)) as connection, connection:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("DELETE FROM job")
        assert connection.execute("SELECT count(*) FROM job_event").fetchone() == (0,)
    job = add(1)
    assert store.events_after(last, job=job.id)


# Ended


def test_a_job_ends_with_its_result(store, add):
    job = add()
    done = store.finish_job(store.claim_job(), {"plan": 3, "loss": float("nan")})
    assert (done.status, done.result) == (JobStatus.DONE, {"plan": 3, "loss": None})
    assert done.finished is not None
    assert statuses(store, job) == ["queued", "running", "done"]


def test_a_job_that_failed_says_why_and_is_resumed(store, add):
    job = add()
    problem = {"type": "urn:autoq:problem:model", "title": "t", "status": 422, "detail": "why"}
    failed = store.fail_job(store.claim_job(), problem)
    assert (failed.status, failed.problem) == (JobStatus.FAILED, problem)
    assert told(store, job, "status")[-1] == {"status": "failed", "problem": problem}
    resumed = store.resume_job(job.id)
    assert (resumed.status, resumed.problem, resumed.finished) == (JobStatus.QUEUED, None, None)
    assert store.claim_job().job.attempts == 2


def test_a_job_that_nobody_began_is_cancelled_at_once(store, add):
    job = add()
    assert store.request_cancel(job.id).status is JobStatus.CANCELLED
    assert store.claim_job() is None
    assert statuses(store, job) == ["queued", "cancelled"]


def test_a_running_job_is_told_to_stop(store, add):
    job = add()
    claim = store.claim_job()
    assert store.job_status(claim) is JobStatus.RUNNING
    assert store.request_cancel(job.id).status is JobStatus.CANCELLING
    assert store.request_cancel(job.id).status is JobStatus.CANCELLING  # asked twice
    assert store.job_status(claim) is JobStatus.CANCELLING
    assert store.heartbeat_job(claim) is JobStatus.CANCELLING
    assert store.end_cancelled_job(claim).status is JobStatus.CANCELLED
    assert statuses(store, job) == ["queued", "running", "cancelling", "cancelled"]
    assert store.resume_job(job.id).status is JobStatus.QUEUED


def test_what_has_ended_cannot_be_cancelled_nor_what_runs_resumed(store, add):
    job = add()
    with pytest.raises(JobStateError, match="is queued"):
        store.resume_job(job.id)
    store.finish_job(store.claim_job(), {})
    with pytest.raises(JobStateError, match="is done"):
        store.request_cancel(job.id)
    with pytest.raises(JobStateError, match="is done"):
        store.resume_job(job.id)


def test_a_job_that_is_given_back_waits_again(store, add):
    job = add()
    back = store.give_back_job(store.claim_job())
    assert (back.status, back.attempts, back.deaths) == (JobStatus.QUEUED, 1, 0)
    assert store.claim_job().job.id == job.id


def test_a_job_that_is_given_back_while_it_is_cancelled_ends(store, add):
    job = add()
    claim = store.claim_job()
    store.request_cancel(job.id)
    assert store.give_back_job(claim).status is JobStatus.CANCELLED


# Dead


def test_the_job_of_a_killed_runner_is_taken_over_at_once(store, add, start_child):
    job = add()
    child = start_child(CLAIM_AND_HANG)
    assert child.stdout.readline().strip() == job.id, child.stderr.read()
    assert store.claim_job() is None
    child.kill()
    child.wait()
    taken = store.claim_job()
    assert (taken.job.id, taken.job.attempts, taken.job.deaths) == (job.id, 2, 1)
    assert statuses(store, job) == ["queued", "running", "queued", "running"]


def test_the_job_of_a_killed_runner_that_was_to_be_cancelled_ends(store, add, start_child):
    job = add()
    child = start_child(CLAIM_AND_HANG)
    child.stdout.readline()
    store.request_cancel(job.id)
    child.kill()
    child.wait()
    assert store.claim_job() is None
    assert store.job(job.id).status is JobStatus.CANCELLED


def test_a_job_that_kills_its_runners_is_failed(store, add, start_child):
    job = add()
    for _ in range(MOST_DEATHS):
        child = start_child(CLAIM_AND_HANG)
        child.stdout.readline()
        child.kill()
        child.wait()
    assert store.claim_job() is None
    failed = store.job(job.id)
    assert (failed.status, failed.deaths) == (JobStatus.FAILED, MOST_DEATHS)
    assert "died 3 times" in failed.problem["detail"]
    assert store.resume_job(job.id).deaths == 0


def test_a_process_that_died_counts_as_a_death(store, add):
    job = add()
    for _ in range(MOST_DEATHS - 1):
        died = store.record_death(store.claim_job(), "it was killed by signal 9")
        assert died.status is JobStatus.QUEUED
    died = store.record_death(store.claim_job(), "it was killed by signal 9")
    assert died.status is JobStatus.FAILED
    assert "it was killed by signal 9" in store.job(job.id).problem["detail"]


def test_who_lost_a_job_cannot_write_into_it(store, add, store_path):
    job = add()
    lost = store.claim_job(lease_seconds=0.0)  # over at once, though its process lives
    taken = store.claim_job()
    assert taken.job.id == job.id
    for write in (
        lambda: store.append_events(lost, [JobEvent(kind="note", data={})]),
        lambda: store.finish_job(lost, {}),
        lambda: store.fail_job(lost, {}),
        lambda: store.end_cancelled_job(lost),
        lambda: store.give_back_job(lost),
        lambda: store.record_death(lost, "it died"),
        lambda: store.job_status(lost),
        lambda: store.heartbeat_job(lost),
    ):
        with pytest.raises(StudyLockedError, match="no longer holds its job"):
            write()
    assert store.job(job.id).status is JobStatus.RUNNING
    store.finish_job(taken, {})


@pytest.mark.parametrize("jump", [timedelta(days=-400), timedelta(days=400)])
def test_a_clock_that_is_set_neither_ends_nor_prolongs_a_claim(store, add, monkeypatch, jump):
    job = add()
    monkeypatch.setattr(_clock, "boot_id", lambda: "the machine has one")
    claim = store.claim_job()
    monkeypatch.setattr(_clock, "utc_now", lambda: utc_now() + jump)
    assert store.claim_job() is None
    store.finish_job(claim, {})
    add(1)
    store.claim_job(lease_seconds=0.0)
    taken = store.claim_job()
    assert taken is not None
    assert taken.job.id != job.id


# Runners


def test_runners_that_live_are_counted(store, start_child):
    assert store.live_runners() == 0
    store.note_runner("here")
    store.note_runner("here")
    store.note_runner("silent", lease_seconds=0.0)
    assert store.live_runners() == 1
    child = start_child(
        "import sys, time; from autoq.studies import StudyStore\n"
        "StudyStore.open(sys.argv[1]).note_runner('child'); print('noted', flush=True)\n"
        "time.sleep(600)"
    )
    assert child.stdout.readline() == "noted\n", child.stderr.read()
    assert store.live_runners() == 2
    child.kill()
    child.wait()
    assert store.live_runners() == 1
    store.forget_runner("here")
    assert store.live_runners() == 0


# Studies that go


def test_a_deleted_study_leaves_nothing_but_its_jobs(store, study_id, add, store_path):
    job = add(0, study="demo")
    store.finish_job(store.claim_job(), {})
    store.begin_stage(study_id, "calibration")
    store.put_array(study_id, "calibration", "scale", np.ones(4))
    store.delete_study(study_id)
    assert store.list_studies() == []
    assert store.job(job.id).study is None
    with closing(sqlite3.connect(store_path)) as connection:
        for table in ("stage", "stored_array", "blob", "blob_chunk"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    with pytest.raises(UnknownNameError, match=f"no study has id {study_id}"):
        store.delete_study(study_id)


def test_arrays_that_another_study_has_too_stay(store, study_id, make_study):
    other = make_study("other", "b" * 64).id
    for each in (study_id, other):
        store.begin_stage(each, "calibration")
        store.put_array(each, "calibration", "scale", np.ones(4))
    store.delete_study(study_id)
    assert np.array_equal(store.get_array(other, "calibration", "scale"), np.ones(4))


def test_a_study_at_work_is_not_deleted(store, study_id, add, store_path):
    with (
        store.lease(study_id),
        StudyStore.open(str(store_path)) as second,
        pytest.raises(StudyLockedError, match="'demo' is held by process"),
    ):
        second.delete_study(study_id)
    job = add(0, study="demo")
    with pytest.raises(JobStateError, match=f"job {job.id} of 'demo' is queued; cancel it first"):
        store.delete_study(study_id)
    store.request_cancel(job.id)
    store.delete_study(study_id)
