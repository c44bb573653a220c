"""What export refuses, how it fails, and what verification and reading find."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoq.errors import ExportError, ModelError, VerificationError
from autoq.export import _shards as shards_module
from autoq.export import (
    load_checkpoint_for_evaluation,
    read_quantized,
    refusals,
    verify_checkpoint,
    warnings_for,
)
from autoq.export._manifest_reading import pattern_matcher
from autoq.export._plan import checkpoint_names
from autoq.export._types import Spelling
from autoq.formats import NONE, FormatName
from autoq.layers import Container
from autoq.models import load_model

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
MixedPlan = Callable[[str, Container], Any]
UniformPlan = Callable[[str, Container, str], Any]


# --- plans that a container cannot hold ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "container", "fmt", "message"),
    [
        ("gpt2", COMPRESSED, "fp8", r"no quantised Conv1D, as transformer\.h\.0\.attn\.c_attn"),
        ("mixtral", COMPRESSED, "nvfp4", r"fused experts .* model\.layers\.0\.mlp\.experts\.0"),
        ("qwen3_moe", COMPRESSED, "fp8", r"fused experts .* leave it at none, or use --container"),
        ("t5", COMPRESSED, "nvfp4", r"T5 cannot load packed weights .* as nvfp4; make it fp8"),
        ("t5", COMPRESSED, "w4a8_awq", r"T5 cannot load packed weights .* as w4a8_awq"),
    ],
)
def test_what_readers_cannot_load_is_refused_by_name_before_any_work(
    name: str,
    container: Container,
    fmt: str,
    message: str,
    uniform_plan: UniformPlan,
    tmp_path: Path,
) -> None:
    planned = uniform_plan(name, container, fmt)
    with pytest.raises(ExportError, match=message):
        planned.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def changed_entry(planned: Any, slot: str, **changes: object) -> Any:
    key = (slot, planned.slot_formats[slot])
    entry = replace(planned.calibration[key], **changes)
    return replace(planned, calibration={**planned.calibration, key: entry})


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
ROUGH = torch.full((128,), 0.3)


@pytest.mark.parametrize(
    ("container", "fmt", "slot", "changes", "message"),
    [
        (
            COMPRESSED,
            "w4a8_awq",
            DOWN,
            {"pre_quant_scale": torch.full((256,), 0.5)},
            r"no place for the AWQ scale of model\.layers\.0\.mlp\.down_proj",
        ),
        (MODELOPT, "w4a8_awq", Q, {"pre_quant_scale": ROUGH}, r"q_proj must hold powers of two"),
        (
            MODELOPT,
            "nvfp4",
            Q,
            {"weight_amax": 9.0},
            r"engines fuse .*q_proj.* weight_amax differs",
        ),
        (MODELOPT, "fp8", Q, {"input_amax": 9.0}, r"engines fuse .*q_proj.* input_amax differs"),
        (MODELOPT, "w4a8_awq", Q, {"pre_quant_scale": ROUGH}, r"their AWQ scales differ"),
        (MODELOPT, "fp8", Q, {"input_amax": float("nan")}, r"input_amax of .* finite .* got nan"),
    ],
)
def test_calibration_that_engines_would_misread_is_refused(
    container: Container,
    fmt: str,
    slot: str,
    changes: dict[str, object],
    message: str,
    uniform_plan: UniformPlan,
) -> None:
    import re

    lines = changed_entry(uniform_plan("llama", container, fmt), slot, **changes).refusals()
    assert any(re.search(message, line) for line in lines), lines


def test_members_of_a_group_in_different_formats_are_refused(uniform_plan: UniformPlan) -> None:
    planned = uniform_plan("llama", MODELOPT, "fp8")
    split = planned.with_formats({**planned.slot_formats, Q: NONE})
    assert "takes one format, got fp8, none; choose one" in split.refusals()[0]


def test_two_scales_for_one_norm_are_refused(uniform_plan: UniformPlan) -> None:
    planned = uniform_plan("llama", MODELOPT, "w4a8_awq")
    for leaf, scale in (("q_proj", 0.5), ("k_proj", 0.5), ("v_proj", 0.25)):
        planned = changed_entry(
            planned,
            f"model.layers.0.self_attn.{leaf}",
            pre_quant_scale=torch.full((128,), scale),
            folds_into="model.layers.0.input_layernorm",
        )
    assert any("a norm takes one AWQ scale" in line for line in planned.refusals())


def test_missing_calibration_and_misfitting_shape_are_refused(uniform_plan: UniformPlan) -> None:
    planned = uniform_plan("llama", MODELOPT, "fp8")
    assert (
        f"{Q} has no calibration for fp8; calibrate it first"
        in replace(planned, calibration={}).refusals()
    )
    strange = planned.with_formats({"model.nowhere": FormatName("fp8")})
    assert "the model has no such slot" in strange.refusals()[0]


def test_experts_without_a_known_spelling_are_refused(uniform_plan: UniformPlan) -> None:
    planned = uniform_plan("qwen3_moe", MODELOPT, "fp8")
    model = load_model(planned.tiny.source)
    model.config.model_type = "novel_moe"
    novel = replace(planned, tiny=replace(planned.tiny, model=model))
    assert "spelled on disk is not known for model_type 'novel_moe'" in novel.refusals()[0]


def test_nan_in_a_weight_names_the_layer(uniform_plan: UniformPlan, tmp_path: Path) -> None:
    planned = uniform_plan("llama", MODELOPT, "fp8")
    broken = load_model(planned.tiny.source)
    broken.get_submodule(Q).weight.data[3, 5] = float("nan")
    damaged = replace(planned, tiny=replace(planned.tiny, model=broken))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj: .*finite"):
        damaged.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("container", "fmt", "message"),
    [
        (MODELOPT, "fp8", "transformers cannot read the modelopt container"),
        (MODELOPT, "w4a8_awq", r"w4a8_awq in this .* loads in tensorrt-llm on 8\.9 to 9\.0 only"),
        (MODELOPT, "int4_awq", r"loads in tensorrt-llm on 8\.0 to 9\.0 only"),
        (MODELOPT, "nvfp4_wo", r"loads in vllm on 7\.5 to 12\.0; sglang on 8\.0 to 12\.0 only"),
        (COMPRESSED, "fp8", "TensorRT-LLM does not read fp8"),
        (COMPRESSED, "w4a8_awq", r"loads in vllm on 9\.0; transformers anywhere only"),
        (COMPRESSED, "int8_sq", r"vllm on 7\.5 to 9\.0; sglang on 8\.0 to 9\.0; transformers"),
    ],
)
def test_warnings_name_who_can_load_it(
    container: Container, fmt: str, message: str, uniform_plan: UniformPlan
) -> None:
    import re

    planned = uniform_plan("llama", container, fmt)
    tiny = planned.tiny
    lines = warnings_for(
        tiny.model, tiny.model_map, planned.slot_formats, container, torch.bfloat16
    )
    assert any(re.search(message, line) for line in lines), lines


@pytest.mark.parametrize(
    ("container", "fmt", "engines"),
    [
        (COMPRESSED, "w4a8_awq", ["vLLM"]),
        (COMPRESSED, "fp8_block", ["TensorRT-LLM", "vLLM"]),
        (MODELOPT, "fp8_block", ["vLLM"]),
        (COMPRESSED, "fp8_pc_pt", []),
    ],
)
def test_warnings_name_layers_whose_rows_an_engine_does_not_take(
    container: Container, fmt: str, engines: list[str], uniform_plan: UniformPlan
) -> None:
    planned = uniform_plan("llama", container, fmt)  # two key/value heads of 32: 64 rows
    tiny = planned.tiny
    narrow = {slot for slot, entry in tiny.model_map.slots.items() if entry.out_features % 128}
    assert narrow
    lines = warnings_for(
        tiny.model, tiny.model_map, planned.slot_formats, container, torch.bfloat16
    )
    found = [line for line in lines if "out_features divisible by 128" in line]
    assert [line.split()[0] for line in found] == engines
    assert all(any(slot in line for slot in narrow) for line in found)


@pytest.mark.parametrize(
    ("name", "container", "formats", "spelling", "is_warned"),
    [
        ("llama", COMPRESSED, ["fp8_block"], Spelling.TRANSFORMERS_FP8, True),
        ("llama", COMPRESSED, ["fp8_block"], Spelling.OWN, False),
        ("llama", MODELOPT, ["mxfp8"], Spelling.OWN, True),
        ("llama", MODELOPT, ["mxfp8", "nvfp4"], Spelling.OWN, False),
        ("llama", COMPRESSED, ["mxfp8"], Spelling.OWN, False),
        ("qwen3", COMPRESSED, ["fp8_block"], Spelling.TRANSFORMERS_FP8, False),
        ("qwen3", MODELOPT, ["mxfp8"], Spelling.OWN, False),
    ],
)
def test_warnings_name_scales_that_sglang_passes_over(
    name: str,
    container: Container,
    formats: list[str],
    spelling: Spelling,
    is_warned: bool,
    tiny: Callable[[str], Any],
) -> None:
    """Where `autoq verify` says that SGLang computes nonsense, `autoq export` does."""
    loaded = tiny(name)
    plan = {
        slot: FormatName(formats[number % len(formats)])
        for number, slot in enumerate(loaded.model_map.slots)
    }
    lines = warnings_for(loaded.model, loaded.model_map, plan, container, torch.bfloat16, spelling)
    found = [line for line in lines if "scales that nobody has set" in line]
    assert len(found) == is_warned
    assert all(f"do not serve {name} from this checkpoint with SGLang" in line for line in found)


def test_warnings_name_engines_that_take_experts_for_unquantised(
    uniform_plan: UniformPlan,
) -> None:
    for fmt, engines in (("fp8_pc_pt", ["vLLM"]), ("mxfp8", [])):
        planned = uniform_plan("mixtral", MODELOPT, fmt)
        tiny = planned.tiny
        lines = warnings_for(
            tiny.model, tiny.model_map, planned.slot_formats, MODELOPT, torch.bfloat16
        )
        found = [line for line in lines if "runs no experts" in line]
        assert [line.split()[0] for line in found] == engines
        assert all("experts.0.gate_up_proj and 15 more" in line for line in found)


def test_blocks_that_cross_from_one_module_into_the_next_are_refused(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture keeps gate and up in one matrix, and checkpoints have a module for each."""
    made = tiny("mixtral")
    expert = "model.layers.0.mlp.experts.0.gate_up_proj"
    names = checkpoint_names(made.model, made.model_map)
    gate, up = names.parts(expert)
    assert up.first_row % 128 == 0
    moved = replace(up, first_row=up.first_row + 64)
    parts = {**names._parts, expert: (gate, moved)}
    monkeypatch.setattr(names, "_parts", parts)
    chosen = {
        slot: FormatName("fp8_block")
        for group in made.model_map.groups
        if expert in group.slots
        for slot in group.slots
    }
    calibration = made.calibrate(chosen)
    lines = refusals(made.model, made.model_map, chosen, calibration, MODELOPT)
    start = f"{up.module} is written from row 320 of {expert} on, in the middle of a block"
    assert [line.startswith(start) for line in lines] == [True]


@pytest.mark.parametrize(
    ("container", "formats", "message"),
    [
        (MODELOPT, ("nvfp4", "w4a8_awq"), "no engine runs nvfp4, w4a8_awq of one modelopt checkp"),
        (MODELOPT, ("fp8", "w4a8_awq"), r"together load in tensorrt-llm on 8\.9 to 9\.0 only"),
        (COMPRESSED, ("int8_sq", "w4a8_awq"), r"together load in vllm on 9\.0; transformers any"),
    ],
)
def test_warnings_say_where_formats_run_together(
    container: Container, formats: tuple[str, ...], message: str, uniform_plan: UniformPlan
) -> None:
    import re

    tiny = uniform_plan("llama", container, "fp8").tiny
    chosen = {
        slot: FormatName(formats[number % len(formats)])
        for number, slot in enumerate(tiny.model_map.slots)
    }
    lines = warnings_for(tiny.model, tiny.model_map, chosen, container, torch.bfloat16)
    assert any(re.search(message, line) for line in lines), lines


def test_nvfp4_of_a_float32_model_warns_that_transformers_needs_bfloat16(
    uniform_plan: UniformPlan,
) -> None:
    planned = uniform_plan("llama", COMPRESSED, "nvfp4")
    arguments = (planned.tiny.model, planned.tiny.model_map, planned.slot_formats, COMPRESSED)
    assert any("dtype=torch.bfloat16" in line for line in warnings_for(*arguments, torch.float32))
    assert not warnings_for(*arguments, torch.bfloat16)


# --- the file system -----------------------------------------------------------------------------


def test_existing_folder_is_refused_and_replaced_with_overwrite(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    planned = mixed_plan("llama", MODELOPT)
    out = tmp_path / "out"
    planned.export(out)
    (out / "stale.txt").write_text("old")
    with pytest.raises(ExportError, match=r"out exists; choose another or pass --overwrite"):
        planned.export(out)
    assert (out / "stale.txt").exists()
    planned.export(out, overwrite=True)
    assert not (out / "stale.txt").exists()
    assert list(tmp_path.iterdir()) == [out]


def test_overwrite_spares_what_is_no_checkpoint_and_the_model_itself(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    planned = mixed_plan("llama", MODELOPT)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match=r"has no config\.json; choose another folder"):
        planned.export(home, overwrite=True)
    with pytest.raises(ExportError, match="must not replace the model it is made from"):
        planned.export(planned.tiny.source, overwrite=True)
    assert (home / "thesis.txt").read_text() == "precious"
    assert (planned.tiny.source / "model.safetensors").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_leaves_nothing_behind_and_the_old_checkpoint_alone(
    overwrite: bool, mixed_plan: MixedPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = mixed_plan("llama", MODELOPT)
    out = tmp_path / "out"
    if overwrite:
        planned.export(out)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    written = []

    def full(tensors: Any, path: Path, **_: Any) -> None:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(shards_module, "save_file", full)
    with pytest.raises(ExportError, match=r"cannot write .*out: No space left on device; free"):
        planned.export(out, overwrite=overwrite, max_shard_bytes=100_000)
    assert len(written) == 2
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    if overwrite:
        verify_checkpoint(out, *planned.expected())


def test_unwritable_place_is_one_line(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ExportError, match=r"must lie where you may write, and .*/file is no folder"
    ):
        mixed_plan("llama", MODELOPT).export(tmp_path / "file" / "out")


def test_what_a_killed_export_left_is_removed_by_the_next(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    host, dead = socket.gethostname(), 2**22 + 1  # no process has a number above 2**22
    left = tmp_path / f".out.{host}.{dead}.0123abcd.partial"
    alive = tmp_path / f".out.{host}.{os.getpid()}.0123abcd.partial"
    elsewhere = tmp_path / f".out.another-{host}.{dead}.0123abcd.partial"
    for folder in (left, alive, elsewhere):
        folder.mkdir()
    mixed_plan("llama", MODELOPT).export(tmp_path / "out")
    assert not left.exists()
    assert alive.exists() and elsewhere.exists()


def test_interrupt_removes_the_unfinished_folder(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mixed_plan("llama", MODELOPT).export(tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


# --- what verification finds ---------------------------------------------------------------------


def flip_bit(folder: Path, tensor: str) -> None:
    """Change the lowest bit of the tensor's first byte."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + start] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("container", Container)
def test_every_flipped_bit_is_found_and_named(
    container: Container, mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    planned = mixed_plan("llama", container)
    out = planned.export(tmp_path / "out").path
    first_of_format = {fmt: slot for slot, fmt in reversed(planned.slot_formats.items())}
    layers = tuple(slot for fmt, slot in first_of_format.items() if fmt != NONE)
    names = [name for name in load_file(out / "model.safetensors") if name.startswith(layers)]
    names += ["model.norm.weight", "model.embed_tokens.weight"]
    assert len(names) > 10
    for name in names:
        flip_bit(out, name)
        with pytest.raises(VerificationError, match=name.rpartition(".")[0]):
            verify_checkpoint(out, *planned.expected())
        flip_bit(out, name)
    verify_checkpoint(out, *planned.expected())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{O_PROJ}.input_scale"), rf"{O_PROJ}\.input_scale"),
        (lambda t: t.update({"extra.weight": torch.ones(1)}), r"has a tensor extra\.weight"),
        (lambda t: t.pop("model.norm.weight"), r"no tensor model\.norm\.weight"),
        (
            lambda t: t.update(
                {f"{O_PROJ}.weight_scale_2": t[f"{O_PROJ}.weight_scale_2"].reshape(1)}
            ),
            r"weight_scale_2 must be torch\.float32 \(\).*\(1,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 2}),
            r"model\.norm\.weight differs .* in 128 of 128 values",
        ),
    ],
    ids=["missing_scale", "surplus", "missing_norm", "shape", "norm"],
)
def test_missing_surplus_and_reshaped_tensors_are_found(
    change: Callable[[dict[str, Any]], object],
    message: str,
    uniform_plan: UniformPlan,
    tmp_path: Path,
) -> None:
    planned = uniform_plan("llama", MODELOPT, "nvfp4")
    out = planned.export(tmp_path / "out").path
    rewrite(out, change)
    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(out, *planned.expected())


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_edited_manifests_are_found(mixed_plan: MixedPlan, tmp_path: Path) -> None:
    planned = mixed_plan("llama", MODELOPT)
    out = planned.export(tmp_path / "out").path
    edit_json(out / "hf_quant_config.json", lambda m: m["quantization"].update(quant_algo="FP8"))
    with pytest.raises(VerificationError, match=r"quant_algo and hf_quant_config\.json's .* equal"):
        verify_checkpoint(out, *planned.expected())
    (out / "hf_quant_config.json").unlink()
    with pytest.raises(VerificationError, match=r"hf_quant_config\.json cannot be read"):
        verify_checkpoint(out, *planned.expected())


def test_another_plan_than_the_exported_one_is_found(
    mixed_plan: MixedPlan, uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    out = mixed_plan("llama", MODELOPT).export(tmp_path / "out").path
    with pytest.raises(VerificationError, match=r"the manifest of .* is wrong"):
        verify_checkpoint(out, *uniform_plan("llama", MODELOPT, "fp8").expected())
    with pytest.raises(VerificationError, match="the container is modelopt, not compressed"):
        verify_checkpoint(out, *mixed_plan("llama", COMPRESSED).expected())
    with pytest.raises(VerificationError, match="nothing is quantised"):
        verify_checkpoint(out, *uniform_plan("llama", MODELOPT, "none").expected())


# --- reading what others wrote, or broke ---------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("quantization_config"), r"has scales, and .* has no manifest"),
        (lambda c: c.update(quantization_config=[]), "quantization_config of .* must be an object"),
        (
            lambda c: c["quantization_config"].update(quant_method="gptq"),
            r"must be modelopt, compressed-tensors or transformers' fp8 to be read, got 'gptq'",
        ),
        (
            lambda c: c["quantization_config"].update(quant_algo="W4A4_OTHER"),
            r"quantised with 'W4A4_OTHER'; autoq reads FP8, ",
        ),
        (
            lambda c: c["quantization_config"]["quantized_layers"].pop(Q),
            r"q_proj has scales, and quantized_layers does not list it",
        ),
        (
            lambda c: c["quantization_config"].pop("quantized_layers"),
            "the manifest must have an object quantized_layers, got NoneType",
        ),
    ],
)
def test_contradicting_modelopt_configuration_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    out = mixed_plan("llama", MODELOPT).export(tmp_path / "out").path
    edit_json(out / "config.json", edit)
    with pytest.raises(ExportError, match=message):
        read_quantized(out)


def test_module_that_no_group_or_two_groups_name_is_refused(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    out = mixed_plan("llama", COMPRESSED).export(tmp_path / "out").path

    def all_groups_name_everything(config: dict[str, Any]) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["targets"] = ["re:.*"]

    edit_json(out / "config.json", all_groups_name_everything)
    with pytest.raises(ExportError, match=r"exactly one config group must name it .* 3 groups do"):
        read_quantized(out)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("re:^(a+)+$", "too costly to match"),
        ("re:" + "a*" * 9 + "$", "too costly to match"),
        ("re:(", "unterminated subpattern|missing"),
    ],
)
def test_hostile_patterns_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        pattern_matcher([pattern])


def test_index_must_stay_in_its_folder_and_agree_with_the_files(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    out = mixed_plan("llama", MODELOPT).export(tmp_path / "out", max_shard_bytes=200_000).path
    index = out / "model.safetensors.index.json"
    good = index.read_text()
    edit_json(index, lambda i: i["weight_map"].update({"x": "../../secret.safetensors"}))
    with pytest.raises(ExportError, match="must name files of its own folder"):
        read_quantized(out)
    index.write_text(good)
    edit_json(index, lambda i: i["weight_map"].pop("model.norm.weight"))
    with pytest.raises(ExportError, match=r"disagree on where model\.norm\.weight is"):
        read_quantized(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({f"{O_PROJ}.weight_scale_2": torch.tensor(float("nan"))}),
            r"o_proj\.weight_scale_2 must be positive and finite",
        ),
        (
            lambda t: t.update({f"{O_PROJ}.input_scale": torch.tensor(0.0)}),
            r"o_proj\.input_scale must be positive and finite",
        ),
        (
            lambda t: t.update({f"{O_PROJ}.weight": t[f"{O_PROJ}.weight"][:, :-1].contiguous()}),
            r"o_proj\.weight must have shape \(128, 64\), got \(128, 63\)",
        ),
        (
            lambda t: t.update({f"{O_PROJ}.weight_scale": t[f"{O_PROJ}.weight_scale"].float()}),
            r"o_proj\.weight_scale must be float8_e4m3fn, got float32",
        ),
        (lambda t: t.pop(f"{O_PROJ}.weight"), r"o_proj is nvfp4 and lacks weight"),
        (lambda t: t.pop("model.norm.weight"), r"lacks weights of its architecture: model\.norm"),
    ],
    ids=["nan", "zero", "shape", "dtype", "no_codes", "no_norm"],
)
def test_broken_tensors_are_refused_by_name(
    change: Callable[[dict[str, Any]], object],
    message: str,
    uniform_plan: UniformPlan,
    tmp_path: Path,
) -> None:
    out = uniform_plan("llama", MODELOPT, "nvfp4").export(tmp_path / "out").path
    rewrite(out, change)
    with pytest.raises(ExportError, match=message):
        load_checkpoint_for_evaluation(out)


def test_truncated_file_and_missing_folder_are_refused(
    mixed_plan: MixedPlan, tmp_path: Path
) -> None:
    out = mixed_plan("llama", MODELOPT).export(tmp_path / "out").path
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"model\.safetensors cannot be read as safetensors"):
        read_quantized(out)
    with pytest.raises(ExportError, match="does not exist"):
        read_quantized(tmp_path / "nowhere")
