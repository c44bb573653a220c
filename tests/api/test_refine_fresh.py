"""Where fewer sequences are left to confirm on than were asked for, that is said."""

import numpy as np
import pytest

import autoq
from autoq.api.refinement._data import refine_data
from autoq.api.refinement.refining import RefineOptions
from autoq.cli._refine import _lines


@pytest.fixture
def short_of_data(llama_folder, quick, tmp_path):
    """A study with 24 sequences calibrated on, 12 more to calibrate on, and 12 held out."""
    ids = np.random.default_rng(0).integers(4, 260, (48, 32))
    np.save(tmp_path / "ids.npy", ids)
    quick |= {"calibration_sequences": 24, "calibration_data": str(tmp_path / "ids.npy")}
    return autoq.search(llama_folder, **quick)


@pytest.mark.parametrize(("wanted", "found"), [(64, 8), (12, 12), (8, 8)])
def test_fewer_fresh_sequences_than_asked_for_are_said(short_of_data, wanted, found):
    options = RefineOptions(sequences=4, fresh_sequences=wanted, held_out_sequences=4)
    data = refine_data(short_of_data, options)
    assert len(data.fresh.ids) == found
    if found == wanted:
        assert data.remark is None
    else:
        assert f"{found} fresh sequences instead of {wanted}" in data.remark


def test_the_result_and_the_command_line_say_it(short_of_data):
    result = short_of_data.refine(
        trials=1, sequences=4, fresh_sequences=64, held_out_sequences=4
    ).as_plain()
    assert "8 fresh sequences instead of 64" in result["remark"]
    assert any("8 fresh sequences instead of 64" in line for line in _lines(result))
