"""Arrays are blobs: kept once, in pieces, verified when they are read, gone when unused."""

from __future__ import annotations

import sqlite3

import numpy as np
import pytest

from autoq.errors import StoreError
from autoq.studies import _blobs

HEADER = 128  # bytes of an npy file before the values


def rows(path, query):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def change(path, statement, *values):
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement, values)
    connection.close()


def flip_last_bit(path):
    (data,) = rows(path, "SELECT data FROM blob_chunk")[0]
    change(path, "UPDATE blob_chunk SET data = ?", data[:-1] + bytes([data[-1] ^ 1]))


def test_equal_arrays_are_kept_once(store, store_path, make_study):
    one, two = make_study(name="one", key="1" * 64), make_study(name="two", key="2" * 64)
    for study in (one, two):
        store.put_arrays(study.id, "calibration", {"x": np.ones(4), "y": np.ones(4)})
    assert rows(store_path, "SELECT count(*) FROM stored_array") == [(4,)]
    assert rows(store_path, "SELECT size_bytes FROM blob") == [(HEADER + 32,)]


def test_a_blob_is_kept_in_pieces(store, store_path, study_id, monkeypatch):
    monkeypatch.setattr(_blobs, "CHUNK_BYTES", 100)
    array = np.arange(20.0)
    store.put_array(study_id, "calibration", "x", array)
    pieces = rows(store_path, "SELECT length(data) FROM blob_chunk ORDER BY position")
    assert pieces == [(100,), (100,), (HEADER + 160 - 200,)]
    assert np.array_equal(store.get_array(study_id, "calibration", "x"), array)
    assert np.array_equal(store.arrays(study_id, "calibration")["x"], array)


def test_what_is_replaced_or_reset_leaves_no_blob_unless_others_use_it(
    store, store_path, make_study
):
    one, two = make_study(name="one", key="1" * 64), make_study(name="two", key="2" * 64)
    for study in (one, two):
        store.put_array(study.id, "calibration", "x", np.ones(4))
    store.put_array(one.id, "calibration", "x", np.zeros(9))
    sizes = "SELECT size_bytes FROM blob ORDER BY size_bytes"
    assert rows(store_path, sizes) == [(HEADER + 32,), (HEADER + 72,)]
    store.reset_stage(two.id, "calibration")
    assert rows(store_path, sizes) == [(HEADER + 72,)]
    assert rows(store_path, "SELECT count(*) FROM blob_chunk") == [(1,)]
    assert np.array_equal(store.get_array(one.id, "calibration", "x"), np.zeros(9))


DAMAGE = [
    pytest.param(flip_last_bit, id="bit"),
    pytest.param(lambda path: change(path, "DELETE FROM blob_chunk"), id="piece_is_missing"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_array_is_noticed_and_named(damage, store, store_path, study_id):
    store.put_array(study_id, "calibration", "x", np.ones(4))
    damage(store_path)
    named = pytest.raises(
        StoreError, match=r"array 'x' of stage 'calibration' of study 1 is damaged"
    )
    with named:
        store.get_array(study_id, "calibration", "x")
    with named:
        store.arrays(study_id, "calibration")


@pytest.mark.parametrize("damage", DAMAGE)
def test_whoever_stores_the_same_again_mends_it(damage, store, store_path, make_study):
    one, two = make_study(name="one", key="1" * 64), make_study(name="two", key="2" * 64)
    store.put_array(one.id, "calibration", "x", np.ones(4))
    damage(store_path)
    store.put_array(two.id, "calibration", "x", np.ones(4))
    assert np.array_equal(store.get_array(one.id, "calibration", "x"), np.ones(4))


def test_bytes_flipped_in_the_file_are_never_read_as_numbers(store, store_path, study_id):
    """Wherever in the file's pages a byte of the array changes, by whatever wrote there."""
    array = np.arange(4096, dtype=np.int64) + 0x1122334455667788
    store.put_array(study_id, "calibration", "x", array)
    store.close()
    change(store_path, "PRAGMA wal_checkpoint(TRUNCATE)")
    data = bytearray(store_path.read_bytes())
    position = data.index(array[2000:2002].tobytes())
    data[position] ^= 0x40
    store_path.write_bytes(data)
    with pytest.raises(StoreError, match="array 'x' of stage 'calibration' of study 1 is damaged"):
        store.get_array(study_id, "calibration", "x")
