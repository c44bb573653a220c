"""What the store keeps of calibration comes back to the bit; what older versions kept is read."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoq.api.config import ScoringConfig
from autoq.api.serialize import calibration_from_plain, calibration_to_plain
from autoq.errors import InputError
from autoq.formats import CalibrationMethod
from autoq.layers import LayerCalibration, LowRank


def same(left, right):
    return (left is None and right is None) or torch.equal(left, right)


def test_calibrations_come_back_to_the_bit_and_shared_importances_are_stored_once():
    importance = torch.rand(16, generator=torch.Generator().manual_seed(0))
    scale = torch.exp2(torch.arange(16) % 5 - 2.0)
    shared = LayerCalibration(
        weight_amax=1.5,
        input_amax=0.1,
        pre_quant_scale=scale,
        folds_into="norm",
        importance=importance,
        input_rows=7,
    )
    branch = LowRank(torch.rand(2, 16).bfloat16(), torch.rand(3, 2).bfloat16())
    table = {
        ("q", "nvfp4"): shared,
        ("k", "nvfp4"): shared,
        ("o", "nvfp4"): LayerCalibration(weight_amax=2.0, input_amax=3.0, importance=scale),
        ("q", "fp8"): LayerCalibration(weight_amax=1.25, input_amax=0.5),
        ("q", "nvfp4_svdquant"): replace(shared, low_rank=branch),
        ("k", "int4_awq"): replace(shared, block_scale=torch.rand(3, 1)),
        ("v", "nvfp4"): replace(shared, block_scale=torch.rand(3, 1).to(torch.float8_e4m3fn)),
        ("v", "mxfp4"): replace(shared, block_scale=torch.full((3, 1), 120, dtype=torch.uint8)),
        ("q", "w4a8_awq"): replace(shared, codes=torch.arange(24, dtype=torch.uint8).view(3, 8)),
    }
    records, arrays = calibration_to_plain(table)
    assert len([name for name in arrays if name.startswith("importance")]) == 2
    found = calibration_from_plain(json.loads(json.dumps(records)), arrays)
    assert set(found) == set(table)
    for key, entry in table.items():
        assert same(found[key].pre_quant_scale, entry.pre_quant_scale)
        assert same(found[key].importance, entry.importance)
        assert same(found[key].codes, entry.codes)
        assert (found[key].block_scale is None) == (entry.block_scale is None)
        if entry.block_scale is not None:
            assert found[key].block_scale.dtype == entry.block_scale.dtype
            assert same(found[key].block_scale.float(), entry.block_scale.float())
        assert (found[key].low_rank is None) == (entry.low_rank is None)
        if entry.low_rank is not None:
            assert found[key].low_rank.down.dtype == torch.bfloat16
            assert torch.equal(found[key].low_rank.down, entry.low_rank.down)
            assert torch.equal(found[key].low_rank.up, entry.low_rank.up)
        assert found[key].folds_into == entry.folds_into
        assert found[key].input_rows == entry.input_rows
        assert found[key].weight_amax == entry.weight_amax
        assert found[key].input_amax == entry.input_amax


def test_records_of_before_importances_are_read():
    record = {
        "slot": "q",
        "format": "w4a8_awq",
        "weight_amax": 1.0,
        "input_amax": 2.0,
        "has_input_scale": True,
        "folds_into": None,
    }
    arrays = {"input_scale|q|w4a8_awq": np.array([0.5, 2.0], dtype=np.float32)}
    found = calibration_from_plain([record], arrays)["q", "w4a8_awq"]
    assert found.importance is None
    assert found.pre_quant_scale.tolist() == [0.5, 2.0]


def test_configurations_of_before_the_choice_mean_plain_calibration():
    stored = ScoringConfig().to_json()
    assert stored["calibration"] == "best"
    assert ScoringConfig.from_json(json.loads(json.dumps(stored))) == ScoringConfig()
    del stored["calibration"]
    assert ScoringConfig.from_json(stored).calibration is CalibrationMethod.MAX


def test_an_unknown_calibration_is_refused_with_the_known_ones():
    stored = {**ScoringConfig().to_json(), "calibration": "awqq"}
    with pytest.raises(InputError, match="no calibration named 'awqq'; known: best, scales, max"):
        ScoringConfig.from_json(stored)
