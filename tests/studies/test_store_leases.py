"""One process at a time works on a study."""

from __future__ import annotations

import os
import sqlite3
import time
from datetime import timedelta

import numpy as np
import pytest

from autoq.errors import StudyLockedError
from autoq.studies import StudyStore, WorkStatus, _clock
from autoq.studies._encoding import utc_now
from autoq.studies._leases import process_started

HOLD = """
import sys
from autoq.studies import StudyStore

with StudyStore.open(sys.argv[1]) as store, store.lease(int(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def leases(path):
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT pid FROM lease").fetchall()


def alter_lease(path, assignment):
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE lease SET {assignment}")
    connection.close()


def held_by_child(start_child, study_id):
    child = start_child(HOLD, study_id)
    assert child.stdout.readline() == "held\n", child.stderr.read()
    return child


def test_lease_is_given_back(store, study_id, store_path):
    with store.lease(study_id):
        assert leases(store_path) == [(os.getpid(),)]
    assert leases(store_path) == []


def test_a_study_whose_process_is_gone_is_interrupted(store, study_id, start_child):
    def state():
        (found,) = store.list_studies()
        return found.status.value, found.is_held, found.is_interrupted

    assert state() == ("todo", False, False)
    child = held_by_child(start_child, study_id)
    store.begin_stage(study_id, "calibration")
    assert state() == ("running", True, False)
    child.kill()
    child.wait()
    assert state() == ("running", False, True)
    store.set_status(study_id, WorkStatus.DONE)
    assert state() == ("done", False, False)


def test_lease_is_given_back_after_an_error(store, study_id, store_path):
    with pytest.raises(ZeroDivisionError), store.lease(study_id):
        raise ZeroDivisionError
    assert leases(store_path) == []


def test_refusal_names_study_process_host_time_and_remedy(store, study_id, start_child):
    child = held_by_child(start_child, study_id)
    refusal = (
        rf"'demo' is held by process {child.pid} on host .+ since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC; "
        r"wait until it ends or stop it, then run again \(without a sign of life its hold ends 20"
    )
    with pytest.raises(StudyLockedError, match=refusal) as caught, store.lease(study_id):
        pass
    assert "\n" not in str(caught.value)


def test_waiting_gets_the_lease_when_the_other_ends(store, study_id, start_child, store_path):
    child = held_by_child(start_child, study_id)
    child.stdin.write("end\n")
    child.stdin.flush()
    with store.lease(study_id, wait_seconds=30):
        assert leases(store_path) == [(os.getpid(),)]


def test_waiting_in_vain_says_how_long(store, study_id):
    begun = time.monotonic()
    refusal = r"'demo' is still held after 0\.3 s by process"
    with (
        store.lease(study_id),
        pytest.raises(StudyLockedError, match=refusal),
        store.lease(study_id, wait_seconds=0.3),
    ):
        pass
    assert time.monotonic() - begun >= 0.3


def test_killed_process_loses_its_lease_at_once(store, study_id, start_child, store_path):
    child = held_by_child(start_child, study_id)
    child.kill()  # not waited for: a zombie counts as dead
    with store.lease(study_id, wait_seconds=10):
        assert leases(store_path) == [(os.getpid(),)]


def test_process_with_a_reused_number_does_not_hold_the_lease(store, study_id, store_path):
    with store.lease(study_id):
        alter_lease(store_path, "process_started = process_started - 1")
        with store.lease(study_id) as second:
            second.heartbeat()


def test_dead_process_number_on_another_host_says_nothing(store, study_id, store_path):
    with store.lease(study_id):
        alter_lease(store_path, "host = 'elsewhere', process_started = 0")
        with pytest.raises(StudyLockedError, match="on host elsewhere"), store.lease(study_id):
            pass


def test_lease_without_heartbeat_runs_out_and_its_holder_notices(store, study_id, store_path):
    with store.lease(study_id, lease_seconds=0.05) as first:
        time.sleep(0.1)
        lost = pytest.raises(StudyLockedError, match="no longer holds its study")
        with store.lease(study_id), lost:
            first.heartbeat()
        assert leases(store_path) == []


def test_heartbeat_keeps_the_lease(store, study_id, store_path):
    with store.lease(study_id) as first:
        over = "expires_uptime = 0, expires = '2000-01-01 00:00:00.000000'"
        alter_lease(store_path, f"host = 'elsewhere', {over}")
        first.heartbeat()
        with pytest.raises(StudyLockedError, match="on host elsewhere"), store.lease(study_id):
            pass


def test_studies_are_leased_one_by_one(store, make_study):
    one, two = make_study(name="one", key="1" * 64), make_study(name="two", key="2" * 64)
    with store.lease(one.id), store.lease(two.id):
        pass


def test_two_openings_in_one_process_exclude_each_other(store, study_id, store_path):
    refused = pytest.raises(StudyLockedError, match=f"held by process {os.getpid()} ")
    with (
        StudyStore.open(str(store_path)) as other,
        store.lease(study_id),
        refused,
        other.lease(study_id),
    ):
        pass


def test_start_time_tells_processes_apart(start_child):
    child = start_child("import sys; sys.stdin.readline()")
    own = process_started(os.getpid())
    assert own is not None and process_started(os.getpid()) == own
    assert process_started(child.pid) > own
    child.kill()
    child.wait()
    assert process_started(child.pid) is None


@pytest.mark.parametrize("hours", [-48, 48])
def test_setting_the_clock_neither_ends_nor_steals_a_lease(
    hours, store, study_id, store_path, monkeypatch
):
    with store.lease(study_id) as first:
        alter_lease(store_path, "host = 'elsewhere'")  # so that only time can tell
        wrong = utc_now() + timedelta(hours=hours)
        monkeypatch.setattr(_clock, "utc_now", lambda: wrong)
        with pytest.raises(StudyLockedError, match="on host elsewhere"), store.lease(study_id):
            pass
        first.heartbeat()


@pytest.mark.parametrize("hours", [-48, 0, 48])
def test_a_lease_without_sign_of_life_ends_whatever_the_clock_says(
    hours, store, study_id, store_path, monkeypatch
):
    with store.lease(study_id, lease_seconds=0.05):
        alter_lease(store_path, "host = 'elsewhere'")
        wrong = utc_now() + timedelta(hours=hours)
        monkeypatch.setattr(_clock, "utc_now", lambda: wrong)
        with store.lease(study_id, wait_seconds=30):
            pass


def test_a_lease_of_before_the_machine_started_ends_by_the_time_of_day(store, study_id, store_path):
    with store.lease(study_id, lease_seconds=0.05):
        alter_lease(store_path, "host = 'elsewhere', boot_id = 'earlier', expires_uptime = 1e12")
        with store.lease(study_id, wait_seconds=30):
            pass


def test_who_hung_while_another_took_the_study_over_writes_nothing_more(
    store, study_id, store_path
):
    """Not after its next heartbeat: in the transaction of the write itself."""
    with (
        StudyStore.open(str(store_path)) as other,
        store.lease(study_id, lease_seconds=0.05),
    ):
        store.begin_stage(study_id, "calibration")
        writes = [
            lambda: store.put_array(study_id, "calibration", "x", np.ones(2)),
            lambda: store.put_score_batch(study_id, 0, np.ones(2), 0.1),
            lambda: store.finish_stage(study_id, "calibration", 1.0),
            lambda: store.reset_stage(study_id, "calibration"),
            lambda: store.set_status(study_id, WorkStatus.DONE),
        ]
        with other.lease(study_id, wait_seconds=30):
            for write in writes:
                with pytest.raises(StudyLockedError, match="another process took the study over"):
                    write()
            other.put_array(study_id, "calibration", "x", np.zeros(2))
            assert other.get_array(study_id, "calibration", "x").tolist() == [0.0, 0.0]
            assert other.score_batches(study_id) == {}
    store.set_status(study_id, WorkStatus.DONE)  # nobody has it now
