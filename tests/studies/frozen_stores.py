"""Databases as each released schema left them, and what has to be in them today."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, event, text

from autoq.studies import SCORING_STAGE, StudyStore, _migrate
from autoq.studies._schema import VERSION_TABLE, Base

FROZEN = Path(__file__).parent / "frozen"

REVISIONS = sorted(path.name.split(".")[0][-4:] for path in FROZEN.glob("*.sqlite.sql"))
"""Every schema that was released."""


def thaw_sqlite(revision, path):
    """Make the SQLite file that the revision left."""
    connection = sqlite3.connect(path)
    connection.executescript((FROZEN / f"revision_{revision}.sqlite.sql").read_text())
    connection.close()


def thaw_postgresql(revision, url, schema):
    """Make the tables that the revision left, in a schema of the database."""
    dump = (FROZEN / f"revision_{revision}.postgresql.sql").read_text()
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in dump.replace("public.", f"{schema}.").split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    engine.dispose()


def check_contents(revision, url):
    """What `frozen/freeze.py` (and, for 0001, what came before it) put in is there, in today's terms."""
    with StudyStore.open(url) as store:
        study = store.find("llama-1a2b")
        assert study.configuration["formats"] == ["fp8", "nvfp4"]
        (plan,) = store.plans(study.id)
        assert (plan.label, plan.effective_bits) == ("4.8 bits", 4.75)
        assert plan.assignment == {"layers.0.qkv": "nvfp4", "layers.0.mlp": "fp8"}
        (measurement,) = store.measurements(study.id)
        assert (measurement.plan_id, measurement.value) == (plan.id, 0.03125)
        # Found again under its old hash, not stored twice.
        assert store.add_plan(study.id, plan.to_plan(), label="4.8 bits") == plan.id
        if revision > "0001":
            check_arrays_and_exports(store, study, plan)
        if revision > "0003":
            check_jobs(store)


def check_arrays_and_exports(store, study, plan):
    assert plan.takes == {"stored_bytes": 123456.0}
    arrays = store.arrays(study.id, "calibration")
    assert list(arrays) == ["scale", "same as scale", "codes"]
    scale = np.array([0.5, -0.0, np.nan], dtype=np.float32)
    assert arrays["scale"].tobytes() == arrays["same as scale"].tobytes() == scale.tobytes()
    assert np.array_equal(arrays["codes"], np.arange(4096, dtype=np.uint8).reshape(16, 256))
    batches = store.score_batches(study.id)
    assert {n: float(batch[0, 0, 0]) for n, batch in batches.items()} == {0: 0.0, 1: 0.25}
    cells = {(cell.group, cell.format): cell.score for cell in store.sensitivity(study.id)}
    assert cells == {("layers.0.qkv", "fp8"): 0.125, ("layers.0.mlp", "fp8"): None}
    assert [stage.name for stage in store.stages(study.id)] == ["calibration", SCORING_STAGE]
    (export,) = store.exports(study.id)
    assert [(file.path, file.size_bytes) for file in export.files] == [("model.safetensors", 99)]
    working = store.find("working")
    with store.lease(working.id):  # its holder's time is over
        pass


def check_jobs(store):
    waiting, dead, done = store.jobs()
    states = [(job.status.value, job.attempts, job.study) for job in (waiting, dead, done)]
    assert states == [("queued", 0, None), ("running", 1, None), ("done", 1, "llama-1a2b")]
    assert (done.result, done.progress["done"]) == ({"plan": 1}, 3)
    told = [(event.kind, event.job) for event in store.events_after(job=done.id)]
    kinds = ("status", "status", "progress", "log", "status")
    assert told == [(kind, done.id) for kind in kinds]
    again = store.add_job(
        kind="search", request=waiting.request, created_by="ada", idempotency_key="key 2"
    )
    assert again == (waiting, False)
    assert store.live_runners() == 0
    taken = store.claim_job()  # its runner died
    assert (taken.job.id, taken.job.attempts, taken.job.deaths) == (dead.id, 2, 1)


def migrate(url, to):
    """Bring a database to a revision, up or down."""
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _as_the_store_does)
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with engine.begin() as connection:
        config = _migrate._configuration(connection)
        newer = to != "base" and (_migrate.schema_revision(connection) or "") < to
        (command.upgrade if newer else command.downgrade)(config, to)
    engine.dispose()


def _as_the_store_does(connection, _record):
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")


def contents(url):
    """Table -> its columns and its rows."""
    engine = create_engine(url)
    with engine.connect() as connection:
        names = [name for name in _tables(connection) if name in {*Base.metadata.tables}]
        found = {}
        for name in names:
            result = connection.execute(text(f'SELECT * FROM "{name}" ORDER BY id'))
            found[name] = (sorted(result.keys()), [_plain(row) for row in result.mappings()])
    engine.dispose()
    return found


def _tables(connection):
    from sqlalchemy import inspect

    return sorted(inspect(connection).get_table_names())


def _plain(row):
    return {
        key: bytes(value) if isinstance(value, memoryview) else value for key, value in row.items()
    }


def schema_differences(url):
    """What autogenerate would write into a new migration."""
    engine = create_engine(url)
    with engine.connect() as connection:
        options = {
            "version_table": VERSION_TABLE,
            "compare_type": True,
            # PostgreSQL cannot compare a default of JSON.
            "compare_server_default": engine.dialect.name == "sqlite",
        }
        context = MigrationContext.configure(connection, opts=options)
        found = compare_metadata(context, Base.metadata)
    engine.dispose()
    return found
