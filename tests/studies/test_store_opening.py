"""Opening a store: migration, coexistence with Optuna, and refusals."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from autoq.errors import StoreError
from autoq.studies import StudyStore
from autoq.studies._schema import SCHEMA_REVISION, VERSION_TABLE, Base
from tests.studies.frozen_stores import thaw_sqlite


def table_names(path):
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {name for (name,) in rows if not name.startswith("sqlite_")}


def set_revision(path, revision):
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'")
    connection.close()


def test_migrations_create_every_table(store, store_path):
    assert table_names(store_path) == {*Base.metadata.tables, VERSION_TABLE}


def test_migrations_build_exactly_the_declared_schema(store, store_path):
    engine = create_engine(f"sqlite:///{store_path}")
    with engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_schema_is_not_tied_to_sqlite():
    tables = Base.metadata.sorted_tables
    text = "".join(
        str(CreateTable(table).compile(dialect=postgresql.dialect())) for table in tables
    )
    assert text.count("id BIGSERIAL NOT NULL") == len(tables)
    assert "started TIMESTAMP WITH TIME ZONE" in text
    assert "data BYTEA NOT NULL" in text


def test_opening_again_changes_nothing(store, store_path, make_study):
    created = make_study()
    store.close()
    for _ in range(2):
        with StudyStore.open(str(store_path)) as again:
            assert again.find("demo") == created
    with sqlite3.connect(store_path) as connection:
        rows = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()
    assert rows == [(SCHEMA_REVISION,)]


def test_sqlite_is_set_up_for_many_processes(store):
    with store._database.read() as session:
        settings = {
            name: session.connection().exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "busy_timeout", "synchronous", "foreign_keys")
        }
    normal = 1
    assert settings == {
        "journal_mode": "wal",
        "busy_timeout": 60_000,
        "synchronous": normal,
        "foreign_keys": 1,
    }


def test_url_and_path_open_the_same_store(store_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with StudyStore.open("sqlite:///autoq.db") as store:
        monkeypatch.chdir("/")
        assert store.url == f"sqlite:///{store_path}"
        assert store.list_studies() == []
    assert store_path.exists()


def test_memory_store_lives_as_long_as_it_is_open():
    with StudyStore.open("sqlite:///:memory:") as store:
        assert store.list_studies() == []


@pytest.mark.parametrize("first", ["optuna", "autoq"])
def test_optuna_keeps_its_tables_in_the_same_file(first, store_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{store_path}"

    def run_optuna():
        storage = optuna.storages.RDBStorage(url)
        trials = optuna.create_study(storage=storage, study_name="refine", load_if_exists=True)
        trials.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        storage.engine.dispose()
        return len(trials.trials)

    if first == "optuna":
        run_optuna()
    with StudyStore.open(url) as store:
        before = run_optuna()
        assert store.list_studies() == []
    with StudyStore.open(url):
        assert run_optuna() == before + 2
    assert {"alembic_version", VERSION_TABLE, "studies", "study"} <= table_names(store_path)


def test_newer_schema_is_refused_and_left_alone(store, store_path, make_study):
    make_study()
    store.close()
    set_revision(store_path, "0999")
    with pytest.raises(
        StoreError, match=rf"revision '0999', which is newer .*'{SCHEMA_REVISION}'.*upgrade autoq"
    ):
        StudyStore.open(str(store_path))
    set_revision(store_path, SCHEMA_REVISION)
    with StudyStore.open(str(store_path)) as again:
        assert again.find("demo").name == "demo"


@pytest.mark.parametrize("revision", ["0001", "0003", "0004"])
def test_a_store_is_not_upgraded_under_a_process_at_work(revision, store_path):
    """What the older version wrote after that would have no hashes, and count as damaged."""
    thaw_sqlite(revision, store_path)
    now = datetime.now(UTC)
    held = {
        "study_id": 1,
        "owner": "x",
        "host": "elsewhere",
        "pid_namespace": "",
        "pid": 77,
        "process_started": 1.0,
        "acquired": now.strftime("%Y-%m-%d %H:%M:%S.%f"),
        "heartbeat": now.strftime("%Y-%m-%d %H:%M:%S.%f"),
        "expires": (now + timedelta(hours=1)).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    with sqlite3.connect(store_path) as connection:
        connection.execute("DELETE FROM lease")
        places = ", ".join("?" * len(held))
        columns = ", ".join(held)
        connection.execute(f"INSERT INTO lease ({columns}) VALUES ({places})", [*held.values()])
    for _ in range(2):
        with pytest.raises(
            StoreError, match="while no process works on it, and process 77 on host"
        ):
            StudyStore.open(str(store_path))
    with sqlite3.connect(store_path) as connection:
        (found,) = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
        assert found == revision
        connection.execute("DELETE FROM lease")
    connection.close()
    StudyStore.open(str(store_path)).close()


def test_file_of_another_kind_is_refused_and_left_alone(store_path):
    text = "notes of mine, not a database\n" * 100
    store_path.write_text(text)
    with pytest.raises(StoreError, match=r"autoq\.db is not a SQLite database; name another file"):
        StudyStore.open(str(store_path))
    assert store_path.read_text() == text


REFUSED_PLACES = [
    pytest.param("missing/autoq.db", r"folder must exist, and .*missing does not", id="no_folder"),
    pytest.param(".", r"must be a file, and .* is a folder", id="folder"),
    pytest.param("mysql://host/autoq", r"runs on sqlite and postgresql, got 'mysql'", id="mysql"),
    pytest.param("sqlite:////\0/x", r"folder must exist|cannot be opened", id="nul"),
    pytest.param("://", r"must be a file path or a URL like sqlite:///", id="no_url"),
]


@pytest.mark.parametrize("place, message", REFUSED_PLACES)
def test_unusable_place_is_refused_in_one_line(place, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=message) as refusal:
        StudyStore.open(place)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def read_only_folder():
    """A folder that this process may not write to; root gives up its rights for the while."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_unwritable_folder_is_refused(read_only_folder):
    with pytest.raises(StoreError, match=r"cannot be opened: .*folder that you may write to"):
        StudyStore.open(str(read_only_folder / "autoq.db"))


def test_full_disk_keeps_what_was_stored(store_path, make_study, store):
    study_id = make_study().id
    store.close()

    def limit_pages(connection, _record):
        connection.execute("PRAGMA max_page_count = 200")

    with StudyStore.open(str(store_path)) as limited:
        event.listen(limited._database._engine, "connect", limit_pages)
        limited._database._engine.dispose()
        limited.put_array(study_id, "calibration", "small", np.arange(3))
        with pytest.raises(StoreError, match=r"disk is full; what was stored before is intact"):
            limited.put_array(study_id, "calibration", "large", np.zeros(1_000_000))
        assert list(limited.arrays(study_id, "calibration")) == ["small"]
