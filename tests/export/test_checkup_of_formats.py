"""What `autoq verify` says of formats whose names, shapes or experts engines treat in their own way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoq.export.checkup import CheckpointReport, Outcome, _files, check_checkpoint
from autoq.formats import FormatName, parse_target
from autoq.layers import Container
from autoq.models import SlotKind

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS


def outcome(folder: Path, module: str, target: str) -> Outcome:
    report = check_checkpoint(folder, parse_target(target))
    return next(layer.outcomes[target] for layer in report.layers if layer.name == module)


@pytest.mark.parametrize("fmt", ["fp8", "fp8_pc_pt", "fp8_block", "mxfp8", "int4_awq", "nvfp4_wo"])
def test_weights_that_are_stored_turned_have_no_fault(
    uniform_plan: Any, tmp_path: Path, fmt: str
) -> None:
    plan = uniform_plan("gpt2", MODELOPT, fmt)
    assert SlotKind.CONV1D in {slot.kind for slot in plan.tiny.model_map.slots.values()}
    report: CheckpointReport = check_checkpoint(plan.export(tmp_path / "out").path)
    assert report.faults == ()


@pytest.mark.parametrize("spelling", ["fp8_pb_wo", "FP8_PB_WO"])
def test_vllm_takes_blocks_of_single_layers_in_any_spelling(
    uniform_plan: Any, tmp_path: Path, spelling: str
) -> None:
    plan = uniform_plan("llama", MODELOPT, "fp8_block")
    mixed = {
        slot: FormatName("fp8" if "self_attn" in slot else "fp8_block")
        for slot in plan.slot_formats
    }
    folder = plan.with_formats(mixed).export(tmp_path / "out").path
    for name in ("config.json", "hf_quant_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("fp8_pb_wo", spelling))
    found = outcome(folder, "model.layers.0.mlp.gate_proj", "vllm:h200")
    assert found.does == "native"


def test_experts_that_an_engine_does_not_run_in_a_format(uniform_plan: Any, tmp_path: Path) -> None:
    folder = uniform_plan("mixtral", MODELOPT, "fp8_pc_pt").export(tmp_path / "out").path
    expert = "model.layers.0.block_sparse_moe.experts.0.w1"
    assert outcome(folder, expert, "vllm:h200").does == "refuses"
    assert outcome(folder, expert, "tensorrt-llm:h200").does == "native"
    assert outcome(folder, "model.layers.0.self_attn.q_proj", "vllm:h200").does == "native"


def test_int8_of_other_tools_is_nonsense_to_transformers(uniform_plan: Any, tmp_path: Path) -> None:
    """As long as the codes have the weights' shape, transformers loads them without their scales."""
    folder = uniform_plan("llama", MODELOPT, "fp8_pc_pt").export(tmp_path / "out").path
    for name in ("config.json", "hf_quant_config.json"):
        path = folder / name
        text = path.read_text()
        path.write_text(text.replace("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL"))
    tensors = load_file(folder / "model.safetensors")
    codes = {
        name: tensor.view(torch.int8)
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float8_e4m3fn
    }
    changed(folder, lambda t: t.update(codes))
    module = "model.layers.0.mlp.down_proj"
    assert outcome(folder, module, "transformers:cpu").does == "SILENTLY UNQUANTISED"
    assert outcome(folder, module, "vllm:h200").does == "refuses"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_shape_that_the_codes_have_not(uniform_plan: Any, tmp_path: Path) -> None:
    folder = uniform_plan("llama", COMPRESSED, "int8_wo").export(tmp_path / "out").path
    name = "model.layers.0.mlp.down_proj.weight_shape"
    rows, columns = load_file(folder / "model.safetensors")[name].tolist()
    padded = torch.tensor([rows, columns - 1])
    assert check_checkpoint(changed(folder, lambda t: t.update({name: padded}))).faults == ()
    swapped = torch.tensor([columns, rows + 1])
    (fault,) = check_checkpoint(changed(folder, lambda t: t.update({name: swapped}))).faults
    assert fault.startswith(f"{name} must hold [{rows}, {columns}]")


def test_fused_scales_in_a_dtype_that_they_cannot_have(uniform_plan: Any, tmp_path: Path) -> None:
    folder = uniform_plan("llama", MODELOPT, "nvfp4_wo").export(tmp_path / "out").path
    names = [f"model.layers.0.mlp.{part}_proj.weight_scale_2" for part in ("gate", "up")]
    wrong = torch.ones((), dtype=torch.float8_e4m3fn)
    change = {name: wrong.clone() for name in names}
    faults = check_checkpoint(changed(folder, lambda t: t.update(change))).faults
    assert sorted(fault.split()[0] for fault in faults) == sorted(names)


def test_a_file_is_opened_once_for_many_tensors(
    uniform_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = uniform_plan("llama", MODELOPT, "fp8").export(tmp_path / "out").path
    opened: list[str] = []

    def counted(file: str, framework: str) -> Any:
        opened.append(file)
        return safe_open(file, framework=framework)

    monkeypatch.setattr(_files, "safe_open", counted)
    assert check_checkpoint(folder).faults == ()
    assert opened == [str(folder / "model.safetensors")]


@pytest.mark.parametrize("value", [1, "lm_head", {"lm_head": 1}])
def test_exclusions_that_are_no_list(uniform_plan: Any, tmp_path: Path, value: object) -> None:
    folder = uniform_plan("llama", MODELOPT, "int4_awq").export(tmp_path / "out").path
    path = folder / "hf_quant_config.json"
    content = json.loads(path.read_text())
    content["quantization"]["exclude_modules"] = value
    path.write_text(json.dumps(content))
    (fault,) = check_checkpoint(folder).faults
    assert "exclude_modules differ" in fault
