"""Calibration algorithms by name in a search: stored, part of the study's key, exported, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import autoq
from autoq.api.config import ScoringConfig
from autoq.errors import InputError
from autoq.export import read_quantized
from autoq.formats import CalibrationMethod, FormatName, parse_calibration
from autoq.models import SlotName


@pytest.mark.parametrize("text", ["best", "rtn", "percentile:99.9+awq+gptq:order=given"])
def test_a_choice_survives_json_as_its_name(text: str) -> None:
    config = ScoringConfig(calibration=parse_calibration(text), formats=("nvfp4",))
    assert config.to_json()["calibration"] == text
    assert type(config.to_json()["calibration"]) is str
    assert ScoringConfig.from_json(config.to_json()) == config


def test_names_that_no_format_offered_can_take_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"names gptq, which none of the formats fp8, fp8_pc_pt"):
        ScoringConfig(calibration=parse_calibration("gptq"), formats=("fp8", "fp8_pc_pt"))
    for method in CalibrationMethod:  # which mean what each format can
        ScoringConfig(calibration=method, formats=("fp8",))


def test_an_unknown_name_is_refused_by_search(llama_folder: Path, quick: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no calibration named 'awqq'; known: best, scales, max"):
        autoq.search(llama_folder, **quick, calibration="awqq")


def test_every_choice_is_a_study_of_its_own_and_found_again_in_other_words(
    llama_folder: Path, quick: dict[str, Any]
) -> None:
    keys = {}
    for text in ("best", "rtn", "mse", "mse+gptq", "gptq+mse"):
        study = autoq.search(llama_folder, **{**quick, "calibration": text})
        keys[text] = study.record.key
        assert study.config.calibration == parse_calibration(text)
        study.store.close()
    assert keys["mse+gptq"] == keys["gptq+mse"]
    assert len(set(keys.values())) == 4


def test_codes_under_plain_scales_are_searched_and_exported_bit_for_bit(
    llama_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    study = autoq.search(
        llama_folder,
        **{**quick, "formats": ("nvfp4", "mxfp4", "int4_awq"), "effective_bits": 4.35},
        rules=["*q_proj+k_proj+v_proj=nvfp4", "*down_proj=mxfp4", "*gate_proj+up_proj=int4_awq"],
        calibration="gptq",
        container="compressed-tensors",
        export=tmp_path / "out",  # reads back and compares with what was searched
    )
    stored = study.calibration
    assert stored
    assert all(entry.codes is not None and entry.importance is None for entry in stored.values())
    assert set(read_quantized(tmp_path / "out").formats.values()) >= {"nvfp4", "mxfp4", "int4_awq"}
    study.store.close()


def test_block_scales_by_outputs_are_searched_and_exported_bit_for_bit(
    llama_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    study = autoq.search(
        llama_folder,
        **{**quick, "formats": ("nvfp4", "mxfp4", "int4_awq"), "effective_bits": 4.35},
        rules=["*q_proj+k_proj+v_proj=nvfp4", "*down_proj=mxfp4", "*gate_proj+up_proj=int4_awq"],
        calibration="awq",
        container="compressed-tensors",
        export=tmp_path / "out",  # reads back and compares with what was searched
    )
    stored = study.calibration
    assert stored
    assert all(entry.block_scale is not None and entry.codes is None for entry in stored.values())
    written = load_file(next((tmp_path / "out").glob("*.safetensors")))
    formats = read_quantized(tmp_path / "out").formats
    in_groups = [name for name, fmt in formats.items() if fmt == "int4_awq"]
    assert in_groups
    for name in in_groups:
        chosen = stored[SlotName(name), FormatName("int4_awq")].block_scale
        assert chosen is not None
        assert torch.equal(written[f"{name}.weight_scale"].float(), chosen)
    study.store.close()
