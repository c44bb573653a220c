"""What a checkpoint's tensors take is known before it is written."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoq.export import stored_sizes
from autoq.formats import FORMATS, NONE
from autoq.layers import Container


def written_bytes(planned, folder):
    planned.export(folder)
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            total += sum(file.get_tensor(name).nbytes for name in names)
    return total


def predicted_bytes(planned):
    tiny = planned.tiny
    sizes = stored_sizes(
        tiny.model,
        tiny.model_map,
        tuple(FORMATS),
        container=planned.container,
        scale_dtype=torch.bfloat16,
        source=tiny.source,
        calibration=planned.calibration,
    )
    formats = [planned.slot_formats[group.slots[0]] for group in tiny.model_map.groups]
    bits = sum(sizes.cells[g.name][f] for g, f in zip(tiny.model_map.groups, formats, strict=True))
    assert bits % 8 == 0
    return sizes.fixed_bytes + bits // 8


@pytest.mark.parametrize("container", list(Container))
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_sizes_are_those_of_the_written_tensors(name, container, mixed_plan, tmp_path):
    planned = mixed_plan(name, container)
    assert predicted_bytes(planned) == written_bytes(planned, tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
def test_transposed_and_shared_weights_and_experts_count_as_written(name, mixed_plan, tmp_path):
    planned = mixed_plan(name, Container.MODELOPT)
    assert predicted_bytes(planned) == written_bytes(planned, tmp_path / "out")


def test_input_scales_that_no_norm_takes_are_counted(uniform_plan, tmp_path):
    planned = uniform_plan("llama", Container.MODELOPT, "w4a8_awq")
    slots = planned.tiny.model_map.slots
    scaled = {
        (name, fmt): replace(entry, pre_quant_scale=torch.ones(slots[name].in_features))
        for (name, fmt), entry in planned.calibration.items()
    }
    without, planned = planned, replace(planned, calibration=scaled)
    assert predicted_bytes(planned) == written_bytes(planned, tmp_path / "out")
    # Those of layers that engines do not fuse are written in any case.
    fused = {name for g in planned.tiny.model_map.groups for name in sum(g.fusion_sets, ())}
    added = 2 * sum(slots[name].in_features for name in fused)
    assert predicted_bytes(planned) - predicted_bytes(without) == added


def test_tensors_stored_in_another_dtype_count_in_that(folder_plan, tiny, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(tiny("llama").source, source)
    weights = load_file(source / "model.safetensors")
    wide = ("model.layers.0.mlp.down_proj.weight", "model.norm.weight")
    weights.update({name: weights[name].float() for name in wide})
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})

    planned = folder_plan(source, Container.MODELOPT, NONE)
    assert predicted_bytes(planned) == written_bytes(planned, tmp_path / "out")
    plain = folder_plan(tiny("llama").source, Container.MODELOPT, NONE)
    added = 2 * sum(weights[name].numel() for name in wide)
    assert predicted_bytes(planned) - predicted_bytes(plain) == added
