"""A search takes over what another study of its store has, and only where the bits are the same."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import numpy as np
import pytest
import torch

import autoq
from autoq.api import reuse, stages
from autoq.api.study_tables import CALIBRATION, SENSITIVITY
from autoq.api.task import LoadedModel
from autoq.search.estimators import TokenProjection
from autoq.studies import StudyStore

FEW = ("fp8", "nvfp4")
MANY = ("fp8", "w4a8_awq", "nvfp4", "nvfp4_wo")


class Notes:
    """Progress that keeps its notes."""

    def __init__(self):
        self.texts = []

    def task(self, description, total):
        from autoq.progress import SilentProgress

        return SilentProgress().task(description, total)

    def note(self, text):
        self.texts.append(text)

    def of_reuse(self):
        return [text for text in self.texts if "reused" in text]


@pytest.fixture
def run(llama_folder, quick, tmp_path):
    """Search for some formats; in the shared store, or alone in a store of its own."""

    def search(formats, alone=None, progress=None, **options):
        store = f"sqlite:///{tmp_path / alone}.db" if alone else quick["store"]
        asked = {**quick, "formats": formats, "store": store, "measure": False, **options}
        return autoq.search(llama_folder, progress=progress, **asked)

    return search


def calibration_of(study, formats):
    """Everything that is stored of the formats' calibration, in its order, as comparable values."""
    records = study.store.stage(study.id, CALIBRATION).payload["records"]
    arrays = study.store.arrays(study.id, CALIBRATION)
    found = []
    for record in records:
        if record["format"] not in formats:
            continue
        own = {k: v for k, v in record.items() if k != "importance"}
        ends = f"|{record['slot']}|{record['format']}"
        kept = {
            name: array.tobytes()
            for name, array in arrays.items()
            if name.endswith(ends) and not name.startswith("importance|")
        }
        importance = record["importance"]
        found.append((own, kept, None if importance is None else arrays[importance].tobytes()))
    return found


def scores_of(study, formats):
    table = study.sensitivity
    return table.contributions[:, :, [table.formats.index(name) for name in formats]]


def cross_terms_of(study, formats):
    places = [study.interactions.formats.index(name) for name in formats]
    return study.interactions.gram[:, places][:, :, :, places]


def assert_same_study(study, alone):
    formats = study.config.formats
    assert calibration_of(study, formats) == calibration_of(alone, formats)
    assert study.sensitivity.formats == alone.sensitivity.formats
    assert np.array_equal(scores_of(study, formats), scores_of(alone, formats))
    assert study.store.sensitivity(study.id) == alone.store.sensitivity(alone.id)
    assert np.array_equal(cross_terms_of(study, formats), cross_terms_of(alone, formats))
    assert study.plan().assignment == alone.plan().assignment


def reused_by(study, stage):
    return study.store.stage(study.id, stage).payload.get(reuse.REUSED)


def test_a_format_knows_nothing_of_the_others(run):
    """What reuse stands on: calibration and scores of a format, bit for bit, in any company."""
    few, many = run(FEW, "few"), run(MANY, "many")
    assert calibration_of(few, FEW) == calibration_of(many, FEW) != []
    assert np.array_equal(scores_of(few, FEW), scores_of(many, FEW))
    assert np.array_equal(cross_terms_of(few, FEW), cross_terms_of(many, FEW))


def test_a_search_with_more_formats_calibrates_only_those_that_are_new(run, monkeypatch):
    first = run(FEW)
    calibrated = []
    calibrate = stages.calibrate

    def noting(model, model_map, formats, *rest, **options):
        calibrated.extend(formats)
        return calibrate(model, model_map, formats, *rest, **options)

    monkeypatch.setattr(stages, "calibrate", noting)
    notes = Notes()
    second = run(MANY, progress=notes)
    assert calibrated == ["w4a8_awq", "nvfp4_wo"]
    assert second.id != first.id
    assert notes.of_reuse() == [f"calibration of fp8, nvfp4 reused from study {first.name}"]
    assert reused_by(second, CALIBRATION) == {first.name: ["fp8", "nvfp4"]}
    assert_same_study(second, run(MANY, "alone"))


def test_a_search_with_fewer_formats_runs_no_pass_at_all(run, monkeypatch):
    first = run(MANY)

    def refuse(*_, **__):
        raise AssertionError("nothing was left to compute")

    alone = run(FEW, "alone")
    monkeypatch.setattr(stages, "calibrate", refuse)
    monkeypatch.setattr(TokenProjection, "score_batch", refuse)
    notes = Notes()
    second = run(FEW, progress=notes)
    assert notes.of_reuse() == [
        f"calibration of fp8, nvfp4 reused from study {first.name}",
        f"scores of fp8, nvfp4 reused from study {first.name}",
    ]
    assert reused_by(second, SENSITIVITY) == {first.name: ["fp8", "nvfp4"]}
    assert_same_study(second, alone)


def test_calibration_is_gathered_from_several_studies(run):
    one, two = run(("fp8",), effective_bits=9.0), run(("nvfp4",))
    notes = Notes()
    both = run(FEW, progress=notes)
    assert notes.of_reuse() == [
        f"calibration of fp8 reused from study {one.name}",
        f"calibration of nvfp4 reused from study {two.name}",
    ]
    assert_same_study(both, run(FEW, "alone"))


OTHERS = [
    pytest.param({"calibration_sequences": 4}, id="fewer_tokens"),
    pytest.param({"calibration": "max"}, id="algorithm"),
    pytest.param({"container": "compressed-tensors"}, id="container"),
    pytest.param({"exclude": ("*down_proj",)}, id="layers"),
]


@pytest.mark.parametrize("change", OTHERS)
def test_nothing_is_taken_where_the_bits_would_be_others(change, run):
    run(FEW)
    notes = Notes()
    study = run(FEW, progress=notes, **change)
    assert notes.of_reuse() == []
    assert reused_by(study, CALIBRATION) is None
    assert reused_by(study, SENSITIVITY) is None


def test_another_way_of_scoring_takes_the_calibration_alone(run):
    first = run(FEW)
    notes = Notes()
    second = run(FEW, progress=notes, estimator="token_projection")
    assert notes.of_reuse() == [f"calibration of fp8, nvfp4 reused from study {first.name}"]
    assert_same_study(second, run(FEW, "alone", estimator="token_projection"))


def test_another_version_of_the_code_takes_nothing(run, monkeypatch):
    run(FEW)
    monkeypatch.setattr(reuse, "code_version", lambda packages: "another")
    notes = Notes()
    run(MANY, progress=notes)
    assert notes.of_reuse() == []


OTHER_PLACES = [
    pytest.param("version", lambda name: "another", id="library"),
    pytest.param("_processor", lambda device: "another", id="processor"),
    pytest.param("_code_of_folder", lambda loaded: ["another"], id="code_of_the_model"),
]


@pytest.mark.parametrize("name, replacement", OTHER_PLACES)
def test_another_library_processor_or_model_code_takes_nothing(name, replacement, run, monkeypatch):
    run(("fp8",), effective_bits=9.0)
    monkeypatch.setattr(reuse, name, replacement)
    notes = Notes()
    run(FEW, progress=notes)
    assert notes.of_reuse() == []


def test_code_of_the_models_folder_counts_only_where_it_may_run(tmp_path):
    loaded = LoadedModel(torch.nn.Linear(1, 1), tmp_path, "f", torch.float32, True)
    (tmp_path / "modeling.py").write_text("a = 1\n")
    before = reuse._code_of_folder(loaded)
    (tmp_path / "modeling.py").write_text("a = 2\n")
    assert reuse._code_of_folder(loaded) != before
    assert reuse._code_of_folder(replace(loaded, trust_remote_code=False)) is None


def test_code_version_is_of_what_the_files_hold(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "one.py").write_text("a = 1\n")
    module = type("Module", (), {"__path__": [str(package)]})
    monkeypatch.setattr(reuse.importlib, "import_module", lambda name: module)
    version = reuse.code_version.__wrapped__
    before = version(("package",))
    assert version(("package",)) == before
    (package / "one.py").write_text("a = 2\n")
    changed = version(("package",))
    (package / "one.py").rename(package / "two.py")
    assert len({before, changed, version(("package",))}) == 3


def test_damaged_results_are_computed_anew_and_mended(run, tmp_path):
    first = run(FEW)
    before = calibration_of(first, FEW)
    connection = sqlite3.connect(tmp_path / "studies.db")
    with connection:
        connection.execute("UPDATE blob_chunk SET data = zeroblob(length(data))")
    connection.close()
    notes = Notes()
    second = run(MANY, progress=notes)
    (said,) = notes.of_reuse()
    assert f"study {first.name} is not reused: its array" in said and "damaged" in said
    assert_same_study(second, run(MANY, "alone"))
    assert calibration_of(first, FEW) == before


@pytest.mark.parametrize(
    ("method", "had", "asked"),
    [("study", FEW, MANY), ("copy_arrays", FEW, MANY), ("score_batches", MANY, FEW)],
)
def test_a_study_that_is_removed_while_it_is_taken_over_is_not(
    method, had, asked, run, monkeypatch
):
    first = run(had)
    own = getattr(StudyStore, method)
    left = [first.id]

    def removed_first(store, asked_for, *arguments, **options):
        if asked_for in left:
            store.delete_study(left.pop())
        return own(store, asked_for, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, method, removed_first)
        second = run(asked)
    assert not left  # it was asked for
    assert_same_study(second, run(asked, "alone"))


def test_a_damaged_row_of_another_study_stops_no_search(run, tmp_path):
    first = run(FEW)
    first.store.close()
    connection = sqlite3.connect(tmp_path / "studies.db")
    with connection:
        connection.execute("UPDATE stage SET seconds = seconds + 1")
    connection.close()
    second = run(MANY)
    assert reused_by(second, CALIBRATION) in (None, {})
    assert_same_study(second, run(MANY, "alone"))
