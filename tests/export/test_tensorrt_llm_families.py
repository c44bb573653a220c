"""Engine checkpoints of every family: put together again, and summed up as the engine does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoq.errors import VerificationError
from autoq.export import ExportedCache
from autoq.export._plan import ExportPlan
from autoq.export._tensorrt_llm_families import FAMILIES
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
from autoq.models import SlotName, discover
from autoq.testing.tiny_models import make_family_model
from tests.export.tensorrt_llm_sums import engine_logits

ALONE = ("phi", "phi3", "phi4", "gptj", "gpt_neox", "phimoe")
STAGES = dict.fromkeys(ALONE, 1)  # the engine's models of these have no more
DENSE = ("llama", "qwen2", "qwen3", "gpt2", "starcoder2", *ALONE)
GEMMA = ("gemma", "gemma2", "gemma3")
NEW = (*DENSE[3:], *GEMMA)
FLOAT32_TOLERANCE = 1e-4  # sums in another order


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    made: dict[str, nn.Module] = {}

    def make(name: str) -> nn.Module:
        if name not in made:
            made[name] = OTHERS[name]() if name in OTHERS else make_family_model(name)
            _spread_norms(made[name])
        return made[name]

    return make


def _inner(kind: str, **settings: Any) -> nn.Module:
    """The engine's GPT-J and GPT-NeoX have four times the hidden size between an MLP's linears."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=288, bos_token_id=1, eos_token_id=2, **settings
    )
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():  # buffers keep their sines and cosines
        drawn = parameter.data.normal_(std=0.1) if parameter.ndim == 2 else parameter.data
        parameter.data = drawn.bfloat16()
    return model.eval()


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "gptj": lambda: _inner("GPTJ", n_embd=128, n_layer=2, n_head=4, n_positions=64, rotary_dim=16),
    "gpt_neox": lambda: _inner(
        "GPTNeoX",
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        hidden_act="gelu_new",
    ),
}


def _spread_norms(model: nn.Module) -> None:
    """Norms and biases that are not one and zero, so that one in another's place is seen."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            offset = torch.randn(parameter.shape, generator=generator) / 8
            parameter.data = (parameter.data.float() + offset).to(parameter.dtype)
            assert parameter.data.abs().max() > 0, name


def plan_of(calibrate: Any, model: nn.Module, formats: tuple[str, ...]) -> ExportPlan:
    model_map = discover(model)
    chosen = {
        slot: FormatName(formats[number % len(formats)])
        for number, group in enumerate(model_map.groups)
        for slot in group.slots
    }
    calibration = calibrate(model, model_map, chosen)
    return ExportPlan(model, model_map, chosen, calibration, Container.MODELOPT, torch.bfloat16)


@pytest.fixture
def planned(family: Callable[[str], nn.Module], tiny: Callable[[str], Any]) -> Any:
    """Family and formats in turn -> a plan, every group calibrated by its largest magnitudes."""
    kind = type(tiny("llama"))

    def calibrate(model: nn.Module, model_map: Any, chosen: Any) -> Any:
        return kind(Path(), model, model_map).calibrate(chosen)

    return lambda name, *formats: plan_of(calibrate, family(name), formats)


def write(plan: ExportPlan, folder: Path, tp: int, pp: int) -> Any:
    return export_tensorrt_llm(
        plan, source=None, destination=folder, parallel=Parallel(tp, pp), overwrite=True
    ).report


def ranks(folder: Path) -> list[dict[str, Tensor]]:
    count = len(list(folder.glob("rank*.safetensors")))
    return [load_file(folder / f"rank{number}.safetensors") for number in range(count)]


def said(folder: Path, file: str = "config.json") -> Any:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def test_every_family_has_a_test() -> None:
    made = {type(make_family_model(name)).__name__ for name in (*DENSE, *GEMMA)}
    others = {"MistralForCausalLM", "MixtralForCausalLM"}  # Llama's, and experts elsewhere
    assert made | others == set(FAMILIES)


@pytest.mark.parametrize("name", [*DENSE, *GEMMA])
def test_the_engines_sums_are_the_models(planned: Any, tmp_path: Path, name: str) -> None:
    """Nothing is quantised; ranks and stages, names, orders, norms, positions all matter."""
    plan = planned(name, "none")
    write(plan, tmp_path / "out", 2, STAGES.get(name, 2))
    ids = torch.arange(5, 29)
    found = engine_logits(said(tmp_path / "out"), ranks(tmp_path / "out"), ids)
    model = copy.deepcopy(plan.model).to(torch.float32)
    if name in GEMMA:
        _round_norms(model)
    with torch.no_grad():
        expected = model(ids.unsqueeze(0)).logits[0]
    assert expected.std() > 0.1
    bound = FLOAT32_TOLERANCE * float(expected.abs().max())
    assert float((found - expected).abs().max()) < bound


def _round_norms(model: nn.Module) -> None:
    """The engine's checkpoint has one plus the weight, in bfloat16."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = (1 + parameter.data).bfloat16().float() - 1


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "w4a8_awq"])
def test_every_format_is_put_together_again_bit_for_bit(
    planned: Any, tmp_path: Path, name: str, fmt: str
) -> None:
    if (name, fmt) == ("phimoe", "w4a8_awq"):
        (line, *_) = tensorrt_llm_refusals(planned(name, fmt), Parallel())
        assert "experts can be fp8, nvfp4" in line
        return
    plan = planned(name, fmt)
    tp = 1 if fmt == "w4a8_awq" else 2  # a rank of two would have half a group of 128
    report = write(plan, tmp_path / "out", tp, STAGES.get(name, 2))
    assert report.quantized_matrices == len(plan.model_map.slots)
    # Every parameter that is no slot; a head that is the embedding is written, too.
    slots = {f"{slot.module}.{slot.parameter}" for slot in plan.model_map.slots.values()}
    others = {key for key, _ in plan.model.named_parameters() if key not in slots}
    is_tied = plan.model.config.tie_word_embeddings
    assert report.unquantized_tensors == len(others) + is_tied
    algorithm = {"fp8": "FP8", "nvfp4": "NVFP4", "w4a8_awq": "W4A8_AWQ"}[fmt]
    assert said(tmp_path / "out")["quantization"]["quant_algo"] == algorithm


@pytest.mark.parametrize("name", NEW)
def test_mixed_formats_are_said_layer_by_layer(planned: Any, tmp_path: Path, name: str) -> None:
    plan = planned(name, "fp8", "nvfp4", "none")
    write(plan, tmp_path / "out", 2, 1)
    assert said(tmp_path / "out")["quantization"]["quant_algo"] == "MIXED_PRECISION"
    layers = said(tmp_path / "out", "quant_cfg.json")["quantized_layers"]
    held = ranks(tmp_path / "out")[1]
    for path, entry in layers.items():
        stored = held[f"{path}.weight"].dtype
        assert stored == {"FP8": torch.float8_e4m3fn, "NVFP4": torch.uint8}[entry["quant_algo"]]
    plain = {
        name.removesuffix(".weight")
        for name, tensor in held.items()
        if name.endswith(".weight") and tensor.dtype == torch.bfloat16 and tensor.ndim == 2
    }
    assert plain and not plain & set(layers)


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
def test_gpt_in_int8(planned: Any, tmp_path: Path, name: str) -> None:
    plan = planned(name, "int8_sq")
    write(plan, tmp_path / "out", 2, 1)
    held = ranks(tmp_path / "out")[0]
    layer = "transformer.layers.1"
    assert held[f"{layer}.post_layernorm.scale_to_int"].tolist() == [1.0]
    assert held[f"{layer}.mlp.fc.per_channel_scale"].shape == (1, 128)
    assert held[f"{layer}.mlp.proj.smoother"].shape == (1, 128)


def test_gpt2_is_taken_apart(planned: Any, tmp_path: Path) -> None:
    """c_attn [128, 384] of four heads: the second rank's queries, keys and values, by hand."""
    plan = planned("gpt2", "none")
    write(plan, tmp_path / "out", 2, 1)
    held, attention = ranks(tmp_path / "out")[1], plan.model.transformer.h[0].attn
    rows = [*range(64, 128), *range(192, 256), *range(320, 384)]
    path = "transformer.layers.0.attention"
    assert torch.equal(held[f"{path}.qkv.weight"], attention.c_attn.weight.t()[rows])
    assert torch.equal(held[f"{path}.qkv.bias"], attention.c_attn.bias[rows])
    assert torch.equal(held[f"{path}.dense.weight"], attention.c_proj.weight.t()[:, 64:])
    assert torch.equal(held[f"{path}.dense.bias"], attention.c_proj.bias)
    positions = held["transformer.position_embedding.weight"]
    assert torch.equal(positions, plan.model.transformer.wpe.weight[128:])
    config = said(tmp_path / "out")
    fields = ("gpt_variant", "position_embedding_type", "hidden_act", "intermediate_size", "bias")
    assert [config[name] for name in fields] == ["gpt2", "learned_absolute", "gelu", 256, True]


def test_gpt_neox_is_taken_apart(planned: Any, tmp_path: Path) -> None:
    """[384, 128], each of four heads' queries, keys and values in turn: by hand."""
    plan = planned("gpt_neox", "none")
    write(plan, tmp_path / "out", 2, 1)
    held = ranks(tmp_path / "out")[1]  # the third and the fourth head
    whole = plan.model.gpt_neox.layers[1].attention.query_key_value
    starts = [192, 288, 224, 320, 256, 352]  # q, q, k, k, v, v
    rows = [row for start in starts for row in range(start, start + 32)]
    path = "transformer.layers.1.attention.qkv"
    assert torch.equal(held[f"{path}.weight"], whole.weight[rows])
    assert torch.equal(held[f"{path}.bias"], whole.bias[rows])
    config = said(tmp_path / "out")
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.25, 10000.0)


def test_gptj_has_biases_on_the_first_rank_alone(planned: Any, tmp_path: Path) -> None:
    plan = planned("gptj", "fp8")
    write(plan, tmp_path / "out", 2, 1)
    first, second = ranks(tmp_path / "out")
    path = "transformer.layers.0.mlp"
    own = plan.model.transformer.h[0].mlp
    assert torch.equal(first[f"{path}.proj.bias"], own.fc_out.bias)
    assert not second[f"{path}.proj.bias"].any()
    assert torch.equal(second[f"{path}.fc.bias"], own.fc_in.bias[256:])
    config = said(tmp_path / "out")
    assert (config["position_embedding_type"], config["rotary_dim"]) == ("rope_gptj", 16)
    with pytest.raises(VerificationError, match=r"adds up .*proj\.bias of all ranks"):
        save_file(
            {**second, f"{path}.proj.bias": own.fc_out.bias.data},
            tmp_path / "out" / "rank1.safetensors",
        )
        verify_tensorrt_llm(tmp_path / "out", plan)


def test_experts_of_phimoe(planned: Any, tmp_path: Path) -> None:
    plan = planned("phimoe", "fp8")
    report = write(plan, tmp_path / "out", 2, 1)
    assert report.quantized_matrices == 2 * (4 + 2 * 4)
    config = said(tmp_path / "out")
    assert config["architecture"] == "PhiMoEForCausalLM"
    assert config["moe"] == {
        "num_experts": 4,
        "top_k": 2,
        "normalization_mode": 2,
        "sparse_mixer_epsilon": 0.01,
    }
    held = ranks(tmp_path / "out")[0]
    router = plan.model.get_parameter("model.layers.0.mlp.router.weight")
    assert torch.equal(held["transformer.layers.0.mlp.router.weight"], router.float())
    assert held["lm_head.bias"].shape == (144,)


def test_gpt_neox_takes_no_quantised_cache(planned: Any) -> None:
    layer = CachedLayer(
        name="gpt_neox.layers.0.attention", key_heads=4, key_dim=32, value_heads=4, value_dim=32
    )
    cache = ExportedCache((layer,), {layer.name: FormatName("fp8")})
    plan = replace(planned("gpt_neox", "fp8"), kv_cache=cache)
    (line,) = tensorrt_llm_refusals(plan, Parallel())
    assert "does not tell its attention of a quantised key/value cache" in line


def test_phi3_has_up_above_gate_on_every_rank(planned: Any, tmp_path: Path) -> None:
    plan = planned("phi3", "none")
    write(plan, tmp_path / "out", 2, 1)
    whole = plan.model.get_parameter("model.layers.1.mlp.gate_up_proj.weight")
    for rank, held in enumerate(ranks(tmp_path / "out")):
        gate, up = whole[rank * 128 :][:128], whole[256 + rank * 128 :][:128]
        assert torch.equal(held["transformer.layers.1.mlp.fc.weight"], torch.cat([up, gate]))
    assert said(tmp_path / "out")["hidden_act"] == "swiglu"


def test_long_rotary_embeddings_of_phi3(
    planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("phi3", "none")
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 1.0,
    }
    monkeypatch.setattr(plan.model.config, "rope_parameters", rope)
    write(plan, tmp_path / "out", 1, 1)
    config = said(tmp_path / "out")
    assert config["position_embedding_type"] == "long_rope"
    assert config["rotary_scaling"] is None
    assert config["original_max_position_embeddings"] == 64
    assert config["longrope_scaling_short_factors"] == [1.0] * 16
    assert config["longrope_scaling_long_factors"] == [2.0] * 16


def test_norms_of_gemma_are_stored_with_one_added(planned: Any, tmp_path: Path) -> None:
    plan = planned("gemma3", "fp8")
    write(plan, tmp_path / "out", 1, 1)
    (held,) = ranks(tmp_path / "out")
    for engine, path in (
        ("transformer.layers.0.pre_feedforward_layernorm", "layers.0.pre_feedforward_layernorm"),
        ("transformer.layers.1.attention.q_layernorm", "layers.1.self_attn.q_norm"),
        ("transformer.ln_f", "norm"),
    ):
        weight = plan.model.get_parameter(f"model.{path}.weight").float()
        assert torch.equal(held[f"{engine}.weight"], (1 + weight).bfloat16())
    config = said(tmp_path / "out")
    assert (config["rotary_base"], config["rope_local_base_freq"]) == (1000000.0, 10000.0)
    assert (config["_sliding_window_pattern"], config["sliding_window"]) == (6, 64)
    assert "max_attention_window_size 64" in tensorrt_llm_warnings(plan)[-1]
    assert "max_attention_window_size 64 256" in tensorrt_llm_warnings(planned("gemma2", "fp8"))[-1]


@pytest.mark.parametrize(
    "name,settings,reason",
    [
        ("gpt2", {"scale_attn_weights": False}, "attention weights that are not scaled"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention scaled by the layer's"),
        ("phi", {"qk_layernorm": True}, "normalised queries and keys"),
        ("phi", {"num_key_value_heads": 2}, "heads of keys and values that queries share"),
        ("phi", {"layer_norm_eps": 1e-6}, "norms with epsilon 1e-06"),
        ("phi3", {"hidden_act": "gelu"}, "the activation function gelu"),
        ("gptj", {"n_inner": 256}, "256 intermediate features, not four times the hidden size"),
        ("gpt_neox", {"use_parallel_residual": False}, "an MLP behind attention, not beside it"),
        ("gpt_neox", {"layer_norm_eps": 1e-6}, "norms with epsilon 1e-06"),
        ("gpt_neox", {"attention_bias": False}, "attention without biases"),
        ("phimoe", {"lm_head_bias": False}, "an output head without a bias"),
        ("gemma", {"use_bidirectional_attention": True}, "attention in both directions"),
        (
            "gemma3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "sliding layers that are not all but every 6th",
        ),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                }
            },
            "rotary embeddings default, and the model's are linear",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "default, linear, dynamic, llama3, and the model's are longrope",
        ),
    ],
)
def test_what_the_engine_does_not_have_is_refused(
    planned: Any, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any], reason: str
) -> None:
    plan = planned(name, "none")
    for key, value in settings.items():
        monkeypatch.setattr(plan.model.config, key, value)
    assert reason in tensorrt_llm_refusals(plan, Parallel())[0]


@pytest.mark.parametrize("name", ALONE)
def test_phi_has_no_stages(planned: Any, name: str) -> None:
    (line,) = tensorrt_llm_refusals(planned(name, "fp8"), Parallel(1, 2))
    assert "has no pipeline stages, got pp_size 2; choose pp_size 1" in line


@pytest.mark.parametrize(
    "name,fmt",
    [("phi", "int8_sq"), ("phi3", "fp8_pc_pt"), ("gemma2", "int8_sq"), ("gpt2", "fp8_pc_pt")],
)
def test_whole_formats_of_layers_that_are_not_known(planned: Any, name: str, fmt: str) -> None:
    (line,) = tensorrt_llm_refusals(planned(name, fmt), Parallel())
    assert f"in {fmt} are not known to autoq, those of LlamaForCausalLM" in line


def test_norms_of_gemma_take_no_input_scale(planned: Any) -> None:
    plan = planned("gemma", "w4a8_awq")
    norm, fmt = "model.layers.0.input_layernorm", FormatName("w4a8_awq")
    changed = dict(plan.calibration)
    for part in ("q_proj", "k_proj", "v_proj"):
        key = SlotName(f"model.layers.0.self_attn.{part}"), fmt
        scale = torch.full((128,), 2.0)
        changed[key] = replace(changed[key], pre_quant_scale=scale, folds_into=norm)
    (line,) = tensorrt_llm_refusals(replace(plan, calibration=changed), Parallel())
    assert f"with one added, so that none takes an input scale, and {norm} has one" in line
