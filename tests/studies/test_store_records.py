"""What goes into the store comes out of it; what may not go in is refused."""

from __future__ import annotations

import json
import math
import sqlite3
import zipfile
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
from sqlalchemy import event

from autoq.errors import InputError, StoreError, UnknownNameError
from autoq.search import Budget, Least, Plan, Resource
from autoq.studies import (
    SCORING_STAGE,
    SensitivityCell,
    StudyStore,
    WorkStatus,
    _stages,
    maintenance,
    study_key,
)

PLAN = Plan(
    assignment={"layers.0.qkv": "nvfp4", "layers.0.mlp": "fp8"},
    budget_bits=4.8,
    effective_bits=4.75,
    peer_effective_bits=4.25,
    stored_bits_per_weight=4.8125,
    stored_bytes=123_456_789_012,
    predicted_loss=0.0123,
    predicted_loss_interval=(0.01, 0.015),
    bound=0.0122,
    gap=0.008,
)


def test_study_comes_back_as_it_was_given(make_study, store):
    record = make_study()
    assert record == store.find("demo") == store.study(record.id)
    assert record.configuration == {"bits": 4.8, "formats": ["fp8", "nvfp4"]}
    assert record.status == "todo"
    assert record.created.endswith("+00:00")


def test_same_key_returns_the_existing_study(make_study, store):
    first = make_study(name="demo")
    assert make_study(name="other", seed=8) == first
    assert len(store.list_studies()) == 1


def test_taken_name_is_refused_with_remedy(make_study):
    make_study(key="a" * 64)
    with pytest.raises(InputError, match=r"'demo' belongs to study 1 .*choose another name"):
        make_study(key="b" * 64)


def test_unnamed_studies_are_called_after_model_and_key(make_study):
    first = make_study(name=None, key="a" * 63 + "0")
    second = make_study(name=None, key="a" * 63 + "1")
    assert first.name == "tiny-aaaaaaaa"
    assert second.name == "tiny-" + "a" * 63 + "1"


@pytest.mark.parametrize("name", ["", "  ", "12", "two\nlines"])
def test_name_that_cannot_be_one_is_refused(name, make_study):
    with pytest.raises(InputError, match="a study's name must"):
        make_study(name=name)


def test_find_takes_name_id_key_and_unique_prefix(make_study, store):
    make_study(name="llama", key="ab" * 32)
    make_study(name="llama-long", key="cd" * 32)
    found = {
        wanted: store.find(wanted).id for wanted in ("llama", "2", 2, "ab" * 32, "llama-", "cd")
    }
    assert found == {"llama": 1, "2": 2, 2: 2, "ab" * 32: 1, "llama-": 2, "cd": 2}


def test_find_refuses_an_ambiguous_beginning(make_study, store):
    make_study(name="llama-a", key="a" * 64)
    make_study(name="llama-b", key="b" * 64)
    with pytest.raises(InputError, match=r"'llama' must name one study, and 2 .*llama-a, llama-b"):
        store.find("llama")


def test_find_lists_near_misses(make_study, store):
    with pytest.raises(UnknownNameError, match="the store is empty"):
        store.find("x")
    make_study(name="llama-tiny")
    with pytest.raises(UnknownNameError, match=r"'lama-tiny' \(did you mean llama-tiny\?\)"):
        store.find("lama-tiny")


def test_study_key_depends_on_content_not_order():
    key = study_key({"a": 1, "b": [1.5, math.nan]}, "f")
    assert key == study_key({"b": (1.5, math.nan), "a": 1}, "f")
    assert key != study_key({"a": 1, "b": [1.5, 0.0]}, "f")
    assert key != study_key({"a": 1, "b": [1.5, math.nan]}, "g")


def test_nan_and_infinity_become_null_in_json(make_study, store_path):
    configuration = {
        "a": math.nan,
        "b": [math.inf, np.float32(0.5), np.int64(3)],
        "c": {"d": -math.inf},
    }
    record = make_study(configuration=configuration)
    assert record.configuration == {"a": None, "b": [None, 0.5, 3], "c": {"d": None}}
    with sqlite3.connect(store_path) as connection:
        (text,) = connection.execute("SELECT configuration FROM study").fetchone()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == record.configuration


@pytest.mark.parametrize(
    "value",
    [np.zeros(2), {1: "a"}, object(), b"bytes"],
    ids=["array", "number_as_key", "object", "bytes"],
)
def test_what_is_not_plain_data_stays_out_of_json(value, make_study, store):
    with pytest.raises(TypeError, match="JSON column"):
        make_study(configuration={"value": value})
    assert store.list_studies() == []


def test_stage_runs_through_its_states(study_id, store):
    assert store.stage(study_id, "discovery") is None
    running = store.begin_stage(study_id, "discovery")
    assert (running.status, running.finished) == (WorkStatus.RUNNING, None)
    assert store.study(study_id).status == WorkStatus.RUNNING
    done = store.finish_stage(study_id, "discovery", 1.5, {"groups": 12})
    assert done == store.stage(study_id, "discovery")
    assert (done.status, done.seconds, done.payload) == ("done", 1.5, {"groups": 12})


def test_finished_stage_refuses_change_until_reset(study_id, store):
    store.begin_stage(study_id, SCORING_STAGE)
    store.put_score_batch(study_id, 0, np.ones(2), 0.1)
    store.put_array(study_id, SCORING_STAGE, "a", np.ones(2))
    store.put_sensitivity(study_id, [])
    store.finish_stage(study_id, SCORING_STAGE, 1.0)
    refused = [
        lambda: store.begin_stage(study_id, SCORING_STAGE),
        lambda: store.put_array(study_id, SCORING_STAGE, "a", np.zeros(2)),
        lambda: store.put_score_batch(study_id, 1, np.zeros(2), 0.1),
        lambda: store.put_sensitivity(study_id, []),
    ]
    for change in refused:
        with pytest.raises(StoreError, match=r"'sensitivity' of study 'demo' is finished; reset"):
            change()
    with pytest.raises(StoreError, match=r"only a running stage ends, .* is done"):
        store.finish_stage(study_id, SCORING_STAGE, 2.0)
    store.reset_stage(study_id, SCORING_STAGE)
    assert store.stage(study_id, SCORING_STAGE) is None
    assert store.arrays(study_id, SCORING_STAGE) == {}
    assert store.score_batches(study_id) == {}


def test_resetting_one_stage_leaves_the_others(study_id, store):
    for stage in ("calibration", SCORING_STAGE):
        store.begin_stage(study_id, stage)
        store.put_array(study_id, stage, "a", np.ones(2))
    store.put_score_batch(study_id, 0, np.ones(2), 0.1)
    store.reset_stage(study_id, "calibration")
    assert [stage.name for stage in store.stages(study_id)] == [SCORING_STAGE]
    assert list(store.arrays(study_id, SCORING_STAGE)) == ["a"]
    assert list(store.score_batches(study_id)) == [0]


def test_failed_stage_says_why_and_can_run_again(study_id, store):
    with pytest.raises(StoreError, match="'solve' of study 'demo' was not begun"):
        store.finish_stage(study_id, "solve", 0.0)
    store.begin_stage(study_id, "solve")
    assert store.fail_stage(study_id, "solve", 0.2, "no solution").payload == {
        "reason": "no solution"
    }
    assert store.study(study_id).status == WorkStatus.FAILED
    assert store.begin_stage(study_id, "solve").payload == {}


ARRAYS = [
    pytest.param(np.array(-0.0), id="scalar_negative_zero"),
    pytest.param(
        np.array([0x7FC00001, 0xFF800000, 1], dtype=np.uint32).view(np.float32), id="nan_payload"
    ),
    pytest.param(np.zeros((0, 3), dtype=np.int8), id="empty"),
    pytest.param(np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1), id="strided"),
    pytest.param(np.arange(3, dtype=">f8"), id="big_endian"),
    pytest.param(np.array(["a", "größer"]), id="text"),
    pytest.param(np.array([True, False]), id="bool"),
]


@pytest.mark.parametrize("array", ARRAYS)
def test_array_round_trip_is_exact(array, study_id, store):
    store.put_array(study_id, "calibration", "x", array)
    back = store.get_array(study_id, "calibration", "x")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "array",
    [np.array([{}], dtype=object), np.zeros(2, dtype=[("a", "f4")])],
    ids=["object", "structured"],
)
def test_array_that_needs_pickle_is_refused_and_nothing_stored(array, study_id, store):
    with pytest.raises(StoreError, match="cannot be stored"):
        store.put_arrays(study_id, "calibration", {"good": np.ones(2), "bad": array})
    assert store.arrays(study_id, "calibration") == {}


def test_many_arrays_keep_their_order_and_replace_by_name(study_id, store):
    arrays = {f"layer.{index}": np.full(4, index) for index in range(1000)}
    store.put_arrays(study_id, "calibration", arrays)
    store.put_arrays(study_id, "other", {"layer.1": np.zeros(1)})
    back = store.arrays(study_id, "calibration")
    assert list(back) == list(arrays)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    store.put_array(study_id, "calibration", "layer.7", np.array([70.0]))
    assert store.get_array(study_id, "calibration", "layer.7").tolist() == [70.0]
    assert len(store.arrays(study_id, "calibration")) == 1000


def test_reading_takes_so_many_bytes_at_a_time(study_id, store, monkeypatch):
    monkeypatch.setattr(_stages, "_BYTES_PER_STATEMENT", 1000)
    arrays = {f"x{n}": np.full(50, float(n)) for n in range(7)}  # 528 bytes each, as npy
    store.put_arrays(study_id, "calibration", arrays)
    fetched = []
    listen = partial(event.listen, store._database._engine, "before_cursor_execute")
    listen(lambda c, cursor, statement, *_: fetched.append(statement))
    assert list(store.arrays(study_id, "calibration")) == list(arrays)
    # the sizes first, without the data, and then one array at a time
    assert len([statement for statement in fetched if "blob_chunk.data" in statement]) == 7


def test_a_score_batch_that_no_database_takes_is_refused(study_id, store, monkeypatch):
    monkeypatch.setattr(_stages, "MAX_VALUE_BYTES", 100)
    with pytest.raises(StoreError, match=r"at most 100 bytes, and a score batch has 104; score"):
        store.put_score_batch(study_id, 0, np.ones(13), 0.1)
    assert store.score_batches(study_id) == {}


def test_missing_array_is_named(study_id, store):
    with pytest.raises(UnknownNameError, match="stage 'calibration' of study 1 has no array 'x'"):
        store.get_array(study_id, "calibration", "x")


def test_score_batches_are_idempotent_and_ordered(study_id, store):
    for index in (2, 0, 1):
        store.put_score_batch(study_id, index, np.full((2, 3), index + 0.5), 0.25)
    store.put_score_batch(study_id, 1, np.full((2, 3), 1.5), 9.0)
    batches = store.score_batches(study_id)
    assert list(batches) == [0, 1, 2]
    assert batches[2][0, 0] == 2.5
    assert store.score_seconds(study_id) == 0.75
    with pytest.raises(StoreError, match="batch 1 of study 1 is stored with other values"):
        store.put_score_batch(study_id, 1, np.full((2, 3), np.nextafter(1.5, 2)), 0.25)


def test_sensitivity_is_plain_sql(study_id, store, store_path):
    cells = [
        SensitivityCell(group="qkv", format="nvfp4", score=0.5, standard_error=math.inf),
        SensitivityCell(group="mlp", format="nvfp4", score=math.nan, standard_error=0.1),
    ]
    store.put_sensitivity(study_id, cells)
    store.put_sensitivity(study_id, cells)
    with sqlite3.connect(store_path) as connection:
        query = "SELECT group_name, format_name, score, standard_error FROM sensitivity ORDER BY id"
        rows = connection.execute(query).fetchall()
    assert rows == [("qkv", "nvfp4", 0.5, None), ("mlp", "nvfp4", None, 0.1)]
    assert [cell.score for cell in store.sensitivity(study_id)] == [0.5, None]


def test_plan_round_trip(study_id, store):
    plan_id = store.add_plan(study_id, PLAN, label="4.8")
    assert store.add_plan(study_id, PLAN, label="4.8") == plan_id
    assert store.add_plan(study_id, PLAN, label="again") != plan_id
    assert store.plan(plan_id).to_plan() == PLAN
    assert [plan.label for plan in store.plans(study_id)] == ["4.8", "again"]


def test_plan_keeps_budgets_and_what_it_takes(study_id, store, store_path):
    plan = replace(
        PLAN,
        budgets=(
            Budget(resource=Resource.EFFECTIVE_BITS, limit=4.8),
            Budget(resource=Resource.LATENCY, limit=1 / 3),
        ),
        takes={Resource.EFFECTIVE_BITS: 4.75, Resource.STORED_BYTES: 2.0**53},
        least=Least(
            resource=Resource.STORED_BYTES, loss_limit=0.01, value=5.0, bound=4.9, gap=0.02
        ),
    )
    latency = {"model": "h200", "tokens": 8}
    plan_id = store.add_plan(study_id, plan, label="4.8", details={"latency": latency})
    record = store.plan(plan_id)
    assert record.to_plan() == plan
    assert record.budgets == {"effective_bits": 4.8, "latency_seconds": 1 / 3}
    assert record.takes == {"effective_bits": 4.75, "stored_bytes": 2.0**53}
    assert record.details["latency"] == latency
    with sqlite3.connect(store_path) as connection:
        (text,) = connection.execute("SELECT details FROM plan").fetchone()
    assert json.loads(text)["least"]["loss_limit"] == 0.01


def test_measuring_again_replaces_the_number(study_id, store):
    plan_id = store.add_plan(study_id, PLAN, label="4.8")
    same = {"label": "held out", "metric": "kl", "plan_id": plan_id, "data_sha256": "d" * 64}
    first = store.add_measurement(study_id, value=0.5, interval=(0.4, 0.6), tokens=4096, **same)
    assert store.add_measurement(study_id, value=0.25, details={"top1": 0.9}, **same) == first
    other = store.add_measurement(study_id, label="original", metric="kl", value=math.nan)
    back = store.measurements(study_id)
    assert [record.id for record in back] == [first, other]
    assert (back[0].value, back[0].interval, back[0].details) == (0.25, None, {"top1": 0.9})
    assert (back[1].value, back[1].plan_id) == (None, None)


def test_measurement_of_a_plan_that_is_not_there_is_refused(study_id, store):
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        store.add_measurement(study_id, label="x", metric="kl", value=1.0, plan_id=99)


def test_details_of_one_metric_go_to_that_metric(study_id, store):
    store.add_measurements(
        study_id,
        {"kl": (0.5, (0.25, 0.75)), "top1": (0.9, None)},
        label="x",
        details={"data": "a.txt"},
        details_by_metric={"kl": {"per_sequence": [0.25, 0.75]}},
    )
    kl, top1 = store.measurements(study_id)
    assert kl.details == {"data": "a.txt", "per_sequence": [0.25, 0.75]}
    assert top1.details == {"data": "a.txt"}


def test_export_round_trip(study_id, store):
    plan_id = store.add_plan(study_id, PLAN, label="4.8")
    begun = {"plan_id": plan_id, "container": "modelopt", "path": "out"}
    interrupted = store.begin_export(study_id, **begun)
    export_id = store.begin_export(study_id, **begun)
    files = [("model.safetensors", 100, "1" * 64), ("config.json", 20, "2" * 64)]
    finished = store.finish_export(export_id, files=files, verification={"tensors": 12})
    assert [file.path for file in finished.files] == ["config.json", "model.safetensors"]
    assert finished.bytes_written == 120
    first, second = store.exports(study_id)
    assert second == finished
    assert (first.id, first.status) == (interrupted, "failed")
    assert first.verification == {"reason": "interrupted before it was complete"}
    with pytest.raises(StoreError, match=f"export {export_id} to out is complete"):
        store.fail_export(export_id, "late")


def test_files_come_in_one_order_whatever_the_language_of_the_database(tmp_path):
    """Databases that sort by language put B behind a, and so does one that ignores case."""
    path = tmp_path / "autoq.db"
    StudyStore.open(str(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute(
            "UPDATE sqlite_master SET sql = replace(sql, 'path VARCHAR', 'path VARCHAR COLLATE "
            "NOCASE') WHERE name = 'export_file'"
        )
    connection.close()
    with sqlite3.connect(path) as connection:
        connection.execute("VACUUM")
        changed = (
            "SELECT count(*) FROM sqlite_master WHERE sql LIKE '%path VARCHAR COLLATE NOCASE%'"
        )
        assert connection.execute(changed).fetchone() == (1,)
    connection.close()
    with StudyStore.open(str(path)) as store:
        study = store.create_or_get(
            name="demo",
            key="a" * 64,
            model_path="m",
            fingerprint="f",
            architecture="A",
            configuration={},
            versions={},
            seed=0,
        )
        plan_id = store.add_plan(study.id, PLAN, label="4.8")
        export_id = store.begin_export(study.id, plan_id=plan_id, container="x", path="out")
        files = [("a.json", 1, "1" * 64), ("B.json", 2, "2" * 64)]
        store.finish_export(export_id, files=files, verification={})
        (export,) = store.exports(study.id)
        store.export(study.id, tmp_path / "study")
    assert [file.path for file in export.files] == ["B.json", "a.json"]
    with zipfile.ZipFile(tmp_path / "study") as archive:
        (written,) = json.loads(archive.read("study.json"))["exports"]
    assert [file["path"] for file in written["files"]] == ["B.json", "a.json"]


def test_list_summarises_each_study(make_study, store):
    first = make_study(name="one", key="1" * 64)
    make_study(name="two", key="2" * 64)
    store.begin_stage(first.id, "discovery")
    store.finish_stage(first.id, "discovery", 0.1)
    store.begin_stage(first.id, "calibration")
    plan_id = store.add_plan(first.id, PLAN, label="4.8")
    store.begin_export(first.id, plan_id=plan_id, container="modelopt", path="out")
    one, two = store.list_studies()
    assert one.stages == {"discovery": "done", "calibration": "running"}
    assert (one.plans, one.exports, two.plans, two.name) == (1, 0, 0, "two")


def test_every_record_is_plain_json(study_id, store):
    store.begin_stage(study_id, SCORING_STAGE)
    store.put_sensitivity(
        study_id, [SensitivityCell(group="g", format="f", score=1.0, standard_error=0.1)]
    )
    plan_id = store.add_plan(study_id, PLAN, label="4.8")
    store.add_measurement(
        study_id, label="x", metric="kl", value=np.float64(1.0), interval=(0.5, 1.5)
    )
    export_id = store.begin_export(study_id, plan_id=plan_id, container="modelopt", path="out")
    store.finish_export(export_id, files=[("a", 1, "0" * 64)], verification={})
    records = [
        store.find("demo"),
        *store.list_studies(),
        *store.stages(study_id),
        *store.sensitivity(study_id),
        *store.plans(study_id),
        *store.measurements(study_id),
        *store.exports(study_id),
    ]
    assert len(records) == 7
    for record in records:
        json.dumps(asdict(record), allow_nan=False)


WRITES = {
    "begin_stage": lambda store: store.begin_stage(99, "solve"),
    "put_array": lambda store: store.put_array(99, "solve", "x", np.ones(1)),
    "put_score_batch": lambda store: store.put_score_batch(99, 0, np.ones(1), 0.1),
    "add_plan": lambda store: store.add_plan(99, PLAN, label="x"),
    "add_measurement": lambda store: store.add_measurement(99, label="x", metric="kl", value=1.0),
    "lease": lambda store: store.lease(99),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_unknown_study_id_is_refused(write, store):
    with pytest.raises(UnknownNameError, match="no study has id 99"):
        write(store)


def test_a_stage_ends_with_the_arrays_of_its_result(store, store_path, study_id):
    store.begin_stage(study_id, "calibration")
    arrays = {"scale": np.ones(3), "part|0": np.arange(4), "also part|1": np.ones(3)}
    store.put_arrays(study_id, "calibration", arrays)
    store.put_array(study_id, "other", "part|0", np.zeros(2))

    store.finish_stage(study_id, "calibration", 1.0, arrays={"scale", "never there"})

    assert list(store.arrays(study_id, "calibration")) == ["scale"]
    assert list(store.arrays(study_id, "other")) == ["part|0"]
    assert maintenance.check(str(store_path)) == []
    assert maintenance.vacuum(str(store_path)).unused_blobs == 0
