"""Every architecture, both containers: written, verified, rebuilt, and run by transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autoq.errors import ExportError
from autoq.export import (
    LOGITS_BOUND,
    load_checkpoint_for_evaluation,
    read_quantized,
    simulated_checkpoint,
    transformers_logits,
    verify_checkpoint,
    verify_logits,
)
from autoq.formats import NONE, FormatName
from autoq.layers import Container
from autoq.layers.simulate import SimulatedModel
from autoq.models import forward_logits, load_model
from autoq.testing.tiny_models import TINY_ARCHITECTURES, make_tiny_model

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
W4A8 = FormatName("w4a8_awq")
EXPERTS = ("mixtral", "qwen3_moe")
MixedPlan = Callable[[str, Container], Any]
UniformPlan = Callable[[str, Container, str], Any]


def simulated_logits(planned: Any, ids: Tensor) -> Tensor:
    """Logits of the searched model, before it is exported."""
    model = load_model(planned.tiny.source)
    SimulatedModel(
        model,
        planned.tiny.model_map.slots,
        planned.slot_formats,
        planned.calibration,
        container=planned.container,
        scale_dtype=torch.bfloat16,
    )
    with torch.no_grad():
        return forward_logits(model, ids)


@pytest.mark.parametrize("container", Container)
@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_mixed_plan_reads_back_as_it_was_searched(
    name: str, container: Container, mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    planned = mixed_plan(name, container)
    quantized = [slot for slot, fmt in planned.slot_formats.items() if fmt != NONE]
    used = set(planned.slot_formats.values())
    if container is MODELOPT or name not in ("gpt2", "t5", *EXPERTS):
        assert used == {"fp8", "nvfp4", "w4a8_awq", "none"}

    result = planned.export(tmp_path / "out")
    report = verify_checkpoint(result.path, *planned.expected())
    _, contents = load_checkpoint_for_evaluation(result.path)

    assert report.quantized_matrices == len(quantized)
    assert {s: contents.slot_formats[s] for s in quantized} == {
        s: planned.slot_formats[s] for s in quantized
    }
    assert all(fmt == NONE for slot, fmt in contents.slot_formats.items() if slot not in quantized)


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_transformers_computes_what_the_simulation_computes(
    name: str, mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    result = mixed_plan(name, COMPRESSED).export(tmp_path / "out")
    assert verify_logits(result.path, input_ids) <= LOGITS_BOUND


@pytest.mark.parametrize("container", Container)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_exported_model_computes_what_the_searched_one_did(
    name: str, container: Container, mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = mixed_plan(name, container)
    result = planned.export(tmp_path / "out")
    with torch.no_grad():
        exported = forward_logits(simulated_checkpoint(result.path).model, input_ids)
    torch.testing.assert_close(exported, simulated_logits(planned, input_ids), rtol=0, atol=0)


def awq_plan(planned: Any, *, folded_only: bool) -> Any:
    """w4a8_awq everywhere, with AWQ scales: folded into norms, else stored beside the weight."""
    generator = torch.Generator().manual_seed(1)
    calibration = {}
    for group in planned.tiny.model_map.groups:
        slot = planned.tiny.model_map.slots[group.slots[0]]
        powers = torch.randint(-2, 3, (slot.in_features,), generator=generator)
        norm = _norm_before(slot.name)
        for name in group.slots:
            entry = planned.calibration[name, W4A8]
            if norm is not None or not folded_only:
                entry = replace(entry, pre_quant_scale=torch.exp2(powers.float()), folds_into=norm)
            calibration[name, W4A8] = entry
    return replace(planned, calibration=calibration)


def _norm_before(slot: str) -> str | None:
    layer, _, leaf = slot.partition(".self_attn.")
    if leaf in ("q_proj", "k_proj", "v_proj"):
        return f"{layer}.input_layernorm"
    layer, _, leaf = slot.partition(".mlp.")
    return f"{layer}.post_attention_layernorm" if leaf in ("gate_proj", "up_proj") else None


@pytest.mark.parametrize("container", Container)
def test_folded_scales_are_in_the_norms_and_change_nothing(
    container: Container, uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = awq_plan(uniform_plan("llama", container, W4A8), folded_only=container is COMPRESSED)
    result = planned.export(tmp_path / "out")
    report = verify_checkpoint(result.path, *planned.expected())
    stored = load_file(result.path / "model.safetensors")
    norm = "model.layers.0.input_layernorm"
    scale = planned.calibration["model.layers.0.self_attn.q_proj", W4A8].pre_quant_scale
    source = load_file(planned.tiny.source / "model.safetensors")[f"{norm}.weight"]

    assert report.folded_norms == 4
    assert torch.equal(stored[f"{norm}.weight"].float(), source.float() * scale)
    with torch.no_grad():
        exported = forward_logits(simulated_checkpoint(result.path).model, input_ids)
    torch.testing.assert_close(exported, simulated_logits(planned, input_ids), rtol=0, atol=0)


def test_pre_quant_scale_stands_where_tensorrt_llm_demands_it(
    uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    plain = uniform_plan("llama", MODELOPT, W4A8)
    with_scales = awq_plan(plain, folded_only=False)
    for planned, is_ones in ((plain, True), (with_scales, False)):
        stored = load_file(planned.export(tmp_path / str(is_ones)).path / "model.safetensors")
        found = {name for name in stored if name.endswith("pre_quant_scale")}
        leaves = ("self_attn.o_proj", "mlp.down_proj")
        assert found == {
            f"model.layers.{layer}.{leaf}.pre_quant_scale" for layer in (0, 1) for leaf in leaves
        }
        assert all(stored[name].dtype == torch.bfloat16 for name in found)
        assert all(bool((stored[name] == 1).all()) == is_ones for name in found)


@pytest.mark.parametrize("container", Container)
def test_tensors_are_as_the_tables_say(
    container: Container, mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    planned = mixed_plan("llama", container)
    stored = load_file(planned.export(tmp_path / "out").path / "model.safetensors")
    by_format = {fmt: slot for slot, fmt in reversed(planned.slot_formats.items())}
    for fmt, slot in by_format.items():
        if fmt == NONE:
            continue
        n, k = planned.tiny.model_map.slots[slot].out_features, 0
        k = planned.tiny.model_map.slots[slot].in_features
        found = {
            name.removeprefix(f"{slot}."): (tensor.dtype, tuple(tensor.shape))
            for name, tensor in stored.items()
            if name.startswith(f"{slot}.") and not name.endswith("pre_quant_scale")
        }
        assert found == TABLES[container, fmt](n, k), fmt


E4M3, U8, F32 = torch.float8_e4m3fn, torch.uint8, torch.float32
TABLES: dict[tuple[Container, str], Callable[[int, int], Any]] = {
    (MODELOPT, "fp8"): lambda n, k: {
        "weight": (E4M3, (n, k)),
        "weight_scale": (F32, ()),
        "input_scale": (F32, ()),
    },
    (MODELOPT, "nvfp4"): lambda n, k: {
        "weight": (U8, (n, k // 2)),
        "weight_scale": (E4M3, (n, k // 16)),
        "weight_scale_2": (F32, ()),
        "input_scale": (F32, ()),
    },
    (MODELOPT, "w4a8_awq"): lambda n, k: {
        "weight": (U8, (n // 2, k)),
        "weight_scale": (F32, (n, k // 128)),
        "weight_scale_2": (F32, ()),
        "input_scale": (F32, ()),
    },
    (COMPRESSED, "fp8"): lambda n, k: {
        "weight": (E4M3, (n, k)),
        "weight_scale": (F32, (1,)),
        "input_scale": (F32, (1,)),
    },
    (COMPRESSED, "nvfp4"): lambda n, k: {
        "weight_packed": (U8, (n, k // 2)),
        "weight_scale": (E4M3, (n, k // 16)),
        "weight_global_scale": (F32, (1,)),
        "input_global_scale": (F32, (1,)),
    },
    (COMPRESSED, "w4a8_awq"): lambda n, k: {
        "weight_packed": (torch.int32, (n, k // 8)),
        "weight_scale": (torch.bfloat16, (n, k // 128)),
        "weight_shape": (torch.int64, (2,)),
    },
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_written_one_by_one_under_their_original_names(
    name: str, uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    planned = uniform_plan(name, MODELOPT, "nvfp4")
    original = load_file(planned.tiny.source / "model.safetensors")
    checkpoint = read_quantized(planned.export(tmp_path / "out").path)
    experts = {n.removesuffix(".weight") for n in original if ".experts." in n}
    assert len(experts) == 2 * 4 * 3
    assert experts <= set(checkpoint)
    gate, up = ("w1", "w3") if name == "mixtral" else ("gate_proj", "up_proj")
    for module in experts:
        if module.endswith(f".{gate}"):
            twin = checkpoint[f"{module.removesuffix(gate)}{up}"].tensors["weight_scale_2"]
            assert torch.equal(checkpoint[module].tensors["weight_scale_2"], twin)
    routers = {n for n in original if n.endswith("gate.weight")}
    assert routers <= set(checkpoint.unquantized_names)


def test_conv1d_keeps_the_orientation_of_its_checkpoints(
    uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    planned = uniform_plan("gpt2", MODELOPT, "fp8")
    stored = load_file(planned.export(tmp_path / "out").path / "model.safetensors")
    original = load_file(planned.tiny.source / "model.safetensors")
    name = "transformer.h.0.attn.c_attn"
    assert stored[f"{name}.weight"].shape == original[f"{name}.weight"].shape
    restored = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"]
    torch.testing.assert_close(restored, original[f"{name}.weight"].float(), rtol=0.07, atol=1e-3)


def test_shards_hold_the_same_tensors_as_one_file(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    planned = mixed_plan("llama", MODELOPT)
    whole = planned.export(tmp_path / "whole")
    parts = planned.export(tmp_path / "parts", max_shard_bytes=100_000)
    verify_checkpoint(parts.path, *planned.expected())
    index = json.loads((parts.path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    joined = {k: v for shard in shards for k, v in load_file(parts.path / shard).items()}
    single = load_file(whole.path / "model.safetensors")
    assert joined.keys() == single.keys() == index["weight_map"].keys()
    assert all(torch.equal(joined[name], single[name]) for name in joined)
    for result in (whole, parts):
        found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in result.path.iterdir()}
        assert {file.path: file.sha256 for file in result.files} == found


def test_plan_without_quantised_layers_is_the_model_itself(
    uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    planned = uniform_plan("gemma3", MODELOPT, "none")
    result = planned.export(tmp_path / "out")
    verify_checkpoint(result.path, *planned.expected())
    assert not result.manifest
    assert not (result.path / "hf_quant_config.json").exists()
    stored = load_file(result.path / "model.safetensors")
    original = load_file(planned.tiny.source / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)


def test_model_held_in_float32_is_stored_as_its_folder_stores_it(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    planned = mixed_plan("qwen3", COMPRESSED)
    lifted = make_tiny_model("qwen3").float()
    other = replace(planned, tiny=replace(planned.tiny, model=lifted))
    one, two = planned.export(tmp_path / "one"), other.export(tmp_path / "two")
    assert {f.path: f.sha256 for f in one.files} == {f.path: f.sha256 for f in two.files}


def test_companions_are_copied_and_weights_and_code_are_not(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    planned = mixed_plan("llama", COMPRESSED)
    source = tmp_path / "source"
    source.mkdir()
    for file in planned.tiny.source.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("chat_template.jinja", "modeling_custom.py", "pytorch_model.bin", "notes.txt"):
        (source / name).write_text("{{ x }}")
    result = planned.export(tmp_path / "out", source=source)
    written = {file.path for file in result.files}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= written
    assert not written & {"modeling_custom.py", "pytorch_model.bin", "notes.txt"}
    assert written == {p.name for p in result.path.iterdir()}


def test_progress_counts_every_step(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    mixed_plan("opt", MODELOPT).export(
        tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    total = seen[0][1]
    assert seen == [(step, total) for step in range(1, total + 1)]


def test_provenance_is_in_both_manifests(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    result = mixed_plan("llama", MODELOPT).export(tmp_path / "out", provenance={"study": "s1"})
    nested = json.loads((result.path / "hf_quant_config.json").read_text())
    assert (
        nested["exported_by"]
        == result.manifest["exported_by"]
        == {
            "name": "autoq",
            "study": "s1",
        }
    )


def test_transformers_is_not_asked_about_the_modelopt_container(
    mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    result = mixed_plan("llama", MODELOPT).export(tmp_path / "out")
    with pytest.raises(ExportError, match=r"transformers reads compressed-tensors .* --container"):
        transformers_logits(result.path, input_ids)


def test_every_file_can_be_read_by_whom_the_umask_allows(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    """A server may run as another user than the one who exported."""
    result = mixed_plan("llama", MODELOPT).export(tmp_path / "out")

    probe = tmp_path / "probe"
    probe.touch()
    assert {path.stat().st_mode for path in result.path.iterdir()} == {probe.stat().st_mode}
