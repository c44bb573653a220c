"""INT8, and weights alone in INT4, INT8 and NVFP4: beside others, and what is theirs alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoq.export import (
    LOGITS_BOUND,
    load_checkpoint_for_evaluation,
    verify_checkpoint,
    verify_logits,
)
from autoq.formats import FormatName
from autoq.layers import Container, LayerCalibration

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
NAMES = ("int4_awq", "int8_sq", "int8_wo", "nvfp4_wo")
UniformPlan = Callable[[str, Container, str], Any]


def test_all_of_them_beside_each_other(
    uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = uniform_plan("llama", COMPRESSED, "fp8")
    cycle = (*NAMES, "fp8", "nvfp4", "w4a8_awq")
    chosen = {
        slot: FormatName(cycle[number % len(cycle)])
        for number, group in enumerate(planned.tiny.model_map.groups)
        for slot in group.slots
    }
    mixed = planned.with_formats(chosen)
    result = mixed.export(tmp_path / "out")
    verify_checkpoint(result.path, *mixed.expected())
    _, contents = load_checkpoint_for_evaluation(result.path)
    assert {slot: contents.slot_formats[slot] for slot in chosen} == chosen
    assert verify_logits(result.path, input_ids) <= LOGITS_BOUND


@pytest.mark.parametrize(
    ("fmt", "entry"),
    [
        (
            "int4_awq",
            {
                "quant_algo": "W4A16_AWQ",
                "group_size": 128,
                "has_zero_point": False,
                "pre_quant_scale": True,
            },
        ),
        ("nvfp4_wo", {"quant_algo": "W4A16_NVFP4", "group_size": 16}),
    ],
)
def test_modelopt_names_the_algorithm_in_both_manifests(
    fmt: str, entry: dict[str, Any], uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    path = uniform_plan("llama", MODELOPT, fmt).export(tmp_path / "out").path
    flat = json.loads((path / "config.json").read_text())["quantization_config"]
    nested = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    for manifest in (flat, nested):
        assert {key: manifest.get(key) for key in entry} == entry


def test_tensorrt_llm_gets_the_input_scales_of_unfused_layers_only(
    uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    planned = uniform_plan("llama", MODELOPT, "int4_awq")
    stored = load_file(planned.export(tmp_path / "out").path / "model.safetensors")
    found = {name for name in stored if name.endswith("pre_quant_scale")}
    leaves = ("self_attn.o_proj", "mlp.down_proj")
    assert found == {
        f"model.layers.{layer}.{leaf}.pre_quant_scale" for layer in (0, 1) for leaf in leaves
    }


def scaled(planned: Any, slots: tuple[str, ...], fmt: str) -> Any:
    """The plan with an input scale of twos for some slots that no norm takes."""
    changed = dict(planned.calibration)
    for slot in slots:
        entry: LayerCalibration = changed[slot, fmt]
        width = planned.tiny.model_map.slots[slot].in_features
        changed[slot, fmt] = replace(entry, pre_quant_scale=torch.full((width,), 2.0))
    return replace(planned, calibration=changed)


def test_input_scales_that_no_engine_would_read_are_refused(uniform_plan: UniformPlan) -> None:
    fused = tuple(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")
    lone = ("model.layers.0.self_attn.o_proj",)
    awq = uniform_plan("llama", MODELOPT, "int4_awq")
    assert not scaled(awq, lone, "int4_awq").refusals()
    assert "take no input scale of int4_awq there" in scaled(awq, fused, "int4_awq").refusals()[0]
    nvfp4 = uniform_plan("llama", MODELOPT, "nvfp4_wo")
    line = scaled(nvfp4, lone, "nvfp4_wo").refusals()[0]
    assert "nvfp4_wo, which no engine reads with an input scale" in line


@pytest.mark.parametrize("fmt", ["int8_sq", "int8_wo"])
def test_modelopt_holds_no_int8(fmt: str, uniform_plan: UniformPlan) -> None:
    line = uniform_plan("llama", MODELOPT, fmt).refusals()[0]
    assert "no engine reads INT8 weights from modelopt checkpoints" in line
    assert "compressed-tensors holds" in line
