"""Rows whose values changed behind the store's back: refused where they are read, named by check."""

from __future__ import annotations

import hashlib
import sqlite3

import numpy as np
import pytest
from sqlalchemy import inspect

from autoq.errors import StoreError
from autoq.studies import StudyStore, maintenance
from autoq.studies._check import SEALED
from autoq.studies._schema import MeasurementRow
from autoq.studies._seals import is_sealed, sealed
from tests.studies.frozen_stores import REVISIONS, migrate, thaw_sqlite

READERS = {
    "study": lambda store: store.study(1),
    "stage": lambda store: store.stages(1),
    "stored_array": lambda store: store.arrays(1, "calibration"),
    "score_batch": lambda store: store.score_batches(1),
    "sensitivity": lambda store: store.sensitivity(1),
    "plan": lambda store: store.plans(1),
    "measurement": lambda store: store.measurements(1),
    "export": lambda store: store.exports(1),
    "export_file": lambda store: store.exports(1),
}
"""Table -> what reads its rows."""

UNSEALED = {("score_batch", "data")}  # has a hash of its own
OWNERS = {("stored_array", "stage"), ("export_file", "export_id")} | {
    (table, "study_id") for table in READERS if table not in ("study", "export_file")
}
"""What says whose a row is: with another value it is found there, or not at all."""

COLUMNS = [
    (table.__tablename__, column.name)
    for table in SEALED
    for column in inspect(table).columns
    if column.name != "id"
    if (table.__tablename__, column.name) not in UNSEALED | OWNERS
]


@pytest.fixture
def filled(store_path):
    """A store of today's schema with rows in every table."""
    thaw_sqlite("0005", store_path)
    migrate(f"sqlite:///{store_path}", REVISIONS[-1])
    return store_path


def change(path, table, column, value):
    """Write into the first row, without the checks of references that a disk does not make either."""
    with sqlite3.connect(path) as connection:
        connection.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = 1', (value,))
    connection.close()


def value_of(path, table, column):
    with sqlite3.connect(path) as connection:
        query = f'SELECT "{column}" FROM "{table}" WHERE rowid = 1'
        (value,) = connection.execute(query).fetchone()
    connection.close()
    return value


def changed(value):
    """A value that differs in one place, of the same type; another one where there was none."""
    if value is None:
        return 1
    if value == "{}":
        return '{"a": 1}'
    if isinstance(value, str):
        place = next(i for i, letter in enumerate(value) if letter.isalnum())
        return value[:place] + ("1" if value[place] != "1" else "2") + value[place + 1 :]
    return value + 100


def test_every_table_of_results_is_sealed():
    assert {table.__tablename__ for table in SEALED} == set(READERS)


def test_whatever_the_store_writes_has_its_seal(filled):
    with StudyStore.open(str(filled)) as store:
        for read in READERS.values():
            read(store)
    assert maintenance.check(str(filled)) == []


@pytest.mark.parametrize("table, column", COLUMNS)
def test_a_changed_column_is_refused_and_named(table, column, filled):
    change(filled, table, column, changed(value_of(filled, table, column)))
    with StudyStore.open(str(filled)) as store, pytest.raises(StoreError, match="damaged"):
        READERS[table](store)
    assert any(f"row 1 of table {table}" in fault.what for fault in maintenance.check(str(filled)))


@pytest.mark.parametrize("table, column", sorted(OWNERS))
def test_a_row_that_belongs_elsewhere_all_at_once_is_named(table, column, filled):
    change(filled, table, column, 2)
    assert any(f"row 1 of table {table}" in fault.what for fault in maintenance.check(str(filled)))


def test_a_row_without_seal_counts_as_damaged(filled):
    change(filled, "measurement", "row_sha256", None)
    with StudyStore.open(str(filled)) as store, pytest.raises(StoreError, match="'kl_divergence'"):
        store.measurements(1)


def test_a_damaged_row_stands_in_nobody_elses_way(filled):
    change(filled, "study", "seed", 99)
    with StudyStore.open(str(filled)) as store:
        assert store.find("working").id == 2
        assert [summary.name for summary in store.list_studies()] == ["llama-1a2b", "working"]
        store.begin_stage(2, "calibration")
        with pytest.raises(StoreError, match="study 'llama-1a2b' is damaged"):
            store.find("llama-1a2b")


def test_the_seal_is_the_hash_of_table_and_columns():
    values = {"study_id": 3, "label": "a", "metric": "kl", "value": 1, "details": {"b": [1.5]}}
    text = (
        '["measurement",{"created":null,"data_sha256":null,"details":{"b":[1.5]},'
        '"interval_high":null,"interval_low":null,"label":"a","metric":"kl","plan_id":null,'
        '"study_id":3,"tokens":null,"value":1.0}]'
    )
    row = sealed(MeasurementRow, values)
    assert row["row_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert is_sealed(MeasurementRow, row)
    assert not is_sealed(MeasurementRow, {**row, "value": 1.0000000000000002})


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.float32(0.1), -0.0, 5e-324, 2, 1e22])
def test_a_seal_survives_the_database(value, store, study_id):
    details = {"number": value, "nested": (1, {"x": value}), "letter": "\u00e9\u4e00"}
    store.add_measurement(study_id, label="l", metric="m", value=value, details=details)
    (found,) = store.measurements(study_id)
    assert found.details["letter"] == details["letter"]
    assert maintenance.check(store.url) == []


def test_rows_of_before_are_sealed_by_the_upgrade_and_unreadable_ones_are_not(store_path):
    thaw_sqlite("0004", store_path)
    with sqlite3.connect(store_path) as connection:
        connection.execute("UPDATE stage SET payload = '{\"records\":' WHERE id = 1")
    connection.close()
    with StudyStore.open(str(store_path)) as store:
        assert store.plans(1)[0].label == "4.8 bits"
    named = [fault.what for fault in maintenance.check(str(store_path))]
    assert len(named) == 1
    assert "row 1 of table stage" in named[0]
