"""Deliberately broken checkpoints: each trap is found, and whole ones have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from autoq.cli._app import app
from autoq.errors import ExportError
from autoq.export import load_packed
from autoq.export.checkup import LayerReport, check_checkpoint
from autoq.formats import FormatName, parse_target
from autoq.layers import Container

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
LAYER = "model.layers.0"
Q, QKV = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.qkv_proj"
GATE, DOWN = f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.down_proj"
SILENT = "SILENTLY UNQUANTISED"
Whole = Callable[[Container], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Container, Path]:
    return {}


@pytest.fixture
def whole(
    written: dict[Container, Path],
    tmp_path_factory: pytest.TempPathFactory,
    uniform_plan: Any,
    tmp_path: Path,
) -> Whole:
    """A copy of a tiny Llama with fp8 attention and nvfp4 feed-forward parts, to be broken."""

    def make(container: Container) -> Path:
        if container not in written:
            plan = uniform_plan("llama", container, "nvfp4")
            mixed = {
                slot: FormatName("fp8" if "self_attn" in slot else "nvfp4")
                for slot in plan.slot_formats
            }
            folder = tmp_path_factory.mktemp("whole") / container.value
            written[container] = plan.with_formats(mixed).export(folder).path
        shutil.copytree(written[container], tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return make


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_manifests(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Apply the change to each manifest that there is, with `ignore` under that name."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    nested = folder / "hf_quant_config.json"
    if nested.exists():
        content = json.loads(nested.read_text())
        inner = content["quantization"]
        inner["ignore"] = inner.pop("exclude_modules")
        change(inner)
        inner["exclude_modules"] = inner.pop("ignore")
        nested.write_text(json.dumps(content))
    return folder


def the_fault(folder: Path, part: str) -> None:
    found = check_checkpoint(folder).faults
    assert any(part in fault for fault in found), found


def outcome(folder: Path, module: str, target: str) -> str:
    report = check_checkpoint(folder, parse_target(target))
    return report.layers[names(report.layers).index(module)].outcomes[target].does


def names(layers: tuple[LayerReport, ...]) -> list[str]:
    return [layer.name for layer in layers]


@pytest.mark.parametrize("container", Container)
def test_a_whole_checkpoint_has_no_fault(whole: Whole, container: Container) -> None:
    report = check_checkpoint(whole(container))
    assert report.faults == ()
    assert report.is_sound
    assert "vllm" in report.runners
    assert ("transformers" in report.runners) == (container is COMPRESSED)
    assert len(report.layers) == 2 * 7 + 1  # with lm_head
    assert {layer.stored for layer in report.layers} == {"fp8", "nvfp4", "unquantised"}


@pytest.mark.parametrize(
    ("module", "target", "does"),
    [
        (Q, "vllm:h200", "native"),
        (GATE, "vllm:h200", "weight-only"),
        (GATE, "vllm:b200", "native"),
        (GATE, "tensorrt-llm:h200", "refuses"),
        (Q, "transformers:cpu", SILENT),
        (GATE, "transformers:cpu", "refuses"),
        ("lm_head", "sglang:h200", "unquantised"),
    ],
)
def test_what_a_target_does(whole: Whole, module: str, target: str, does: str) -> None:
    assert outcome(whole(MODELOPT), module, target) == does


def test_missing_fused_alias_is_silent_in_sglang_alone(whole: Whole) -> None:
    folder = change_manifests(whole(MODELOPT), lambda m: m["quantized_layers"].pop(QKV))
    assert outcome(folder, Q, "sglang:h200") == SILENT
    assert outcome(folder, Q, "vllm:h200") == "native"


def test_mixed_without_nvfp4_is_another_method_to_sglang(whole: Whole) -> None:
    def no_nvfp4(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["quantized_layers"].items():
            manifest["quantized_layers"][name] = entry | {"quant_algo": "FP8"}

    folder = change_manifests(whole(MODELOPT), no_nvfp4)
    assert outcome(folder, Q, "sglang:h200") == "refuses"
    the_fault(folder, "has no weight_scale_2")


def test_unknown_algorithm_is_silent_but_in_vllm(whole: Whole) -> None:
    def unknown(manifest: dict[str, Any]) -> None:
        manifest["quantized_layers"][DOWN] = {"quant_algo": "NF3"}

    folder = change_manifests(whole(MODELOPT), unknown)
    assert outcome(folder, DOWN, "vllm:b200") == "refuses"
    assert outcome(folder, DOWN, "sglang:b200") == SILENT
    assert outcome(folder, DOWN, "tensorrt-llm:b200") == "refuses"


def test_exclusion_that_is_part_of_quantised_names(whole: Whole) -> None:
    folder = change_manifests(whole(MODELOPT), lambda m: m["ignore"].append(LAYER))
    the_fault(folder, f"the exclusion {LAYER!r} is part of the name of {LAYER}.")
    assert outcome(folder, DOWN, "vllm:b200") == "refuses"


def test_exclusion_with_a_star_takes_more_than_its_layer(whole: Whole) -> None:
    entry = "model.layers.0.self*"
    folder = change_manifests(whole(MODELOPT), lambda m: m["ignore"].append(entry))
    the_fault(folder, f"the exclusion {entry!r} is part of the name of {LAYER}.self_attn")
    assert outcome(folder, Q, "vllm:b200") == "refuses"
    assert outcome(folder, DOWN, "vllm:b200") == "native"


def test_fused_parts_in_different_groups(whole: Whole) -> None:
    """vLLM would take the first part's scheme for all."""

    def tear(manifest: dict[str, Any]) -> None:
        fp8, nvfp4 = manifest["config_groups"].values()
        fp8["targets"] = [target.replace("(q|k|v|", "(q|v|") for target in fp8["targets"]]
        nvfp4["targets"].append(f"{LAYER}.self_attn.k_proj")

    folder = change_manifests(whole(COMPRESSED), tear)
    the_fault(folder, "and the manifest gives them different formats")


def test_excluding_one_of_a_fused_set(whole: Whole) -> None:
    folder = change_manifests(whole(MODELOPT), lambda m: m["ignore"].append(Q))
    assert outcome(folder, Q, "vllm:h200") == "refuses"
    assert outcome(folder, Q, "sglang:h200") == "refuses"


def test_manifests_out_of_step(whole: Whole) -> None:
    folder = whole(MODELOPT)
    path = folder / "hf_quant_config.json"
    content = json.loads(path.read_text())
    content["quantization"]["quantized_layers"].pop(DOWN)
    path.write_text(json.dumps(content))
    the_fault(folder, "config.json's quantized_layers and hf_quant_config.json's")
    assert outcome(folder, DOWN, "tensorrt-llm:b200") == SILENT


def test_second_manifest_missing(whole: Whole) -> None:
    folder = whole(MODELOPT)
    (folder / "hf_quant_config.json").unlink()
    the_fault(folder, "hf_quant_config.json is missing")


def test_unequal_global_scales_of_fused_parts(whole: Whole) -> None:
    folder = change_tensors(
        whole(MODELOPT), lambda t: t.update({f"{GATE}.weight_scale_2": torch.tensor(0.5)})
    )
    the_fault(folder, "take one weight_scale_2 of all")


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_scales(whole: Whole, value: float) -> None:
    folder = change_tensors(
        whole(MODELOPT), lambda t: t.update({f"{Q}.weight_scale": torch.tensor(value)})
    )
    the_fault(folder, f"{Q}.weight_scale must be positive and finite")


def not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight"].view(torch.uint8)[0, 0] = 0xFF


@pytest.mark.parametrize("container", Container)
def test_codes_that_are_no_numbers(whole: Whole, container: Container) -> None:
    folder = change_tensors(whole(container), not_a_number)

    assert f"{Q}.weight must hold no code of NaN, and does not" in check_checkpoint(folder).faults
    finished = CliRunner().invoke(app, ["verify", str(folder)])
    assert finished.stdout.endswith("1 thing is wrong\n")
    with pytest.raises(ExportError, match="must hold no code of NaN"):
        load_packed(folder)


@pytest.mark.parametrize("container", Container)
def test_codes_without_a_scale_do_not_load_as_weights(whole: Whole, container: Container) -> None:
    folder = change_tensors(whole(container), lambda tensors: tensors.pop(f"{Q}.weight_scale"))

    with pytest.raises(ExportError, match=f"lacks {Q}.weight_scale.*holds codes"):
        load_packed(folder)


def test_missing_and_surplus_tensors(whole: Whole) -> None:
    folder = change_tensors(whole(MODELOPT), lambda t: t.pop(f"{DOWN}.input_scale"))
    the_fault(folder, f"{DOWN} is NVFP4 and lacks input_scale")


def test_surplus_scale(whole: Whole) -> None:
    folder = change_tensors(
        whole(MODELOPT), lambda t: t.update({"lm_head.weight_scale": torch.tensor(1.0)})
    )
    the_fault(folder, "lm_head has weight, weight_scale, and the manifest says")


def test_wrong_dtype_and_shape(whole: Whole) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.input_scale"] = tensors[f"{Q}.input_scale"].half()
        tensors[f"{DOWN}.weight_scale"] = tensors[f"{DOWN}.weight_scale"][:, 1:].contiguous()

    folder = change_tensors(whole(MODELOPT), spoil)
    the_fault(folder, f"{Q}.input_scale must be float32, got float16")
    the_fault(folder, f"{DOWN}.weight_scale must have shape (128, 16), got (128, 15)")


def test_scalar_shapes_belong_to_their_container(whole: Whole) -> None:
    folder = change_tensors(
        whole(COMPRESSED), lambda t: t.update({f"{Q}.weight_scale": torch.tensor(0.5)})
    )
    the_fault(folder, f"{Q}.weight_scale must have shape (1,), got ()")


def test_cache_promised_without_scales(whole: Whole) -> None:
    folder = change_manifests(
        whole(COMPRESSED), lambda m: m.update(kv_cache_scheme={"num_bits": 8, "type": "float"})
    )
    the_fault(folder, "promises a quantised key/value cache")


def test_cache_scales_without_promise(whole: Whole) -> None:
    name = f"{LAYER}.self_attn.k_proj.k_scale"
    folder = change_tensors(whole(MODELOPT), lambda t: t.update({name: torch.tensor(1.0)}))
    the_fault(folder, f"{name} is a scale of a quantised key/value cache")


def test_status_missing(whole: Whole) -> None:
    folder = change_manifests(whole(COMPRESSED), lambda m: m.pop("quantization_status"))
    the_fault(folder, "quantization_status must be 'compressed'")


def test_module_in_no_group_stops_sglang_and_vllm_and_is_silent_in_transformers(
    whole: Whole,
) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        for group in manifest["config_groups"].values():
            group["targets"] = [t for t in group["targets"] if "down" not in t]

    folder = change_manifests(whole(COMPRESSED), forget)
    the_fault(folder, "the manifest says that it is not quantised")
    assert outcome(folder, DOWN, "sglang:h200") == "refuses"
    assert outcome(folder, DOWN, "vllm:h200") == "refuses"
    assert outcome(folder, DOWN, "transformers:cpu") == SILENT


def test_no_manifest(whole: Whole) -> None:
    folder = whole(MODELOPT)
    (folder / "hf_quant_config.json").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config")
    path.write_text(json.dumps(config))
    the_fault(folder, "neither config.json nor hf_quant_config.json says so")


def damaged_headers() -> Iterator[tuple[str, Callable[[dict[str, Any]], object], str]]:
    name = f"{DOWN}.weight"
    yield "offset", lambda h: h[name].update(data_offsets=[0, 10**15]), "does not take"
    yield "negative", lambda h: h[name].update(data_offsets=[-8, 8]), "between two offsets"
    yield "shape", lambda h: h[name].update(shape=[2**40, 2**40]), "does not take"
    yield "dtype", lambda h: h[name].update(dtype="X9"), "must have one of the dtypes"
    yield "list", lambda h: h[name].update(dtype=[]), "must have one of the dtypes"
    yield "name", lambda h: h.update({"a\nb": h.pop(name)}), "must be printable text"
    yield "twice", lambda h: h.update({"other": h[name]}), "overlap or leave a gap"


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in damaged_headers()], ids=lambda case: str(case)[:20]
)
def test_hostile_headers(
    whole: Whole, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = whole(MODELOPT) / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    with pytest.raises(ExportError, match=message):
        check_checkpoint(path.parent)


@pytest.mark.parametrize("file", ["../a", "/etc/passwd", "gone", "x" * 300])
def test_hostile_index(whole: Whole, file: str) -> None:
    folder = whole(MODELOPT)
    index = {"weight_map": {f"{DOWN}.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"must name files of its own folder|is missing"):
        check_checkpoint(folder)


def test_index_that_lies(whole: Whole) -> None:
    folder = whole(MODELOPT)
    index = {"weight_map": {"other.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"says that .* is in"):
        check_checkpoint(folder)


def test_command(whole: Whole) -> None:
    folder = whole(MODELOPT)
    runner = CliRunner()
    passed = runner.invoke(app, ["verify", str(folder), "--target", "vllm:h200"])
    assert passed.exit_code == 0, passed.output
    assert "nothing is wrong; every layer runs in vllm:h200" in passed.output
    assert "model.layers.0-1.mlp.down_proj" in passed.output
    refused = runner.invoke(app, ["verify", str(folder), "--target", "tensorrt-llm:h200"])
    assert refused.exit_code == 3
    assert "of the engines looked at none runs every layer" in refused.output
    change_manifests(folder, lambda m: m["quantized_layers"].pop(QKV))
    plain = runner.invoke(app, ["verify", str(folder), "--json"])
    assert plain.exit_code == 0
    content = json.loads(plain.output)
    assert content["runs_in"] == ["vllm", "tensorrt-llm"]
    layer = next(layer for layer in content["layers"] if layer["module"] == Q)
    assert layer["outcomes"]["sglang"]["does"] == SILENT
    change_tensors(folder, lambda t: t.pop(f"{DOWN}.input_scale"))
    for options in ([], ["--target", "vllm:h200"], ["--target", "tensorrt-llm:h200"]):
        assert runner.invoke(app, ["verify", str(folder), *options]).exit_code == 4
    (folder / "model.safetensors").unlink()
    assert runner.invoke(app, ["verify", str(folder)]).exit_code == 2


def reciprocals(tensors: dict[str, Tensor], suffix: str) -> None:
    for name in [name for name in tensors if name.endswith(f".{suffix}")]:
        tensors[name] = tensors[name].reciprocal()


@pytest.mark.parametrize(
    ("container", "suffix"),
    [(MODELOPT, "weight_scale_2"), (COMPRESSED, "weight_global_scale")],
)
def test_a_global_scale_that_is_the_other_containers(
    whole: Whole, container: Container, suffix: str
) -> None:
    """amax / 2688 in one and 2688 / amax in the other; all of a fused set alike, so in step."""
    folder = change_tensors(whole(container), lambda t: reciprocals(t, suffix))
    the_fault(folder, f"{GATE}.{suffix} is ")
    assert len(check_checkpoint(folder).faults) == 2 * 3  # gate, up and down of two layers


def cached(folder: Path, names: tuple[str, str]) -> Path:
    """With a cache in FP8, whose scales have these names under the attention's."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    change_manifests(folder, lambda m: m.update(kv_cache_scheme=scheme))
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.ones(1)
        for layer in (0, 1)
        for name in names
    }
    return change_tensors(folder, lambda t: t.update(scales))


def test_cache_scales_under_names_of_the_other_container(whole: Whole) -> None:
    folder = cached(whole(COMPRESSED), ("k_proj.k_scale", "v_proj.v_scale"))
    the_fault(folder, f"transformers looks for {LAYER}.self_attn.k_scale")
    assert len(check_checkpoint(folder).faults) == 1


def test_cache_scales_under_their_own_names(whole: Whole) -> None:
    assert check_checkpoint(cached(whole(COMPRESSED), ("k_scale", "v_scale"))).faults == ()


def test_a_target_that_names_no_module(whole: Whole) -> None:
    def add(manifest: dict[str, Any]) -> None:
        group = next(iter(manifest["config_groups"].values()))
        group["targets"] += ["Linear4bit", QKV, f"{LAYER}.self_attn.w_proj"]

    folder = change_manifests(whole(COMPRESSED), add)
    found = check_checkpoint(folder).faults
    assert [fault.split(",")[0] for fault in found] == [
        f"a config group names {LAYER}.self_attn.w_proj"
    ]


@pytest.mark.parametrize(("value", "count"), [(1.0, 0), (2.0, 3)])
def test_input_scales_that_no_engine_reads(
    uniform_plan: Any, tmp_path: Path, value: float, count: int
) -> None:
    """TensorRT-LLM multiplies inputs of W4A16_AWQ where it fuses nothing; q, k and v are fused."""
    folder = uniform_plan("llama", MODELOPT, "int4_awq").export(tmp_path / "out").path
    attention = f"{LAYER}.self_attn"

    def scale(tensors: dict[str, Tensor]) -> None:
        columns = tensors[f"{attention}.q_proj.weight"].shape[1]
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{attention}.{leaf}.pre_quant_scale"] = torch.full(
                (columns,), value, dtype=torch.bfloat16
            )

    found = check_checkpoint(change_tensors(folder, scale)).faults
    assert len(found) == count
    assert all("pass over it in W4A16_AWQ" in fault and "o_proj" not in fault for fault in found)
