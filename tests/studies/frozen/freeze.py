"""Writes the frozen databases of the newest schema: run once, when a schema is released.

    python tests/studies/frozen/freeze.py

leaves `revision_NNNN.sqlite.sql` and `revision_NNNN.postgresql.sql` here: a store with rows in
every table, as SQLite and as `pg_dump` write it. What is there already is never written again: the
files say what earlier versions left behind, and tests open them with the code of today.
PostgreSQL's needs `pg_dump` of the server that `autoq.testing.postgresql` starts.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from sqlalchemy import make_url, update

from autoq.search import Plan, Resource
from autoq.studies import SCORING_STAGE, JobEvent, SensitivityCell, StudyStore, WorkStatus
from autoq.studies._schema import VERSION_TABLE, JobLeaseRow, JobRow, LeaseRow, RunnerRow
from autoq.testing.postgresql import postgresql_url

HERE = Path(__file__).parent

PLAN = Plan(
    assignment={"layers.0.qkv": "nvfp4", "layers.0.mlp": "fp8"},
    budget_bits=4.8,
    effective_bits=4.75,
    peer_effective_bits=4.25,
    stored_bits_per_weight=4.8125,
    stored_bytes=123_456,
    predicted_loss=0.0123,
    predicted_loss_interval=(0.01, 0.015),
    bound=0.0122,
    gap=0.008,
    takes={Resource.STORED_BYTES: 123_456.0},
)


def fill(store: StudyStore) -> None:
    """A study that is done and has a row in every table, and one that is being worked on."""
    study = store.create_or_get(
        name="llama-1a2b",
        key="a" * 64,
        model_path="models/llama",
        fingerprint="f" * 64,
        architecture="LlamaForCausalLM",
        configuration={"formats": ["fp8", "nvfp4"], "seed": 7},
        versions={"autoq": "0.1.0"},
        seed=7,
    )
    store.begin_stage(study.id, "calibration")
    store.put_arrays(
        study.id,
        "calibration",
        {
            "scale": np.array([0.5, -0.0, np.nan], dtype=np.float32),
            "same as scale": np.array([0.5, -0.0, np.nan], dtype=np.float32),
            "codes": np.arange(4096, dtype=np.uint8).reshape(16, 256),
        },
    )
    store.finish_stage(study.id, "calibration", 1.5, {"records": [], "tokens": 64})
    store.begin_stage(study.id, SCORING_STAGE)
    for index in range(2):
        store.put_score_batch(study.id, index, np.full((2, 2, 2), 0.25 * index), 0.5)
    store.put_sensitivity(
        study.id,
        [
            SensitivityCell(group="layers.0.qkv", format="fp8", score=0.125, standard_error=0.5),
            SensitivityCell(group="layers.0.mlp", format="fp8", score=None, standard_error=None),
        ],
    )
    store.finish_stage(study.id, SCORING_STAGE, 1.0, {"formats": ["fp8", "nvfp4"]})
    plan_id = store.add_plan(study.id, PLAN, label="4.8 bits")
    store.add_measurement(
        study.id,
        label="4.8 bits",
        metric="kl_divergence",
        value=0.03125,
        plan_id=plan_id,
        interval=(0.03, 0.04),
        tokens=4096,
        data_sha256="d" * 64,
    )
    export_id = store.begin_export(study.id, plan_id=plan_id, container="modelopt", path="/out")
    store.finish_export(
        export_id, files=[("model.safetensors", 99, "c" * 64)], verification={"tensors": 4}
    )
    store.set_status(study.id, WorkStatus.DONE)
    working = store.create_or_get(
        name="working",
        key="b" * 64,
        model_path="models/other",
        fingerprint="e" * 64,
        architecture="MixtralForCausalLM",
        configuration={},
        versions={},
        seed=0,
    )
    store.lease(working.id).__enter__()  # it ended without giving its lease back
    fill_jobs(store)
    elsewhere = {"host": "node-1", "pid_namespace": "pid:[1]", "pid": 4242, "boot_id": "boot-1"}
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    elsewhere |= dict.fromkeys(("acquired", "heartbeat", "expires"), long_ago)
    with store._database.write() as session:
        for leases in (LeaseRow, JobLeaseRow, RunnerRow):
            session.execute(update(leases).values(**elsewhere))
        session.execute(update(JobRow).where(JobRow.attempts > 0).values(worker="node-1:4242"))


def fill_jobs(store: StudyStore) -> None:
    """A job that is done, one whose runner died, and one that waits."""
    for number in range(3):
        request = {"model": "bundled", "seed": number}
        key = f"key {number}" if number else None
        store.add_job(kind="search", request=request, created_by="ada", idempotency_key=key)
    done = store.claim_job()
    progress = {"task": "scoring", "done": 3, "total": 4}
    events = [JobEvent(kind="progress", data=progress), JobEvent(kind="log", data={"text": "on"})]
    store.append_events(done, events, progress=progress, study="llama-1a2b")
    store.finish_job(done, {"plan": 1})
    store.claim_job()
    store.note_runner("a runner")


def sqlite_dump() -> tuple[str, str]:
    """The schema's revision, and the SQL that makes the database again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "autoq.db"
        with StudyStore.open(str(path)) as store:
            fill(store)
        with sqlite3.connect(path) as connection:
            (revision,) = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone()
            return revision, "\n".join(connection.iterdump()) + "\n"


def postgresql_dump(pg_dump: str) -> str:
    """The SQL that makes the database again, as pg_dump writes it."""
    with postgresql_url() as url:
        with StudyStore.open(url) as store:
            fill(store)
        plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        command = [pg_dump, "--inserts", "--no-owner", "--no-privileges", "--dbname", plain]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Commands of psql's own are no SQL.
    return "".join(line for line in dump.splitlines(keepends=True) if not line.startswith("\\"))


def write_new(path: Path, text: str) -> None:
    """Write a file that must not be there."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    print(path)


def main() -> None:
    """Freeze the newest schema; end with an error where that was done before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pg-dump", default="pg_dump", help="program of the server's version")
    arguments = parser.parse_args()
    revision, dump = sqlite_dump()
    sqlite_file = HERE / f"revision_{revision}.sqlite.sql"
    postgresql_file = HERE / f"revision_{revision}.postgresql.sql"
    if sqlite_file.exists() or postgresql_file.exists():
        sys.exit(f"revision {revision} is frozen already; a frozen database is never written again")
    postgresql = postgresql_dump(arguments.pg_dump)
    write_new(sqlite_file, dump)
    write_new(postgresql_file, postgresql)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
