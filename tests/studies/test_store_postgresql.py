"""The store in a real PostgreSQL: migrations of frozen databases, blobs, leases, clocks."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import sqlalchemy

from autoq.errors import StoreError, StudyLockedError
from autoq.search import Plan
from autoq.studies import StudyStore, _clock, maintenance, trial_storage
from autoq.studies._blobs import put_blob
from autoq.studies._encoding import encode_array
from autoq.studies._migrate import upgrade_schema
from autoq.studies._schema import SCHEMA_REVISION, VERSION_TABLE, ArrayRow, StudyRow
from autoq.studies._seals import sealed
from autoq.testing.postgresql import NoServerError, postgresql_url
from tests.studies.frozen_stores import (
    REVISIONS,
    check_contents,
    contents,
    migrate,
    schema_differences,
    thaw_postgresql,
    thaw_sqlite,
)

pytestmark = pytest.mark.slow

PLAN = Plan(
    assignment={"layers.0.qkv": "nvfp4"},
    budget_bits=4.8,
    effective_bits=4.75,
    peer_effective_bits=4.25,
    stored_bits_per_weight=4.8125,
    stored_bytes=123,
    predicted_loss=0.0123,
    predicted_loss_interval=(0.01, 0.015),
    bound=0.0122,
    gap=0.008,
)


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("psycopg")
    try:
        with postgresql_url() as url:
            yield url
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def schema(server, request):
    name = f"t{abs(hash(request.node.name)) % 10**8}"
    engine = sqlalchemy.create_engine(server)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"CREATE SCHEMA {name}"))
    yield name
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(f"DROP SCHEMA {name} CASCADE"))
    engine.dispose()


@pytest.fixture
def url(server, schema):
    return f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{schema}"


@pytest.fixture
def store(url):
    with StudyStore.open(url) as opened:
        yield opened


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_frozen_database_opens_with_everything_in_it(revision, server, url, schema):
    thaw_postgresql(revision, server, schema)
    check_contents(revision, url)
    assert schema_differences(url) == []


@pytest.mark.parametrize("revision", REVISIONS)
def test_up_and_down_again_gives_the_frozen_rows(revision, server, url, schema):
    thaw_postgresql(revision, server, schema)
    before = contents(url)
    migrate(url, SCHEMA_REVISION)
    migrate(url, revision)
    assert contents(url) == before


@pytest.mark.parametrize("revision", [None, "0004"], ids=["new", "0004"])
def test_a_process_that_opens_while_another_upgrades_waits_for_it(revision, server, url, schema):
    if revision is not None:
        thaw_postgresql(revision, server, schema)
    waiting = sqlalchemy.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    engine = sqlalchemy.create_engine(url)
    with ThreadPoolExecutor(1) as pool:
        with engine.begin() as first, engine.connect() as watching:
            upgrade_schema(first, "the store")
            second = pool.submit(lambda: StudyStore.open(url).close())
            while not watching.scalar(waiting):
                assert not second.done()
                time.sleep(0.01)
        second.result()
    engine.dispose()
    assert schema_differences(url) == []


def test_newer_schema_is_refused_in_one_sentence(store, url):
    with store._database.write() as session:
        session.execute(sqlalchemy.text(f"UPDATE {VERSION_TABLE} SET version_num = '0999'"))
    with pytest.raises(
        StoreError, match=r"revision '0999', which is newer .*upgrade autoq"
    ) as refusal:
        StudyStore.open(url)
    assert "\n" not in str(refusal.value)


def test_processes_that_store_the_same_blob_at_once_all_succeed(url, store, make_study):
    studies = [make_study(name=f"s{n}", key=f"{n}" * 64) for n in range(4)]
    array, failures = np.arange(100_000.0), []

    def put(study):
        try:
            with StudyStore.open(url) as own:
                for _ in range(5):
                    own.put_array(study.id, "calibration", "x", array)
                    own.reset_stage(study.id, "calibration")
                own.put_array(study.id, "calibration", "x", array)
        except Exception as error:  # noqa: BLE001  whatever it is, the test fails
            failures.append(error)

    threads = [threading.Thread(target=put, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for study in studies:
        assert np.array_equal(store.get_array(study.id, "calibration", "x"), array)


def test_a_read_sees_one_state_of_the_database(store, make_study):
    count = sqlalchemy.select(sqlalchemy.func.count()).select_from(StudyRow)
    with store._database.read() as session:
        assert session.scalar(count) == 0
        make_study()
        assert session.scalar(count) == 0
    with store._database.read() as session:
        assert session.scalar(count) == 1


def test_vacuum_leaves_what_another_process_begins_to_use(store, url, study_id):
    array = np.arange(9.0)
    with store._database.write() as session:
        unused = put_blob(session, encode_array(array))
    waiting = sqlalchemy.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with ThreadPoolExecutor(1) as pool:
        with store._database.write() as session:
            row = {"study_id": study_id, "stage": "calibration", "name": "x"}
            row |= {"dtype": "<f8", "shape": [9], "sha256": unused}
            session.execute(sqlalchemy.insert(ArrayRow), [sealed(ArrayRow, row)])
            vacuumed = pool.submit(maintenance.vacuum, url)
            end = time.monotonic() + 60
            while not session.scalar(waiting) and not vacuumed.done():
                assert time.monotonic() < end
                time.sleep(0.01)
        assert vacuumed.result().unused_blobs == 0
    assert np.array_equal(store.get_array(study_id, "calibration", "x"), array)


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_machine_whose_clock_is_wrong_neither_loses_nor_steals_a_lease(
    hours, store, url, study_id, monkeypatch
):
    with store.lease(study_id) as lease, StudyStore.open(url) as other:
        as_elsewhere(store)
        wrong = _clock.utc_now() + timedelta(hours=hours)
        monkeypatch.setattr(_clock, "utc_now", lambda: wrong)
        refused = pytest.raises(StudyLockedError, match="on host elsewhere")
        with refused, other.lease(study_id):
            pass
        lease.heartbeat()


def test_a_lease_ends_by_the_servers_clock(store, url, study_id, monkeypatch):
    with store.lease(study_id, lease_seconds=0.05) as first, StudyStore.open(url) as other:
        as_elsewhere(store)
        with other.lease(study_id, wait_seconds=30):
            with pytest.raises(StudyLockedError, match="took the study over"):
                first.heartbeat()
            with pytest.raises(StudyLockedError, match="took the study over"):
                store.begin_stage(study_id, "calibration")
            other.begin_stage(study_id, "calibration")


def as_elsewhere(store):
    """Let the lease be that of another machine, of whose processes nothing is known here."""
    with store._database.write() as session:
        session.execute(sqlalchemy.text("UPDATE lease SET host = 'elsewhere'"))


def test_a_study_goes_through_postgresql_and_comes_back_as_the_same_bytes(url, tmp_path):
    thaw_sqlite(REVISIONS[-1], tmp_path / "home.db")
    one, two = tmp_path / "one.autoq", tmp_path / "two.autoq"
    with StudyStore.open(str(tmp_path / "home.db")) as home:
        home.export(1, one)
    with StudyStore.open(url) as store:
        store.export(store.find(store.import_file(one)).id, two)
    assert two.read_bytes() == one.read_bytes()
    check_database_is_sound(url)
    with StudyStore.open(str(tmp_path / "new.db")) as new:
        new.export(new.find(new.import_file(two)).id, tmp_path / "three.autoq")
    assert (tmp_path / "three.autoq").read_bytes() == one.read_bytes()


def check_database_is_sound(url):
    assert maintenance.check(url) == []
    assert maintenance.vacuum(url).unused_blobs == 0
    assert maintenance.check(url) == []


def test_threads_that_open_their_trials_at_the_same_instant_share_them(url):
    together = threading.Barrier(6)

    def opened(_):
        together.wait()
        return len(trial_storage(url).get_all_studies())

    with StudyStore.open(url), ThreadPoolExecutor(6) as pool:
        assert list(pool.map(opened, range(6))) == [0] * 6


def test_an_export_that_two_processes_end_at_once_ends_once(url, store, study_id):
    """Its row's seal is of all columns: each would write the one of its own half."""
    plan_id = store.add_plan(study_id, PLAN, label="4.8")
    export_id = store.begin_export(study_id, plan_id=plan_id, container="x", path="out")
    waiting = sqlalchemy.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with ThreadPoolExecutor(1) as pool, StudyStore.open(url) as other:
        with store._database.write() as session:
            row = store._export_in_progress(session, export_id)
            late = pool.submit(other.fail_export, export_id, "late")
            with store._database.read() as watching:
                while not watching.scalar(waiting):
                    assert not late.done()
                    time.sleep(0.01)
            row.status, row.bytes_written = "complete", 7
        with pytest.raises(StoreError, match=f"export {export_id} to out is complete"):
            late.result()
    (export,) = store.exports(study_id)
    assert (export.status, export.bytes_written) == ("complete", 7)
    assert maintenance.check(url) == []


def test_who_deletes_a_study_does_not_stand_in_the_way_of_who_works_on_it(url, store, study_id):
    """Both lock the lease and the study: in another order each would wait for the other."""
    waiting = sqlalchemy.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    with store.lease(study_id), ThreadPoolExecutor(1) as pool, StudyStore.open(url) as other:
        with store._database.write() as session:
            store._refuse_lost_lease(session, study_id)
            deleted = pool.submit(other.delete_study, study_id)
            with store._database.read() as watching:
                while not watching.scalar(waiting):
                    assert not deleted.done()
                    time.sleep(0.01)
            store._touched(session, study_id)
        with pytest.raises(StudyLockedError, match="when no process works on it"):
            deleted.result()
