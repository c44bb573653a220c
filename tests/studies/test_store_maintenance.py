"""`autoq store`: check names each fault, vacuum removes what is unused, upgrade, export, import."""

from __future__ import annotations

import json
import sqlite3
import zipfile

import numpy as np
import pytest
from typer.testing import CliRunner

from autoq.cli._app import app
from autoq.errors import InputError, StoreError
from autoq.studies import StudyStore, maintenance
from tests.studies.frozen_stores import REVISIONS, check_contents, thaw_sqlite


@pytest.fixture
def filled(store_path):
    """A store as the newest schema left it: a study with rows in every table, and another."""
    thaw_sqlite(REVISIONS[-1], store_path)
    return store_path


def change(path, *statements):
    connection = sqlite3.connect(path)
    with connection:
        for statement in statements:
            connection.execute(statement)
    connection.close()


def value(path, query):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchone()[0]
    finally:
        connection.close()


def dump(path):
    connection = sqlite3.connect(path)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def faults(path):
    return [(fault.study, fault.stage, fault.what) for fault in maintenance.check(str(path))]


def test_a_sound_store_has_no_fault(filled):
    assert faults(filled) == []


CODES = "SELECT sha256 FROM stored_array WHERE name = 'codes'"
DAMAGE = [
    pytest.param(
        f"UPDATE blob_chunk SET data = zeroblob(4224) WHERE blob_id = (SELECT id FROM blob "
        f"WHERE sha256 = ({CODES}))",
        [("llama-1a2b", "calibration", r"array 'codes' is damaged: 4224 of 4224 bytes")],
        id="bytes",
    ),
    pytest.param(
        f"DELETE FROM blob_chunk WHERE blob_id = (SELECT id FROM blob WHERE sha256 = ({CODES}))",
        [("llama-1a2b", "calibration", r"array 'codes' is damaged: 0 of 4224 bytes")],
        id="piece",
    ),
    pytest.param(
        f"DELETE FROM blob WHERE sha256 = ({CODES})",
        [
            (None, None, "row 2 of table blob_chunk refers to a blob that is gone"),
            (
                "llama-1a2b",
                "calibration",
                "row 3 of table stored_array refers to a blob that is gone",
            ),
        ],
        id="blob",
    ),
    pytest.param(
        "UPDATE score_batch SET data = zeroblob(192) WHERE batch_index = 1",
        [("llama-1a2b", "sensitivity", "score batch 1 is damaged")],
        id="scores",
    ),
    pytest.param(
        "UPDATE stage SET payload = '{\"records\":' WHERE name = 'calibration'",
        [("llama-1a2b", "calibration", "it cannot be read: row 1 of table stage failed")],
        id="json",
    ),
    pytest.param(
        'DELETE FROM "plan"',
        [
            (None, None, "row 1 of table export refers to a plan that is gone"),
            (None, None, "row 1 of table measurement refers to a plan that is gone"),
        ],
        id="plan",
    ),
    pytest.param(
        'UPDATE "plan" SET effective_bits = effective_bits + 1',
        [("llama-1a2b", None, "row 1 of table plan, plan '4.8 bits' of study 1, is damaged")],
        id="numbers_of_a_plan",
    ),
    pytest.param(
        "DROP TABLE sensitivity", [(None, None, "table sensitivity is missing")], id="table"
    ),
]


@pytest.mark.parametrize("statement, expected", DAMAGE)
def test_each_fault_is_named(statement, expected, filled):
    change(filled, statement)
    found = sorted(faults(filled), key=str)
    assert len(found) == len(expected)
    for (study, stage, what), (wanted_study, wanted_stage, begins) in zip(
        found, sorted(expected, key=str), strict=True
    ):
        assert (study, stage) == (wanted_study, wanted_stage)
        assert what.startswith(begins)


def test_a_torn_page_is_a_fault_and_not_read_as_numbers(filled):
    page = 4096
    root = value(filled, "SELECT rootpage FROM sqlite_master WHERE name = 'stage'")
    data = bytearray(filled.read_bytes())
    data[(root - 1) * page : root * page] = b"\x55" * page
    filled.write_bytes(data)
    (first, *_) = faults(filled)
    assert first[0] is None and "damaged" in first[2]
    with StudyStore.open(str(filled)) as store, pytest.raises(StoreError, match="is damaged"):
        store.stages(1)


def test_vacuum_removes_what_nothing_refers_to_and_nothing_else(filled):
    with StudyStore.open(str(filled)) as store:
        store.put_array(2, "calibration", "x", np.zeros(100_000))
    change(filled, "DELETE FROM stored_array WHERE name = 'x'", "DELETE FROM study WHERE id = 2")
    # SQLite left the lease of the study that is gone, and the array's bytes.
    done = maintenance.vacuum(str(filled))
    assert (done.orphaned_rows, done.unused_blobs, done.unused_bytes) == (1, 1, 800_128)
    assert (
        done.bytes_before - done.bytes_after > 190 * 4096
    )  # 195.3 pages of 4096 bytes were filled
    assert faults(filled) == []
    assert maintenance.vacuum(str(filled)).unused_blobs == 0
    with StudyStore.open(str(filled)) as store:
        assert list(store.arrays(1, "calibration")) == ["scale", "same as scale", "codes"]


def test_upgrade_says_what_it_would_do_copies_and_does_it(store_path, tmp_path):
    thaw_sqlite("0001", store_path)
    as_it_was = dump(store_path)
    run = CliRunner().invoke
    dry = run(app, ["store", "upgrade", "--dry-run", "--store", str(store_path)])
    said = [line[:14] for line in dry.output.splitlines()]
    assert said[: len(REVISIONS) - 1] == [f"would run {revision}" for revision in REVISIONS[1:]]
    assert dump(store_path) == as_it_was
    (fault,) = faults(store_path)
    assert "schema is revision 0001" in fault[2] and "autoq store upgrade" in fault[2]
    done = run(app, ["store", "upgrade", "--store", str(store_path), "--json"])
    answer = json.loads(done.output)
    assert [step["revision"] for step in answer["migrations"]] == REVISIONS[1:]
    assert answer["done"] and answer["backup"] == f"{store_path}.before-0002"
    check_contents("0001", f"sqlite:///{store_path}")
    copy = tmp_path / "autoq.db.before-0002"
    assert value(copy, "SELECT version_num FROM autoq_alembic_version") == "0001"
    again = run(app, ["store", "upgrade", "--store", str(store_path)])
    assert f"has the newest schema, {REVISIONS[-1]}" in again.output


def test_a_copy_is_never_written_over(store_path):
    thaw_sqlite("0002", store_path)
    copy = store_path.with_name("autoq.db.before-0003")
    copy.write_text("mine")
    result = CliRunner().invoke(app, ["store", "upgrade", "--store", str(store_path)])
    assert result.exit_code == 2 and "exists already" in result.output
    assert copy.read_text() == "mine"
    assert value(store_path, "SELECT version_num FROM autoq_alembic_version") == "0002"


def exported(path, to, study="llama-1a2b"):
    with StudyStore.open(str(path)) as store:
        store.export(store.find(study).id, to)
    return to.read_bytes()


def test_a_study_goes_into_another_store_and_comes_back_as_the_same_bytes(filled, tmp_path):
    first = exported(filled, tmp_path / "one.autoq")
    assert exported(filled, tmp_path / "again.autoq") == first
    other = tmp_path / "other.db"
    with StudyStore.open(str(other)) as store:
        # Other numbers than at home, so that whatever refers by number has to be renumbered.
        decoy = store.create_or_get(
            name="decoy",
            key="c" * 64,
            model_path="m",
            fingerprint="f",
            architecture="a",
            configuration={},
            versions={},
            seed=0,
        )
        with StudyStore.open(str(filled)) as source:
            plan = source.plans(1)[0].to_plan()
        for label in ("a", "b"):
            store.add_plan(decoy.id, plan, label=label)
        assert store.import_file(tmp_path / "one.autoq") == "llama-1a2b"
    assert exported(other, tmp_path / "back.autoq") == first
    assert faults(other) == []
    with StudyStore.open(str(other)) as store, StudyStore.open(str(filled)) as source:
        study = store.find("llama-1a2b")
        (moved,), (home,) = store.plans(study.id), source.plans(1)
        assert moved.id != home.id and moved.to_plan() == home.to_plan()
        assert store.measurements(study.id)[0].plan_id == moved.id
        # The same plan again is found by its hash.
        assert store.add_plan(study.id, home.to_plan(), label="4.8 bits") == moved.id


def test_numbers_of_plans_in_plain_data_are_renumbered(filled, tmp_path):
    with StudyStore.open(str(filled)) as store:
        plan = store.plans(1)[0]
        better = store.add_plan(
            1, plan.to_plan(), label="refined", details={"refined_from": plan.id}
        )
        for stage in ("solve", f"refined plan {plan.id}"):
            store.begin_stage(1, stage)
            store.finish_stage(1, stage, 0.0, {"plan_id": better, "start": {"plan_id": plan.id}})
    exported(filled, tmp_path / "one.autoq")
    other = tmp_path / "other.db"
    with StudyStore.open(str(other)) as store:
        decoy = store.create_or_get(
            name="decoy",
            key="c" * 64,
            model_path="m",
            fingerprint="f",
            architecture="a",
            configuration={},
            versions={},
            seed=0,
        )
        store.add_plan(decoy.id, plan.to_plan(), label="takes the first number")
        store.import_file(tmp_path / "one.autoq")
        study = store.find("llama-1a2b")
        start, refined = store.plans(study.id)
        assert refined.details["refined_from"] == start.id != plan.id
        for stage in ("solve", f"refined plan {start.id}"):
            payload = store.stage(study.id, stage).payload
            assert payload == {"plan_id": refined.id, "start": {"plan_id": start.id}}


def rewritten(source, to, change):
    """The file with some of its parts changed."""
    with zipfile.ZipFile(source) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    change(parts)
    with zipfile.ZipFile(to, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return to


def first_blob(parts):
    return next(name for name in parts if name.startswith("blobs/"))


def with_document(change):
    import hashlib

    def apply(parts):
        document = json.loads(parts["study.json"])
        change(document)
        parts["study.json"] = json.dumps(document).encode()
        manifest = json.loads(parts["manifest.json"])
        manifest["study_sha256"] = hashlib.sha256(parts["study.json"]).hexdigest()
        parts["manifest.json"] = json.dumps(manifest).encode()

    return apply


BROKEN = [
    pytest.param(lambda p: p.pop("study.json"), "it has no manifest.json and", id="no_study"),
    pytest.param(lambda p: p.update({"../evil": b""}), "which is no part", id="path"),
    pytest.param(lambda p: p.update({"x.pkl": b""}), "which is no part", id="pickle"),
    pytest.param(lambda p: p.update({first_blob(p): b"no"}), "does not match its", id="blob"),
    pytest.param(lambda p: p.pop(first_blob(p)), "blobs are not those", id="blob_missing"),
    pytest.param(lambda p: p.update({"study.json": b"{}"}), "study.json is damaged", id="rows"),
    pytest.param(
        lambda p: p.update({"manifest.json": b'{"kind": "autoq study", "version": 2}'}),
        "upgrade autoq",
        id="newer",
    ),
    pytest.param(lambda p: p.update({"manifest.json": b"[]"}), "hold an object", id="manifest"),
    pytest.param(
        with_document(lambda d: d["plans"][0].update(stored_bytes="many")),
        "stored_bytes must be a int",
        id="type",
    ),
    pytest.param(
        with_document(lambda d: d["stages"][0].pop("status")), "other columns", id="column"
    ),
    pytest.param(
        with_document(lambda d: d["stages"][0].update(status="odd")), "'odd' is not", id="status"
    ),
    pytest.param(with_document(lambda d: d.update(study=3)), "not hold a study", id="study"),
    pytest.param(
        with_document(lambda d: d["measurements"][0].update(plan_id=7)),
        "no plan 7",
        id="plan_of_another_study",
    ),
    pytest.param(
        with_document(lambda d: d["plans"][0].update(budget_bits=10**400)),
        "not hold a study",
        id="huge_number",
    ),
    pytest.param(
        with_document(lambda d: d["plans"][0].update(budget_bits=float("nan"))),
        "budget_bits is not finite",
        id="nan",
    ),
    pytest.param(
        with_document(lambda d: d["study"].update(created="2026-01-01T00:00:00")),
        "created has no time zone",
        id="no_zone",
    ),
    pytest.param(
        with_document(lambda d: d["study"].update(created="0001-01-01T00:00:00+14:00")),
        "not hold a study",
        id="before_all_times",
    ),
    pytest.param(
        with_document(lambda d: d["study"].update(architecture="\ud800")),
        "not hold a study",
        id="no_text",
    ),
    pytest.param(
        with_document(lambda d: d["stages"][0].update(payload=nested(800))),
        "too deeply",
        id="nested",
    ),
    pytest.param(
        with_document(lambda d: d["stages"][0].update(payload=[])),
        "payload must be an object",
        id="payload",
    ),
    pytest.param(
        with_document(lambda d: d["arrays"][0].update(shape=[3, 1])),
        "is not the array that its blob holds",
        id="shape",
    ),
    pytest.param(
        lambda p: with_blob(p, npy_header("(1152921504606846975,)")),
        "is no array",
        id="array_of_an_exbibyte",
    ),
    pytest.param(
        lambda p: with_blob(p, npy_header("(2,)") + b"12345678" * 3), "is no array", id="longer"
    ),
]


def npy_header(shape):
    """The beginning of an npy file of doubles."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def with_blob(parts, data):
    """An array's blob in place of which there is another, with its right hash."""
    import hashlib

    old = json.loads(parts["study.json"])["arrays"][0]["sha256"]
    new = hashlib.sha256(data).hexdigest()
    parts[f"blobs/{new}.npy"] = data
    del parts[f"blobs/{old}.npy"]

    def change(document):
        for row in document["arrays"]:
            row["sha256"] = new if row["sha256"] == old else row["sha256"]

    with_document(change)(parts)


@pytest.mark.parametrize("change, message", BROKEN)
def test_a_file_that_is_not_as_it_was_written_is_refused_whole(change, message, filled, tmp_path):
    exported(filled, tmp_path / "one.autoq")
    broken = rewritten(tmp_path / "one.autoq", tmp_path / "two.autoq", change)
    with StudyStore.open(str(tmp_path / "other.db")) as store:
        with pytest.raises(InputError, match=message) as refusal:
            store.import_file(broken)
        assert "\n" not in str(refusal.value)
        assert store.list_studies() == []
    assert value(tmp_path / "other.db", "SELECT count(*) FROM blob") == 0


def test_a_compressed_part_is_refused_unread(filled, tmp_path):
    exported(filled, tmp_path / "one.autoq")
    bomb = tmp_path / "bomb.autoq"
    with zipfile.ZipFile(tmp_path / "one.autoq") as source, zipfile.ZipFile(bomb, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with (
        StudyStore.open(str(tmp_path / "other.db")) as store,
        pytest.raises(InputError, match="is compressed or encrypted"),
    ):
        store.import_file(bomb)


def test_a_study_or_name_that_is_there_is_refused(filled, tmp_path):
    exported(filled, tmp_path / "one.autoq")
    with StudyStore.open(str(filled)) as store:
        with pytest.raises(InputError, match="has this study already, as 'llama-1a2b'"):
            store.import_file(tmp_path / "one.autoq")
        change(filled, f"UPDATE study SET key = '{'9' * 64}' WHERE id = 1")
        with pytest.raises(InputError, match="name is unique, and 'llama-1a2b'"):
            store.import_file(tmp_path / "one.autoq")
        assert store.import_file(tmp_path / "one.autoq", "moved") == "moved"


def test_a_damaged_study_is_not_exported(filled, tmp_path):
    change(filled, "UPDATE blob_chunk SET data = zeroblob(10)")
    with StudyStore.open(str(filled)) as store, pytest.raises(InputError, match="is damaged"):
        store.export(1, tmp_path / "one.autoq")
    assert [p.name for p in tmp_path.iterdir() if "autoq.db" not in p.name] == []


def test_the_commands(filled, tmp_path):
    run, at = CliRunner().invoke, ["--store", str(filled)]
    sound = run(app, ["store", "check", *at])
    assert (sound.exit_code, sound.output.endswith("no fault\n")) == (0, True)
    file = tmp_path / "one.autoq"
    assert run(app, ["store", "export", "llama", "-o", str(file), *at]).exit_code == 0
    other = ["--store", f"sqlite:///{tmp_path / 'other.db'}"]
    done = run(app, ["store", "import", str(file), "--name", "moved", "--json", *other])
    assert json.loads(done.output)["study"] == "moved"
    assert run(app, ["store", "vacuum", *at]).output.startswith("removed 0 unused arrays")
    change(filled, "UPDATE score_batch SET data = zeroblob(1) WHERE batch_index = 0")
    damaged = run(app, ["store", "check", *at])
    assert damaged.exit_code == 4
    assert "study llama-1a2b, stage sensitivity: score batch 0 is damaged" in damaged.output
    missing = run(app, ["store", "check", "--store", str(tmp_path / "no.db")])
    assert missing.exit_code == 2 and not (tmp_path / "no.db").exists()
