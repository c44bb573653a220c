"""transformers' own fp8 checkpoints: what is in them, read back, loaded, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from autoq.errors import ExportError, VerificationError
from autoq.export import (
    export_checkpoint,
    load_packed,
    read_quantized,
    simulated_checkpoint,
    verify_checkpoint,
)
from autoq.export._types import Spelling
from autoq.export.transformers_fp8 import verify_transformers_weights
from autoq.formats import NONE, FormatName
from autoq.layers import Container
from autoq.models import SlotName, discover, forward_logits

BLOCKS, FP8 = FormatName("fp8_block"), Spelling.TRANSFORMERS_FP8
DOWN = "model.layers.1.mlp.down_proj"
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
Planned = Any


@pytest.fixture
def plan(tiny: Callable[[str], Any], uniform_plan: Any) -> Callable[..., Planned]:
    """A family in blocks of FP8, but for some layers."""

    def make(name: str = "llama", without: tuple[str, ...] = (DOWN, GATE, UP)) -> Planned:
        whole = uniform_plan(name, Container.COMPRESSED_TENSORS, BLOCKS)
        return whole.with_formats(
            {slot: NONE if slot in without else BLOCKS for slot in whole.slot_formats}
        )

    return make


def write(planned: Planned, folder: Path) -> Any:
    return planned.export(folder, spelling=FP8)


def test_the_manifest_and_the_tensors(plan: Any, tmp_path: Path) -> None:
    """Against the specification of DeepSeek-V3's layout, by hand."""
    result = write(plan(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    manifest = config["quantization_config"]
    assert manifest == result.manifest
    assert manifest["exported_by"]["name"] == "autoq"
    assert {key: manifest[key] for key in list(manifest)[:3]} == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    fused = "model.layers.0.mlp.gate_up_proj"  # what SGLang asks for
    assert set(manifest["modules_to_not_convert"]) == {"lm_head", DOWN, GATE, UP, fused}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = "model.layers.0"
    for name, rows, columns, grid in (
        (f"{layer}.mlp.down_proj", 128, 256, [1, 2]),
        (f"{layer}.self_attn.k_proj", 64, 128, [1, 1]),
        ("model.layers.1.mlp.up_proj", 256, 128, [2, 1]),
    ):
        assert stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
        assert list(stored[f"{name}.weight"].shape) == [rows, columns]
        scale = stored[f"{name}.weight_scale_inv"]
        assert (scale.dtype, list(scale.shape)) == (torch.float32, grid)
    assert not any(name.endswith("weight_scale") for name in stored)
    assert stored[f"{DOWN}.weight"].dtype == torch.bfloat16
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_scales_are_the_blocks_largest_magnitudes(plan: Any, tmp_path: Path) -> None:
    planned = plan()
    write(planned, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    weight = planned.tiny.model.get_parameter(f"{name}.weight").detach().float()
    scale = weight.reshape(2, 128, 128).abs().amax((1, 2)).reshape(2, 1) / 448
    assert torch.equal(stored[f"{name}.weight_scale_inv"], scale)
    codes = (weight / scale.repeat_interleave(128, 0)).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(stored[f"{name}.weight"].view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "t5", "bert"])
def test_it_reads_back_and_transformers_loads_it(plan: Any, tmp_path: Path, name: str) -> None:
    planned = plan(name)
    write(planned, tmp_path / "out")
    report = verify_checkpoint(tmp_path / "out", *planned.expected(), spelling=FP8)
    quantized = [slot for slot, fmt in planned.slot_formats.items() if fmt != NONE]
    assert report.quantized_matrices == len(quantized)
    assert verify_transformers_weights(tmp_path / "out") == len(quantized)


def test_it_runs_as_it_is_stored(plan: Any, tmp_path: Path, input_ids: torch.Tensor) -> None:
    write(plan(), tmp_path / "out")
    loaded = load_packed(tmp_path / "out")
    with torch.no_grad():
        found = forward_logits(loaded, input_ids)
        expected = forward_logits(simulated_checkpoint(tmp_path / "out").model, input_ids)
    assert torch.equal(found, expected)
    assert loaded.config.quantization_config["quant_method"] == "fp8"
    assert "PackedLinear" in type(loaded.get_submodule("model.layers.0.mlp.down_proj")).__name__


def test_other_formats_are_refused(uniform_plan: Any, tmp_path: Path) -> None:
    planned = uniform_plan("llama", Container.COMPRESSED_TENSORS, "fp8")
    with pytest.raises(ExportError, match="cannot be fp8 in transformers-fp8, which holds fp8_b"):
        write(planned, tmp_path / "out")
    in_modelopt = uniform_plan("llama", Container.MODELOPT, BLOCKS)
    with pytest.raises(ExportError, match="a spelling of compressed-tensors' blocks"):
        write(in_modelopt, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_transformers_would_take_for_others_are_refused(
    tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    """192 rows have two scales, and transformers makes two blocks of 96 of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    ).bfloat16()
    model_map = discover(model)
    odd = {SlotName(f"model.layers.0.mlp.{part}_proj") for part in ("gate", "up")}
    formats = {slot: BLOCKS if slot in odd else NONE for slot in model_map.slots}
    calibration = type(tiny("llama"))(Path(), model, model_map).calibrate(formats)
    with pytest.raises(ExportError, match="has 192 rows, no multiple of 128, and transf"):
        export_checkpoint(
            model,
            model_map,
            formats,
            calibration,
            source=None,
            destination=tmp_path / "out",
            container=Container.COMPRESSED_TENSORS,
            scale_dtype=torch.bfloat16,
            spelling=FP8,
        )


def damaged(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    file, settings = folder / "model.safetensors", folder / "config.json"
    tensors, config = load_file(file), json.loads(settings.read_text(encoding="utf-8"))
    change(tensors, config["quantization_config"])
    save_file(tensors, file, metadata={"format": "pt"})
    settings.write_text(json.dumps(config), encoding="utf-8")


def _block_size(_: Any, manifest: dict[str, Any]) -> None:
    manifest["weight_block_size"] = [64, 128]


def _names(_: Any, manifest: dict[str, Any]) -> None:
    manifest["modules_to_not_convert"] = "lm_head"


def _one_too_many(_: Any, manifest: dict[str, Any]) -> None:
    manifest["modules_to_not_convert"].append("model.layers.0.mlp.down_proj")


def _lost_scale(tensors: dict[str, Any], _: Any) -> None:
    del tensors["model.layers.0.mlp.down_proj.weight_scale_inv"]


@pytest.mark.parametrize(
    "change,reason",
    [
        (_block_size, r"must have weight_block_size \[128, 128\] to be read, got \[64, 128\]"),
        (_names, "modules_to_not_convert must be a list of names"),
        (_one_too_many, "down_proj has scales, and the manifest leaves it out"),
        (_lost_scale, "lacks model.layers.0.mlp.down_proj.weight_scale"),
    ],
)
def test_damage_is_found(plan: Any, tmp_path: Path, change: Any, reason: str) -> None:
    write(plan(), tmp_path / "out")
    damaged(tmp_path / "out", change)
    with pytest.raises(ExportError, match=reason):
        read_quantized(tmp_path / "out")


def test_verification_finds_what_differs(plan: Any, tmp_path: Path) -> None:
    planned = plan()
    write(planned, tmp_path / "out")
    expected = planned.expected()
    with pytest.raises(VerificationError, match="in the words of transformers-fp8, not own"):
        verify_checkpoint(tmp_path / "out", *expected)
    other = replace(planned, slot_formats={**planned.slot_formats, SlotName(DOWN): BLOCKS})
    with pytest.raises(VerificationError, match="if and only if it is not quantised"):
        verify_checkpoint(tmp_path / "out", *other.expected(), spelling=FP8)

    def doubled(tensors: dict[str, Any], _: Any) -> None:
        tensors["model.layers.0.mlp.down_proj.weight_scale_inv"] *= 2

    damaged(tmp_path / "out", doubled)
    with pytest.raises(VerificationError, match="weight_scale_inv differs from the searched"):
        verify_checkpoint(tmp_path / "out", *expected, spelling=FP8)


def test_transformers_is_caught_with_other_weights(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoq.export import transformers_fp8

    def altered(*arguments: Any) -> nn.Module:
        model = loads(*arguments)
        model.get_parameter("model.layers.0.mlp.down_proj.weight").data[5, 7] += 1
        return model

    write(plan(), tmp_path / "out")
    loads = transformers_fp8.transformers_model
    monkeypatch.setattr(transformers_fp8, "transformers_model", altered)
    with pytest.raises(VerificationError, match=r"down_proj of .* is not what was searched"):
        verify_transformers_weights(tmp_path / "out")
