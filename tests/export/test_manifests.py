"""Manifests: as the specification spells them, and as each engine's matching rules read them.

The readers below are written from the engines' documented rules (vLLM 0.33, SGLang 0.5.23,
TensorRT-LLM 1.2), independently of the code under test.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import pytest

from autoq.export import _plan
from autoq.export._compressed_tensors_manifest import compressed_tensors_manifest
from autoq.export._layouts import LAYOUTS, WITHOUT_LAYOUT
from autoq.export._modelopt_manifest import modelopt_manifest
from autoq.export.lint import compressed_tensors_faults, modelopt_faults
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import Container

FP8, NVFP4, W4A8 = FormatName("fp8"), FormatName("nvfp4"), FormatName("w4a8_awq")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ALGORITHMS = {"FP8": FP8, "NVFP4": NVFP4, "W4A8_AWQ": W4A8, None: NONE}
SCHEMES = {
    "float-quantized": FP8,
    "nvfp4-pack-quantized": NVFP4,
    "pack-quantized": W4A8,
    None: NONE,
}

Manifest = Mapping[str, Any]


def decoder(*layers: tuple[FormatName, FormatName]) -> dict[str, FormatName]:
    """Formats of a Llama's modules; a layer is (attention, feed-forward)."""
    formats = {}
    for number, (attention, feed_forward) in enumerate(layers):
        prefix = f"model.layers.{number}"
        formats.update({f"{prefix}.self_attn.{leaf}": attention for leaf in ATTENTION})
        formats.update({f"{prefix}.mlp.{leaf}": feed_forward for leaf in MLP})
    return {**formats, "lm_head": NONE}


def test_modelopt_manifest_is_spelled_as_specified() -> None:
    formats = decoder((FP8, NVFP4), (NONE, NONE))
    manifest = modelopt_manifest(formats, {"name": "autoq"})
    ignored = [f"model.layers.1.self_attn.{leaf}" for leaf in ATTENTION]
    ignored += [*(f"model.layers.1.mlp.{leaf}" for leaf in MLP), "lm_head"]
    fp8, nvfp4 = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4", "group_size": 16}
    layers = {
        "model.layers.0.self_attn.q_proj": fp8,
        "model.layers.0.self_attn.k_proj": fp8,
        "model.layers.0.self_attn.v_proj": fp8,
        "model.layers.0.self_attn.qkv_proj": fp8,
        "model.layers.0.self_attn.o_proj": fp8,
        "model.layers.0.mlp.gate_proj": nvfp4,
        "model.layers.0.mlp.up_proj": nvfp4,
        "model.layers.0.mlp.gate_up_proj": nvfp4,
        "model.layers.0.mlp.down_proj": nvfp4,
    }
    assert manifest.flat == {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_scheme": None,
        "kv_cache_quant_algo": None,
        "ignore": ignored,
        "quantized_layers": layers,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "exported_by": {"name": "autoq"},
    }
    assert list(manifest.flat["quantized_layers"]) == list(layers)
    assert manifest.nested == {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "exported_by": {"name": "autoq"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ignored,
            "quantized_layers": layers,
        },
    }


@pytest.mark.parametrize(
    ("fmt", "entry"),
    [
        (FP8, {"quant_algo": "FP8"}),
        (NVFP4, {"quant_algo": "NVFP4", "group_size": 16}),
        (
            W4A8,
            {
                "quant_algo": "W4A8_AWQ",
                "group_size": 128,
                "has_zero_point": False,
                "pre_quant_scale": True,
            },
        ),
    ],
)
def test_one_format_gives_the_uniform_modelopt_manifest(
    fmt: FormatName, entry: dict[str, Any]
) -> None:
    manifest = modelopt_manifest(decoder((fmt, NONE)), {})
    ignored = [*(f"model.layers.0.mlp.{leaf}" for leaf in MLP), "lm_head"]
    assert manifest.nested["quantization"] == {
        **entry,
        "kv_cache_quant_algo": None,
        "exclude_modules": ignored,
    }
    assert "quantized_layers" not in manifest.flat
    assert {key: manifest.flat[key] for key in entry} == entry
    assert manifest.flat["ignore"] == ignored


def test_compressed_tensors_manifest_is_spelled_as_specified() -> None:
    manifest = compressed_tensors_manifest(decoder((FP8, NVFP4), (NONE, NONE)), {})
    fp8 = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }
    nvfp4 = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    assert manifest == {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "version": "0.20.0",
        "global_compression_ratio": None,
        "config_groups": {
            "group_0": {
                "targets": [r"re:^model\.layers\.0\.self_attn\.(q|k|v|qkv|o)_proj$"],
                "format": "float-quantized",
                "weights": fp8,
                "input_activations": fp8,
                "output_activations": None,
            },
            "group_1": {
                "targets": [r"re:^model\.layers\.0\.mlp\.(gate|up|gate_up|down)_proj$"],
                "format": "nvfp4-pack-quantized",
                "weights": nvfp4,
                "input_activations": {**nvfp4, "dynamic": "local"},
                "output_activations": None,
            },
        },
        "ignore": [
            "lm_head",
            r"re:^model\.layers\.1\.self_attn\.(q|k|v|qkv|o)_proj$",
            r"re:^model\.layers\.1\.mlp\.(gate|up|gate_up|down)_proj$",
        ],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "exported_by": {},
    }


def test_w4a8_is_packed_int4_with_an_input_scale_per_token() -> None:
    manifest = compressed_tensors_manifest(decoder((W4A8, NONE)), {})
    assert manifest["format"] == "pack-quantized"
    group = manifest["config_groups"]["group_0"]
    assert group["format"] == "pack-quantized"
    weights = group["weights"]
    assert (weights["num_bits"], weights["type"], weights["group_size"]) == (4, "int", 128)
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)


def test_layers_of_one_kind_share_one_pattern() -> None:
    formats = decoder(*[(FP8, NVFP4 if number % 2 else FP8) for number in range(12)])
    groups = compressed_tensors_manifest(formats, {})["config_groups"]
    assert groups["group_1"]["targets"] == [
        r"re:^model\.layers\.(1|3|5|7|9|11)\.mlp\.(gate|up|gate_up|down)_proj$"
    ]


def test_manifest_is_valid_for_compressed_tensors_itself() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    manifest = compressed_tensors_manifest(decoder((FP8, NVFP4), (W4A8, NONE)), {})
    parsed = QuantizationConfig.model_validate(manifest)
    assert [str(scheme.format) for scheme in parsed.config_groups.values()] == [
        "float-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    ]


# --- how engines read them -----------------------------------------------------------------------


def shards(name: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in packed.get(leaf, ())]


def all_or_none(flags: Sequence[bool]) -> bool:
    if any(flags) and not all(flags):
        raise ValueError("some parts of a fused module are left out, some are not")
    return all(flags)


def vllm_modelopt(manifest: Manifest, name: str) -> str | None:
    def excluded(module: str) -> bool:
        return any(e == module or e in module or fnmatchcase(module, e) for e in manifest["ignore"])

    parts = shards(name, PACKED)
    if all_or_none([excluded(part) for part in parts or [name]]):
        return None
    if manifest["quant_algo"] != "MIXED_PRECISION":
        return str(manifest["quant_algo"])
    layers = manifest["quantized_layers"]
    if name in layers:
        return str(layers[name]["quant_algo"])
    found = {layers[part]["quant_algo"] for part in parts if part in layers}
    if len(found) > 1:
        raise ValueError("parts of a fused module differ")
    children = [e["quant_algo"] for key, e in layers.items() if key.startswith(f"{name}.")]
    return next(iter([*found, *children]), None)


def sglang_modelopt(manifest: Manifest, name: str) -> str | None:
    """For classes that declare no packed modules, as dense Llama, Qwen and Mistral."""

    def excluded(module: str) -> bool:
        parts = module.split(".")
        return any(
            f".{module}.".find(f".{e}.") >= 0
            or fnmatchcase(module, e)
            or any(fnmatchcase(part, e) for part in parts)
            for e in manifest["ignore"]
        )

    if all_or_none([excluded(part) for part in shards(name, PACKED) or [name]]):
        return None
    if manifest["quant_algo"] != "MIXED_PRECISION":
        return str(manifest["quant_algo"])
    layers = manifest["quantized_layers"]
    if not any(entry["quant_algo"] == "NVFP4" for entry in layers.values()):
        raise AssertionError("taken for w4afp8")
    if name in layers:
        return str(layers[name]["quant_algo"])
    children = [e["quant_algo"] for key, e in layers.items() if key.startswith(f"{name}.")]
    return next(iter(children), None)


def tensorrt_llm(nested: Manifest, name: str) -> str | None:
    inner = nested["quantization"]
    parts = shards(name, PACKED) or [name]
    if any(fnmatchcase(part, e) for part in parts for e in inner["exclude_modules"]):
        return None
    if inner["quant_algo"] != "MIXED_PRECISION":
        return str(inner["quant_algo"])
    layers = inner["quantized_layers"]
    if name.endswith(".experts"):
        return next((e["quant_algo"] for key, e in layers.items() if name in key), None)
    entry = layers.get(parts[0])
    return str(entry["quant_algo"]) if entry else None


def matches(name: str, entries: Sequence[str]) -> bool:
    return any(
        re.match(e.removeprefix("re:"), name) is not None if e.startswith("re:") else e == name
        for e in entries
    )


def vllm_compressed(manifest: Manifest, name: str) -> str | None:
    parts = shards(name, PACKED)
    if all_or_none([matches(part, manifest["ignore"]) for part in parts or [name]]):
        return None
    for candidate in [name, *parts[:1]]:
        for group in manifest["config_groups"].values():
            if matches(candidate, group["targets"]):
                return str(group["format"])
    return None


def sglang_compressed(manifest: Manifest, name: str) -> str | None:
    if matches(name, manifest["ignore"]):
        return None
    for group in manifest["config_groups"].values():
        if matches(name, group["targets"]):
            return str(group["format"])
    raise ValueError(f"no match for {name}")


def engine_modules(formats: Mapping[str, FormatName]) -> dict[str, FormatName]:
    """The modules that engines build: q/k/v and gate/up as one."""
    built = {}
    for name, fmt in formats.items():
        parent, _, leaf = name.rpartition(".")
        fused = next((alias for alias, parts in PACKED.items() if leaf in parts), leaf)
        built[f"{parent}.{fused}" if parent else fused] = fmt
    return built


DECODER_PLANS = {
    "all_formats": decoder((FP8, NVFP4), (W4A8, NONE), (NONE, FP8), (NVFP4, W4A8)),
    "portable": decoder((FP8, NVFP4), (NONE, NVFP4), (FP8, NONE)),
    "fp8_only": decoder((FP8, NONE), (NONE, FP8)),
    "nvfp4_only": decoder((NVFP4, NVFP4), (NONE, NONE)),
    "many_layers": decoder(*[(FP8, NVFP4) if n in (1, 10, 11) else (NONE, FP8) for n in range(21)]),
}


@pytest.mark.parametrize("plan", DECODER_PLANS.values(), ids=DECODER_PLANS)
def test_engines_resolve_every_module_of_both_containers_as_planned(
    plan: dict[str, FormatName],
) -> None:
    modelopt = modelopt_manifest(plan, {})
    compressed = compressed_tensors_manifest(plan, {})
    for name, fmt in engine_modules(plan).items():
        assert ALGORITHMS[vllm_modelopt(modelopt.flat, name)] == fmt, name
        assert ALGORITHMS[sglang_modelopt(modelopt.flat, name)] == fmt, name
        assert ALGORITHMS[tensorrt_llm(modelopt.nested, name)] == fmt, name
        assert SCHEMES[vllm_compressed(compressed, name)] == fmt, name
        assert SCHEMES[sglang_compressed(compressed, name)] == fmt, name
    for name, fmt in plan.items():  # transformers fuses nothing
        assert SCHEMES[sglang_compressed(compressed, name)] == fmt, name


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert", "t5"])
@pytest.mark.parametrize("container", Container)
def test_engines_resolve_every_module_of_every_architecture(
    name: str, container: Container, mixed_plan: Callable[[str, Container], Any]
) -> None:
    planned = mixed_plan(name, container)
    plan = module_formats(planned)
    if set(plan.values()) == {NONE}:
        return
    if container is Container.MODELOPT:
        manifest = modelopt_manifest(plan, {})
        for module, fmt in plan.items():
            assert ALGORITHMS[vllm_modelopt(manifest.flat, module)] == fmt, module
            assert ALGORITHMS[tensorrt_llm(manifest.nested, module)] == fmt, module
    else:
        compressed = compressed_tensors_manifest(plan, {})
        for module, fmt in plan.items():
            assert SCHEMES[sglang_compressed(compressed, module)] == fmt, module


@pytest.mark.parametrize(
    ("name", "mixture"), [("mixtral", "block_sparse_moe"), ("qwen3_moe", "mlp")]
)
def test_engines_find_the_experts_format_under_their_parent(
    name: str, mixture: str, mixed_plan: Callable[[str, Container], Any]
) -> None:
    planned = mixed_plan(name, Container.MODELOPT)
    plan = module_formats(planned)
    manifest = modelopt_manifest(plan, {})
    seen = set()
    for layer in (0, 1):
        experts = f"model.layers.{layer}.{mixture}.experts"
        fmt = plan[f"{experts}.0.{'w1' if name == 'mixtral' else 'gate_proj'}"]
        for read, source in ((vllm_modelopt, manifest.flat), (tensorrt_llm, manifest.nested)):
            assert ALGORITHMS[read(source, experts)] == fmt
        assert vllm_modelopt(manifest.flat, f"model.layers.{layer}.{mixture}.gate") is None
        seen.add(fmt)
    assert len(seen) == 2


def test_unquantised_experts_are_ignored_under_their_parent(
    mixed_plan: Callable[[str, Container], Any],
) -> None:
    plan = module_formats(mixed_plan("qwen3_moe", Container.COMPRESSED_TENSORS))
    modelopt = modelopt_manifest(plan, {}).flat
    compressed = compressed_tensors_manifest(plan, {})
    for layer in (0, 1):
        experts = f"model.layers.{layer}.mlp.experts"
        assert vllm_modelopt(modelopt, experts) is None
        assert sglang_modelopt(modelopt, experts) is None
        for module in (experts, f"{experts}.3.up_proj"):
            assert sglang_compressed(compressed, module) is None
    assert sum("experts" in entry for entry in modelopt["ignore"]) == 2
    assert sum("experts" in entry for entry in compressed["ignore"]) == 2


def module_formats(planned: Any) -> dict[str, FormatName]:
    names = _plan.checkpoint_names(planned.tiny.model, planned.tiny.model_map)
    return names.module_formats(planned.slot_formats)


# --- our own lint --------------------------------------------------------------------------------

LAYER = "model.layers.0"


def edited(manifest: Manifest, edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    import copy

    changed = copy.deepcopy(dict(manifest))
    edit(changed)
    return changed


MODELOPT_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "alias": (
        lambda m: m["quantized_layers"].pop(f"{LAYER}.self_attn.qkv_proj"),
        r"quantized_layers must say fp8 of model.layers.0.self_attn.qkv_proj, got None",
    ),
    "algorithm": (
        lambda m: m["quantized_layers"][f"{LAYER}.mlp.up_proj"].update(quant_algo="FP8"),
        r"quantized_layers must say nvfp4 of model.layers.0.mlp.up_proj",
    ),
    "surplus": (
        lambda m: m["quantized_layers"].update({"lm_head": {"quant_algo": "FP8"}}),
        "quantized_layers names lm_head, which is not quantised",
    ),
    "ignore": (lambda m: m["ignore"].remove("lm_head"), "lm_head is not quantised and must be"),
    "substring": (
        lambda m: m["ignore"].append("layers.0"),
        "the ignored layers.0 is part of a quantised module's name",
    ),
    "cache": (
        lambda m: m.update(kv_cache_scheme={"num_bits": 8}),
        "must not promise a quantised key/value cache",
    ),
}


@pytest.mark.parametrize(("edit", "message"), MODELOPT_EDITS.values(), ids=MODELOPT_EDITS)
def test_lint_finds_a_broken_modelopt_manifest(edit: Any, message: str) -> None:
    plan = DECODER_PLANS["portable"]
    good = modelopt_manifest(plan, {})
    assert not list(modelopt_faults(good.flat, good.nested, plan))
    faults = list(modelopt_faults(edited(good.flat, edit), good.nested, plan))
    assert any(re.search(message, fault) for fault in faults), faults


def test_lint_finds_manifests_that_disagree() -> None:
    plan = DECODER_PLANS["portable"]
    good = modelopt_manifest(plan, {})
    nested = edited(good.nested, lambda m: m["quantization"]["exclude_modules"].pop())
    assert any("must be equal" in fault for fault in modelopt_faults(good.flat, nested, plan))


COMPRESSED_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "status": (lambda m: m.pop("quantization_status"), "quantization_status must be 'compressed'"),
    "overlap": (
        lambda m: m["config_groups"]["group_1"]["targets"].append("re:.*o_proj$"),
        r"must say fp8 of model.layers.0.self_attn.o_proj",
    ),
    "dead": (
        lambda m: m["config_groups"]["group_0"]["targets"].append("model.layers.0.mlp.q_proj"),
        "the target model.layers.0.mlp.q_proj matches no module",
    ),
    "ignore": (lambda m: m["ignore"].clear(), r"must say none of \S+, and says none"),
    "scheme": (
        lambda m: m["config_groups"]["group_0"]["weights"].update(num_bits=6),
        r"config group group_0 \(float-quantized\) is none of fp8, fp8_pc_pt, ",
    ),
    "format": (
        lambda m: m["config_groups"]["group_0"].pop("format"),
        r"config group group_0 \(None\) is none of",
    ),
}


@pytest.mark.parametrize(("edit", "message"), COMPRESSED_EDITS.values(), ids=COMPRESSED_EDITS)
def test_lint_finds_a_broken_compressed_tensors_manifest(edit: Any, message: str) -> None:
    plan = DECODER_PLANS["portable"]
    good = compressed_tensors_manifest(plan, {})
    assert not list(compressed_tensors_faults(good, plan))
    faults = list(compressed_tensors_faults(edited(good, edit), plan))
    assert any(re.search(message, fault) for fault in faults), faults


@pytest.mark.parametrize(("container", "fmt"), sorted(product(Container, set(FORMATS) - {NONE})))
def test_every_format_has_a_layout_or_the_reason_why_not(container, fmt):
    reason = WITHOUT_LAYOUT.get((container, fmt))
    assert ((container, fmt) in LAYOUTS) == (reason is None)
    if reason is not None:
        assert len(reason.split()) > 3
