"""Engine checkpoints of TensorRT-LLM: what the ranks' files hold, and what is refused.

The engine is not run anywhere here: names, shapes and splits are those that its sources ask for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoq.errors import ExportError, VerificationError
from autoq.export import ExportedCache, tensorrt_llm
from autoq.export._plan import ExportPlan
from autoq.export.tensorrt_llm import (
    Parallel,
    export_tensorrt_llm,
    tensorrt_llm_refusals,
    tensorrt_llm_warnings,
    verify_tensorrt_llm,
)
from autoq.formats import FormatName
from autoq.layers import Container
from autoq.layers.cached_layer import CachedLayer
from autoq.models import ModelMap, SlotName, discover, load_model

HELD = ("fp8", "nvfp4", "int4_awq", "w4a8_awq", "fp8_pc_pt", "int8_sq")
ALGORITHMS = {
    "fp8": "FP8",
    "nvfp4": "NVFP4",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN",
    "int8_sq": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
}
QKV, O_PROJ = ("q_proj", "k_proj", "v_proj"), "model.layers.0.self_attn.o_proj"
NORM = "model.layers.0.input_layernorm"
WEIGHTS = {"weights_scaling_factor": ("float32", [1])}
INPUTS = {"activation_scaling_factor": ("float32", [1])}

# What a rank of two holds of `attention.dense` [128, 128] (of one for the groups of 128), by hand.
DENSE = {
    "fp8": {"weight": ("float8_e4m3fn", [128, 64]), **WEIGHTS, **INPUTS},
    "nvfp4": {
        "weight": ("uint8", [128, 32]),
        "weights_scaling_factor": ("float8_e4m3fn", [128, 4]),
        "weights_scaling_factor_2": ("float32", [1]),
        **INPUTS,
    },
    "int4_awq": {
        "weight": ("int8", [64, 128]),
        "weights_scaling_factor": ("float32", [128, 1]),
        "prequant_scaling_factor": ("bfloat16", [128]),
    },
    "w4a8_awq": {
        "weight": ("int8", [64, 128]),
        "weights_scaling_factor": ("float32", [128, 1]),
        "weights_scaling_factor_2": ("float32", [1]),
        "prequant_scaling_factor": ("bfloat16", [128]),
        **INPUTS,
    },
    "fp8_pc_pt": {
        "weight": ("float8_e4m3fn", [128, 64]),
        "per_channel_scale": ("float32", [128]),
    },
    "int8_sq": {
        "weight": ("int8", [128, 64]),
        "per_channel_scale": ("float32", [1, 128]),
        "smoother": ("float32", [1, 64]),
    },
}


def plan_of(
    loaded: Any,
    formats: tuple[str, ...],
    *,
    changes: Mapping[SlotName, Mapping[str, Any]] | None = None,
    container: Container = Container.MODELOPT,
) -> ExportPlan:
    """Formats in turn, a group each, with some calibrations changed."""
    chosen = {
        slot: FormatName(formats[number % len(formats)])
        for number, group in enumerate(loaded.model_map.groups)
        for slot in group.slots
    }
    calibration = loaded.calibrate(chosen)
    for slot, fields in (changes or {}).items():
        calibration[slot, chosen[slot]] = replace(calibration[slot, chosen[slot]], **fields)
    return ExportPlan(
        loaded.model, loaded.model_map, chosen, calibration, container, torch.bfloat16
    )


def write(plan: ExportPlan, folder: Path, tp: int = 1, pp: int = 1) -> Any:
    return export_tensorrt_llm(
        plan, source=None, destination=folder, parallel=Parallel(tp, pp), overwrite=True
    ).report


def ranks(folder: Path) -> list[dict[str, Tensor]]:
    count = len(list(folder.glob("rank*.safetensors")))
    return [load_file(folder / f"rank{number}.safetensors") for number in range(count)]


def said(folder: Path, file: str = "config.json") -> Any:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def weight(plan: ExportPlan, name: str) -> Tensor:
    return plan.model.get_parameter(f"{name}.weight").detach().bfloat16()


@pytest.mark.parametrize("fmt", HELD)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_format_is_put_together_again_bit_for_bit(
    tiny: Callable[[str], Any], tmp_path: Path, architecture: str, fmt: str
) -> None:
    plan = plan_of(tiny(architecture), (fmt,))
    in_groups = "int4" in fmt or "w4a8" in fmt  # a rank of two would have half a group
    for tp, pp in ((1, 2),) if in_groups else ((2, 1), (2, 2)):
        report = write(plan, tmp_path / "out", tp, pp)
        # Embedding, head, last norm, two norms in each of two layers; Qwen2's biases of q, k and v.
        others = {"llama": 7, "qwen2": 13}[architecture]
        assert (report.quantized_matrices, report.unquantized_tensors) == (14, others)
        assert report.ranks == len(ranks(tmp_path / "out")) == tp * pp
    assert said(tmp_path / "out")["quantization"]["quant_algo"] == ALGORITHMS[fmt]
    assert not (tmp_path / "out" / "quant_cfg.json").exists()
    prefix = "transformer.layers.0.attention.dense."
    for held in ranks(tmp_path / "out"):
        found = {
            name.removeprefix(prefix): (str(tensor.dtype)[6:], list(tensor.shape))
            for name, tensor in held.items()
            if name.startswith(prefix)
        }
        assert found == DENSE[fmt]


def test_ranks_hold_heads_and_columns(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """Four heads of q and two of k and v, of 32 features each: by hand."""
    plan = plan_of(tiny("qwen2"), ("none",))
    write(plan, tmp_path / "out", tp=2, pp=2)
    first, second, third, fourth = ranks(tmp_path / "out")
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    q, k, v = (weight(plan, f"{attention}.{name}") for name in QKV)
    here = "transformer.layers.0"  # the second stage's only layer
    expected = torch.cat([q[64:], k[32:], v[32:]])
    assert torch.equal(fourth[f"{here}.attention.qkv.weight"], expected)
    biases = [plan.model.get_parameter(f"{attention}.{name}.bias").bfloat16() for name in QKV]
    expected = torch.cat([biases[0][:64], biases[1][:32], biases[2][:32]])
    assert torch.equal(third[f"{here}.attention.qkv.bias"], expected)
    o_proj, down = weight(plan, f"{attention}.o_proj"), weight(plan, f"{mlp}.down_proj")
    assert torch.equal(fourth[f"{here}.attention.dense.weight"], o_proj[:, 64:])
    assert torch.equal(third[f"{here}.mlp.proj.weight"], down[:, :128])
    # The engine applies its activation function to `fc`.
    assert torch.equal(third[f"{here}.mlp.fc.weight"], weight(plan, f"{mlp}.gate_proj")[:128])
    assert torch.equal(fourth[f"{here}.mlp.gate.weight"], weight(plan, f"{mlp}.up_proj")[128:])
    embedding = weight(plan, "model.embed_tokens")
    assert torch.equal(second["transformer.vocab_embedding.weight"], embedding[144:])
    assert torch.equal(third["lm_head.weight"], weight(plan, "lm_head")[:144])
    assert set(third) - set(first) == {"lm_head.weight", "transformer.ln_f.weight"}
    assert set(first) - set(third) == {"transformer.vocab_embedding.weight"}
    config = said(tmp_path / "out")
    assert config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}
    assert (config["qwen_type"], config["attn_bias"], config["head_size"]) == ("qwen2", True, 32)


def test_fused_fp8_has_one_scale(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"), ("fp8",))
    write(plan, tmp_path / "out")
    (held,) = ranks(tmp_path / "out")
    path = "transformer.layers.0.attention.qkv"
    whole = torch.cat([weight(plan, f"model.layers.0.self_attn.{name}") for name in QKV]).float()
    scale = whole.abs().max() / 448
    assert torch.equal(held[f"{path}.weights_scaling_factor"], scale.reshape(1))
    codes = (whole / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(held[f"{path}.weight"].view(torch.uint8), codes.view(torch.uint8))
    assert held[f"{path}.activation_scaling_factor"].item() == pytest.approx(3.7 / 448)


def test_int4_holds_two_rows_in_a_byte(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"), ("int4_awq",))
    write(plan, tmp_path / "out")
    (held,) = ranks(tmp_path / "out")
    path = "transformer.layers.0.mlp.proj"
    original = weight(plan, "model.layers.0.mlp.down_proj").float()
    # Amax / 7 of each 128 inputs, in the model's dtype; the upper row's code in the lower bits.
    scale = (original.reshape(128, 2, 128).abs().amax(2) / 7).bfloat16().float()
    assert torch.equal(held[f"{path}.weights_scaling_factor"], scale)
    codes = (original / scale.repeat_interleave(128, 1)).round().clamp(-8, 7).to(torch.int8)
    upper, lower = codes[0::2] & 15, codes[1::2] & 15
    assert torch.equal(held[f"{path}.weight"], upper | (lower << 4))


def test_mixed_formats_are_said_layer_by_layer(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"), ("fp8", "nvfp4", "w4a8_awq", "int4_awq", "none"))
    assert write(plan, tmp_path / "out").quantized_matrices == 11
    head = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    awq = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    assert said(tmp_path / "out")["quantization"] == head
    assert said(tmp_path / "out", "quant_cfg.json") == {
        **head,
        "quantized_layers": {
            "transformer.layers.0.attention.qkv": {"quant_algo": "FP8"},
            "transformer.layers.0.attention.dense": {"quant_algo": "NVFP4", "group_size": 16},
            "transformer.layers.0.mlp.fc": {"quant_algo": "W4A8_AWQ", **awq},
            "transformer.layers.0.mlp.gate": {"quant_algo": "W4A8_AWQ", **awq},
            "transformer.layers.0.mlp.proj": {"quant_algo": "W4A16_AWQ", **awq},
            "transformer.layers.1.attention.dense": {"quant_algo": "FP8"},
            "transformer.layers.1.mlp.fc": {"quant_algo": "NVFP4", "group_size": 16},
            "transformer.layers.1.mlp.gate": {"quant_algo": "NVFP4", "group_size": 16},
            "transformer.layers.1.mlp.proj": {"quant_algo": "W4A8_AWQ", **awq},
        },
    }


def test_one_format_beside_none_is_said_once(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"), ("fp8", "none", "fp8", "fp8"))
    write(plan, tmp_path / "out", tp=2, pp=2)  # both stages have the same
    quantization = said(tmp_path / "out")["quantization"]
    assert quantization["quant_algo"] == "FP8"
    assert quantization["exclude_modules"] == [
        "lm_head",
        "transformer.vocab_embedding",
        "transformer.ln_f",
        "transformer.layers.0.attention.dense",
    ]


def input_scales(model_map: ModelMap) -> dict[SlotName, dict[str, Any]]:
    """One that folds into a norm, and one that no norm takes."""
    scale = torch.exp2((torch.arange(128) % 3 - 1).float())
    folded = {"pre_quant_scale": scale, "folds_into": NORM, "weight_amax": 2.0}
    return {
        **{SlotName(f"model.layers.0.self_attn.{name}"): folded for name in QKV},
        SlotName(O_PROJ): {"pre_quant_scale": scale, "weight_amax": 2.0},
    }


@pytest.mark.parametrize(
    "fmt,leaf", [("w4a8_awq", "prequant_scaling_factor"), ("int8_sq", "smoother")]
)
def test_input_scales_are_folded_or_stored(
    tiny: Callable[[str], Any], tmp_path: Path, fmt: str, leaf: str
) -> None:
    loaded = tiny("llama")
    changes = input_scales(loaded.model_map)
    plan = plan_of(loaded, (fmt,), changes=changes)
    report = write(plan, tmp_path / "out", tp=1 if fmt == "w4a8_awq" else 2)
    assert report.folded_norms == 1
    scale = changes[SlotName(O_PROJ)]["pre_quant_scale"]
    held = ranks(tmp_path / "out")
    norm = held[-1]["transformer.layers.0.input_layernorm.weight"]
    assert torch.equal(norm.float(), weight(plan, NORM).float() * scale)
    stored = [rank[f"transformer.layers.0.attention.dense.{leaf}"] for rank in held]
    together = torch.cat(stored, -1).reshape(-1).float()
    # One multiplies inputs, the other divides them.
    assert torch.equal(together, scale if leaf.startswith("prequant") else 1 / scale)
    other = held[0].get(f"transformer.layers.0.attention.qkv.{leaf}")
    if other is not None:
        assert fmt == "w4a8_awq" and torch.equal(other, torch.ones(128).bfloat16())
    else:
        assert fmt == "int8_sq"
        assert held[0]["transformer.layers.1.post_layernorm.scale_to_int"].tolist() == [1.0]


def test_vocabularies_are_filled_up(tmp_path: Path, tiny: Callable[[str], Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    model = LlamaForCausalLM(config)
    loaded = type(tiny("llama"))(tmp_path, model, discover(model))
    plan = plan_of(loaded, ("fp8",))
    write(plan, tmp_path / "out", tp=2)
    first, second = ranks(tmp_path / "out")
    embedding = weight(plan, "model.embed_tokens")
    for name in ("transformer.vocab_embedding.weight", "lm_head.weight"):
        assert torch.equal(first[name], embedding[:19])
        assert torch.equal(
            second[name], torch.cat([embedding[19:], torch.zeros(1, 128)]).bfloat16()
        )
    written = said(tmp_path / "out")
    assert (written["vocab_size"], written["rotary_base"]) == (37, 500000.0)
    assert written["rotary_scaling"]["type"] == "llama3"
    assert written["rotary_scaling"]["factor"] == 8.0


def test_heads_that_are_normalised(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = plan_of(tiny("qwen3"), ("nvfp4",))
    write(plan, tmp_path / "out", tp=2)
    held = ranks(tmp_path / "out")[1]
    name = "transformer.layers.1.attention.k_layernorm.weight"
    assert torch.equal(held[name], weight(plan, "model.layers.1.self_attn.k_norm"))
    assert said(tmp_path / "out")["qk_layernorm"] is True
    (line,) = tensorrt_llm_refusals(plan_of(tiny("qwen3"), ("int8_sq",)), Parallel())
    assert "does not normalise queries and keys, as Qwen3ForCausalLM does" in line


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "none"])
def test_experts_are_stacked_with_up_before_gate(
    tiny: Callable[[str], Any], tmp_path: Path, fmt: str
) -> None:
    """Four experts [512, 128] and [128, 256] on two ranks: by hand."""
    plan = plan_of(tiny("mixtral"), (fmt,))
    report = write(plan, tmp_path / "out", tp=2, pp=2)
    assert report.quantized_matrices == (0 if fmt == "none" else 2 * (4 + 2 * 4))
    held = ranks(tmp_path / "out")[1]  # the second half of the first layer
    path = "transformer.layers.0.mlp"
    columns = 64 if fmt == "nvfp4" else 128  # two codes in a byte
    assert held[f"{path}.fc.weight"].shape == (4, 256, columns)
    assert held[f"{path}.proj.weight"].shape == (4, 128, columns)
    router = plan.model.get_parameter("model.layers.0.mlp.gate.weight").float()
    assert torch.equal(held[f"{path}.router.weight"], router)
    experts = plan.model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").detach()
    gate, up = experts.bfloat16().chunk(2, 1)
    together = torch.cat([up[:, 128:], gate[:, 128:]], 1)
    if fmt == "none":
        assert torch.equal(held[f"{path}.fc.weight"], together)
    elif fmt == "fp8":
        scale = experts.bfloat16().float().abs().amax((1, 2)) / 448
        assert torch.equal(held[f"{path}.fc.weights_scaling_factor"], scale.reshape(4, 1))
        codes = (together.float() / scale.reshape(4, 1, 1)).clamp(-448, 448)
        expected = codes.to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(held[f"{path}.fc.weight"].view(torch.uint8), expected)
    else:
        assert held[f"{path}.fc.weights_scaling_factor"].shape == (4, 256, 8)
        assert held[f"{path}.fc.weights_scaling_factor_2"].shape == (4,)
    if fmt != "none":
        assert held[f"{path}.fc.activation_scaling_factor"].shape == (1,)
        left_out = said(tmp_path / "out")["quantization"]["exclude_modules"]
        assert left_out[3:] == [f"{path}.router"]
    config = said(tmp_path / "out")
    assert config["moe"] == {"num_experts": 4, "top_k": 2, "normalization_mode": 1}
    assert (config["hidden_act"], config["mapping"]["moe_tp_size"]) == ("swiglu", 2)


def test_experts_beside_other_formats(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = plan_of(tiny("mixtral"), ("fp8", "fp8", "none"))
    assert write(plan, tmp_path / "out", tp=2).quantized_matrices == 8
    left_out = said(tmp_path / "out")["quantization"]["exclude_modules"]
    assert {"transformer.layers.0.mlp", "transformer.layers.1.mlp.router"} <= set(left_out)
    (line, *_) = tensorrt_llm_refusals(plan_of(tiny("mixtral"), ("int4_awq",)), Parallel())
    assert "experts.0.gate_up_proj cannot be int4_awq" in line and "can be fp8, nvfp4" in line
    expert = SlotName("model.layers.1.mlp.experts.2.down_proj")
    changed = plan_of(tiny("mixtral"), ("fp8",), changes={expert: {"input_amax": 1.0}})
    (line,) = tensorrt_llm_refusals(changed, Parallel())
    assert "input_amax differs" in line
    scaled = {"pre_quant_scale": torch.full((256,), 2.0)}
    changed = plan_of(tiny("mixtral"), ("fp8",), changes={expert: scaled})
    assert "the router reads what the experts read" in tensorrt_llm_refusals(changed, Parallel())[0]


@pytest.mark.parametrize(
    "formats,parallel,reason",
    [
        (("mxfp8",), Parallel(), r"cannot hold mxfp8: .* it can hold: fp8, nvfp4, int4_awq"),
        (("int8_wo",), Parallel(), "rearranged for the GPU"),
        (("int8_sq", "none"), Parallel(), "int8_sq for all layers or none, and others are none"),
        (("fp8_pc_pt", "fp8"), Parallel(), "fp8_pc_pt for all layers or none"),
        (("int4_awq",), Parallel(2), r"block of 128, and with tp_size 2 they are 64"),
        (("fp8",), Parallel(3), "tp_size must divide the model's 4 attention heads, got 3"),
        (("fp8",), Parallel(4), "tp_size must divide the model's 2 key-value heads, got 4"),
        (("fp8",), Parallel(1, 3), "pp_size must divide the model's 2 layers, got 3"),
        (("fp8",), Parallel(0), "must be at least 1, got 0 and 1"),
        (("fp8", "nvfp4", "fp8"), Parallel(1, 2), "names layers anew in each pipeline stage"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tiny: Callable[[str], Any],
    tmp_path: Path,
    formats: tuple[str, ...],
    parallel: Parallel,
    reason: str,
) -> None:
    plan = plan_of(tiny("llama"), formats)
    with pytest.raises(ExportError, match=reason):
        export_tensorrt_llm(
            plan, source=None, destination=tmp_path / "out", parallel=parallel, overwrite=False
        )
    assert list(tmp_path.iterdir()) == []


def test_other_families_are_refused_by_name(tiny: Callable[[str], Any]) -> None:
    (line,) = tensorrt_llm_refusals(plan_of(tiny("opt"), ("none",)), Parallel())
    assert "written of LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Qwen2" in line
    assert line.endswith("and the model is OPTForCausalLM; choose another container")


def test_what_the_engine_fuses_must_agree(tiny: Callable[[str], Any]) -> None:
    loaded = tiny("llama")
    k_proj = SlotName("model.layers.0.self_attn.k_proj")
    for fmt, field in (("fp8", "weight_amax"), ("nvfp4", "input_amax")):
        plan = plan_of(loaded, (fmt,), changes={k_proj: {field: 9.0}})
        (line,) = tensorrt_llm_refusals(plan, Parallel())
        assert "the engine fuses" in line and f"{field} differs" in line
    scale = {"pre_quant_scale": torch.full((128,), 2.0)}
    (line,) = tensorrt_llm_refusals(
        plan_of(loaded, ("fp8",), changes={SlotName(O_PROJ): scale}), Parallel()
    )
    assert f"no place for the input scale of {O_PROJ} in fp8" in line
    mixed = plan_of(loaded, ("fp8",))
    changed = replace(mixed, slot_formats={**mixed.slot_formats, k_proj: FormatName("none")})
    assert (
        "one matrix of one format, got fp8, none, fp8"
        in tensorrt_llm_refusals(changed, Parallel())[0]
    )


def test_a_quantised_head_is_refused(tiny: Callable[[str], Any]) -> None:
    loaded = tiny("llama")
    model = load_model(loaded.source)
    with_head = type(loaded)(loaded.source, model, discover(model, include=("lm_head",)))
    (line,) = tensorrt_llm_refusals(plan_of(with_head, ("fp8",)), Parallel())
    assert line.startswith("lm_head cannot be quantised in tensorrt-llm")


def test_float32_is_refused(tiny: Callable[[str], Any]) -> None:
    plan = replace(plan_of(tiny("llama"), ("fp8",)), scale_dtype=torch.float32)
    assert (
        "float16 or bfloat16, and the model's dtype is float32"
        in tensorrt_llm_refusals(plan, Parallel())[0]
    )


def test_w4a8_of_another_container_is_said(tiny: Callable[[str], Any]) -> None:
    plan = plan_of(tiny("llama"), ("w4a8_awq",), container=Container.COMPRESSED_TENSORS)
    always, line = tensorrt_llm_warnings(plan)
    assert "no engine of TensorRT-LLM has been built" in always
    assert "search with --container modelopt" in line
    assert tensorrt_llm_warnings(plan_of(tiny("llama"), ("w4a8_awq",))) == [always]


# The key/value cache


def with_cache(plan: ExportPlan, *formats: str) -> ExportPlan:
    """Largest magnitudes of keys and values that hands can divide."""
    amax = ((896.0, 44.8), (6.35, 12.7))
    layers = tuple(
        CachedLayer(
            name=f"model.layers.{number}.self_attn",
            key_heads=2,
            key_dim=32,
            value_heads=2,
            value_dim=32,
            key_amax=keys,
            value_amax=values,
        )
        for number, (keys, values) in enumerate(amax)
    )
    chosen = {
        layer.name: FormatName(fmt)
        for layer, fmt in zip(layers, formats * (2 // len(formats)), strict=True)
    }
    return replace(plan, kv_cache=ExportedCache(layers, chosen))


@pytest.mark.parametrize(
    "fmt,algorithm,scales", [("fp8", "FP8", (2.0, 12.7 / 448)), ("int8", "INT8", (896 / 127, 0.1))]
)
@pytest.mark.parametrize("weights", [("fp8",), ("fp8", "nvfp4"), ("none",), ("int8_sq",)])
def test_a_cache_has_one_scale_for_keys_and_values(
    tiny: Callable[[str], Any],
    tmp_path: Path,
    weights: tuple[str, ...],
    fmt: str,
    algorithm: str,
    scales: tuple[float, float],
) -> None:
    plan = with_cache(plan_of(tiny("llama"), weights), fmt)
    assert write(plan, tmp_path / "out", tp=2).cache_scales == 2
    assert said(tmp_path / "out")["quantization"]["kv_cache_quant_algo"] == algorithm
    if len(weights) > 1:
        assert said(tmp_path / "out", "quant_cfg.json")["kv_cache_quant_algo"] == algorithm
    for held in ranks(tmp_path / "out"):
        for layer, expected in enumerate(scales):
            scale = held[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
            assert scale.dtype == torch.float32 and scale.shape == (1,)
            assert scale.item() == pytest.approx(expected)
    (line,) = tensorrt_llm_warnings(plan)[1:]
    assert "differ most in model.layers.0.self_attn, by a factor of 20" in line


def test_stages_have_the_scales_of_their_layers(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = with_cache(plan_of(tiny("llama"), ("fp8",)), "fp8")
    write(plan, tmp_path / "out", pp=2)
    name = "transformer.layers.0.attention.kv_cache_scaling_factor"
    found = [held[name].item() for held in ranks(tmp_path / "out")]
    assert found == pytest.approx([2.0, 12.7 / 448])


def test_a_cache_that_is_not_quantised_says_nothing(
    tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    plan = with_cache(plan_of(tiny("llama"), ("fp8",)), "none")
    assert write(plan, tmp_path / "out").cache_scales == 0
    assert said(tmp_path / "out")["quantization"]["kv_cache_quant_algo"] is None
    assert not [name for name in ranks(tmp_path / "out")[0] if "kv_cache" in name]
    assert len(tensorrt_llm_warnings(plan)) == 1


@pytest.mark.parametrize(
    "formats,reason",
    [
        (("nvfp4",), "hold no key/value cache in nvfp4; formats that they can hold: fp8, int8"),
        (("fp8", "int8"), "for all layers, and this plan has fp8, int8; search with --kv-scope"),
    ],
)
def test_caches_that_cannot_be_written(
    tiny: Callable[[str], Any], formats: tuple[str, ...], reason: str
) -> None:
    plan = with_cache(plan_of(tiny("llama"), ("fp8",)), *formats)
    assert reason in tensorrt_llm_refusals(plan, Parallel())[0]


@pytest.mark.parametrize(
    "value,reason", [(None, "lacks .*kv_cache_scaling_factor"), (1.0, "kv_cache_scaling_factor")]
)
def test_a_damaged_scale_of_a_cache_is_found(
    tiny: Callable[[str], Any], tmp_path: Path, value: float | None, reason: str
) -> None:
    plan = with_cache(plan_of(tiny("llama"), ("fp8",)), "fp8")
    write(plan, tmp_path / "out")
    file = tmp_path / "out" / "rank0.safetensors"
    held, name = load_file(file), "transformer.layers.1.attention.kv_cache_scaling_factor"
    del held[name]
    save_file(held if value is None else {**held, name: torch.tensor([value])}, file)
    with pytest.raises(VerificationError, match=reason):
        verify_tensorrt_llm(tmp_path / "out", plan)


def test_an_exact_gelu_is_said(tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tiny("gpt2"), ("fp8",))  # whose own is the approximation
    assert len(tensorrt_llm_warnings(plan)) == 1
    monkeypatch.setattr(plan.model.config, "activation_function", "gelu")
    assert "gelu is exact" in tensorrt_llm_warnings(plan)[-1]
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    gelu = torch.nn.functional.gelu
    assert 4e-4 < float((gelu(x) - gelu(x, approximate="tanh")).abs().max()) < 5e-4


def test_a_short_window_is_said(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny("mistral")
    monkeypatch.setattr(loaded.model.config, "sliding_window", 64)
    line = tensorrt_llm_warnings(plan_of(loaded, ("fp8",)))[-1]
    assert "give the runtime max_attention_window_size 64" in line


@pytest.mark.parametrize(
    "damage,reason",
    [
        ({"transformer.layers.0.mlp.fc.weight": None}, "lacks transformer.layers.0.mlp.fc.weight"),
        ({"transformer.more": torch.zeros(1)}, "holds transformer.more, unasked for"),
        (
            {"transformer.layers.1.mlp.gate.weights_scaling_factor": torch.ones(1)},
            "the same scale, and these differ",
        ),
        (
            {"transformer.layers.0.attention.dense.activation_scaling_factor": torch.ones(1)},
            "hold the same .*dense.activation_scaling_factor",
        ),
        (
            {"transformer.layers.0.post_layernorm.weight": torch.ones(128).bfloat16()},
            "hold the same .*post_layernorm.weight",
        ),
    ],
)
def test_damage_is_found(
    tiny: Callable[[str], Any], tmp_path: Path, damage: dict[str, Tensor | None], reason: str
) -> None:
    plan = plan_of(tiny("llama"), ("fp8",))
    write(plan, tmp_path / "out", tp=2)
    file = tmp_path / "out" / "rank1.safetensors"
    held: dict[str, Tensor | None] = {**load_file(file), **damage}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file)
    with pytest.raises(VerificationError, match=reason):
        verify_tensorrt_llm(tmp_path / "out", plan)


def test_two_exchanged_projections_are_found(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    plan = plan_of(tiny("llama"), ("fp8",))
    write(plan, tmp_path / "out")
    file = tmp_path / "out" / "rank0.safetensors"
    held, layer = load_file(file), "transformer.layers.0.mlp"
    fc, gate = f"{layer}.fc.weight", f"{layer}.gate.weight"
    save_file({**held, fc: held[gate], gate: held[fc]}, file)
    with pytest.raises(VerificationError, match="gate_proj does not read back"):
        verify_tensorrt_llm(tmp_path / "out", plan)


def test_no_half_checkpoint_is_left(
    tiny: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full_disk(tensors: dict[str, Tensor], path: Path) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(tensorrt_llm, "save_file", full_disk)
    with pytest.raises(ExportError, match="No space left on device"):
        write(plan_of(tiny("llama"), ("fp8",)), tmp_path / "out", tp=2)
    assert written and list(tmp_path.iterdir()) == []
