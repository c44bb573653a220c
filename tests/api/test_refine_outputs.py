"""The original's outputs are shared by the workers of a refinement and by later runs."""

import json
from contextlib import contextmanager

import pytest

from autoq.api import open_study, search
from autoq.api.refinement._data import refine_data
from autoq.api.refinement.measure import TrialMeasurer
from autoq.api.refinement.refining import RefineOptions
from autoq.errors import InputError
from autoq.evaluators.cache import LogitsCache
from tests.api.refinements import KL, QUICK, SMALL, entries


@pytest.fixture
def stored(llama_folder, tmp_path):
    """A study in a store that is a file, and the store's URL."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    return search(llama_folder, store=url, **QUICK), url


@pytest.fixture
def runs(monkeypatch):
    """How many batches the original was run on, by everybody."""
    counted = []
    own = TrialMeasurer._run_all

    def counting(self, part):
        counted.extend(part)
        return own(self, part)

    monkeypatch.setattr(TrialMeasurer, "_run_all", counting)
    return counted


@contextmanager
def measuring(study, outputs):
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    with TrialMeasurer(study, tokens, KL, outputs=outputs) as measurer:
        yield measurer


def _is_selection(study, ids):
    tokens = refine_data(study, RefineOptions(**SMALL)).selection.ids.tolist()
    return ids.tolist()[0] in tokens


def test_the_next_worker_does_not_run_the_original_and_measures_the_same(stored, runs, tmp_path):
    study, url = stored
    plan = study.plan().to_plan().assignment
    with measuring(study, None) as measurer:
        expected = measurer.measure(plan)
    assert len(runs) == 2
    for total in (4, 4):  # 2 more for the first that shares, none for the second
        with measuring(open_study(None, url), LogitsCache(tmp_path / "outputs")) as measurer:
            assert measurer.measure(plan) == expected
            assert measurer.measure(plan) == expected
        assert len(runs) == total


def test_a_spoilt_file_changes_nothing_but_the_work(stored, runs, tmp_path):
    study, _ = stored
    plan, said = study.plan().to_plan().assignment, []
    outputs = LogitsCache(tmp_path / "outputs", note=said.append)
    with measuring(study, outputs) as measurer:
        expected = measurer.measure(plan)
    file = next((tmp_path / "outputs").rglob("000001.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(content)
    runs.clear()
    with measuring(study, outputs) as measurer:
        assert measurer.measure(plan) == expected
    assert len(runs) == 1
    assert [text for text in said if "000001.safetensors is not what was written" in text]


def test_outputs_that_do_not_fit_to_the_bit_stay_in_memory(stored, runs, tmp_path):
    study, _ = stored
    plan = study.plan().to_plan().assignment
    for _ in range(2):
        with measuring(study, LogitsCache(tmp_path / "outputs", max_bytes=10_000)) as measurer:
            measurer.measure(plan)
    assert len(runs) == 4
    assert not (tmp_path / "outputs").exists()


def test_a_refinement_leaves_them_beside_the_store_and_another_finds_them(stored, runs, tmp_path):
    study, url = stored
    study.refine(trials=2, **SMALL)
    assert list((tmp_path / "studies.db.outputs").rglob("*.safetensors"))
    before = entries(study)
    runs.clear()
    again = open_study(None, url)
    again.refine(trials=2, seed=1, **SMALL)
    files = len(list((tmp_path / "studies.db.outputs").rglob("*.safetensors")))
    assert files == 2  # the same ones: what trials choose by is the same
    assert not [ids for ids in runs if _is_selection(again, ids)]
    assert json.loads(entries(again, seed=1)[0][2]) == json.loads(before[0][2])


def test_another_folder_can_be_named_and_must_be_one(stored, tmp_path):
    study, _ = stored
    study.refine(trials=1, outputs=str(tmp_path / "mine"), **SMALL)
    assert list((tmp_path / "mine").rglob("*.safetensors"))
    assert not (tmp_path / "studies.db.outputs").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="must be a folder that can be written to"):
        study.refine(trials=2, outputs=str(tmp_path / "file" / "inside"), **SMALL)
