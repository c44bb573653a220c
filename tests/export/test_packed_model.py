"""Loaded checkpoints: what the simulation computes, in the memory that the plan says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoq.errors import ExportError
from autoq.export import LOGITS_BOUND, load_packed, simulated_checkpoint
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import Container
from autoq.layers.packed import PackedExperts, PackedLinear, PackedRows
from autoq.models import forward_logits
from autoq.testing.tiny_models import TINY_ARCHITECTURES

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
MixedPlan = Callable[[str, Container], Any]
UniformPlan = Callable[[str, Container, str], Any]
FolderPlan = Callable[..., Any]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return forward_logits(model, ids)


def assert_equals_simulation(path: Path, ids: Tensor, **options: Any) -> None:
    ours = logits(load_packed(path, **options), ids)
    assert torch.equal(ours, logits(simulated_checkpoint(path, **options).model, ids))


def packed_layers(model: nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def bytes_of(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- every architecture --------------------------------------------------------------------------


@pytest.mark.parametrize("container", list(Container))
@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_loaded_model_is_the_simulation_in_the_plans_bytes(
    name: str, container: Container, mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = mixed_plan(name, container)
    path = planned.export(tmp_path / "out").path
    model = load_packed(path)
    simulated = simulated_checkpoint(path).model

    assert torch.equal(logits(model, input_ids), logits(simulated, input_ids))

    slots = planned.tiny.model_map.slots
    quantized = {slots[name]: fmt for name, fmt in planned.slot_formats.items() if fmt != NONE}
    assert len(packed_layers(model)) == len(quantized)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    itemsize = 2  # the models are bfloat16
    rest = bytes_of(simulated) - itemsize * sum(slot.weights for slot in quantized)
    stored_bits = sum(
        FORMATS[fmt].storage_bits(slot.out_features, slot.in_features).stored_bits
        for slot, fmt in quantized.items()
    )
    # compressed-tensors runs INT4 weights without a second level, and inputs without a scale.
    two_level = sum(fmt == "w4a8_awq" for fmt in quantized.values())
    absent_bits = 64 * two_level if container is COMPRESSED else 0
    assert (bytes_of(model) - rest) * 8 == stored_bits - absent_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_any_dtype_computes_what_the_simulation_does(
    name: str, dtype: torch.dtype, mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = mixed_plan(name, MODELOPT).export(tmp_path / "out").path
    assert load_packed(path, dtype=dtype).dtype == dtype
    assert_equals_simulation(path, input_ids, dtype=dtype)


def test_what_transformers_keeps_in_float32_stays_so(
    uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    path = uniform_plan("t5", MODELOPT, "fp8").export(tmp_path / "out").path
    model: Any = load_packed(path, dtype=torch.float16)
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wo.weight.dtype == torch.float32
    assert feed_forward.wi_0.weight.dtype == torch.float16


def bart(folder: Path) -> Path:
    """A tiny BART, with one layer on each side, saved."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=288,
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(config).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    return folder


def test_bart_encodes_and_decodes(
    folder_plan: FolderPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = folder_plan(bart(tmp_path / "bart"), COMPRESSED, "nvfp4")
    path = planned.export(tmp_path / "out").path
    assert len(packed_layers(load_packed(path))) == 6 + 10  # an encoder's layer, a decoder's
    assert_equals_simulation(path, input_ids)


# --- generation ----------------------------------------------------------------------------------


def generated(model: Any, ids: Tensor) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return found


@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("llama", COMPRESSED),
        ("gemma3", MODELOPT),
        ("gpt2", MODELOPT),
        ("mixtral", MODELOPT),
        ("qwen3_moe", MODELOPT),
        ("t5", MODELOPT),
    ],
)
def test_generates_the_simulations_tokens(
    name: str, container: Container, mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = mixed_plan(name, container).export(tmp_path / "out").path
    simulated = simulated_checkpoint(path).model
    assert torch.equal(generated(load_packed(path), input_ids), generated(simulated, input_ids))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "container"),
    [("llama", MODELOPT), ("llama", COMPRESSED), ("gpt2", MODELOPT), ("mixtral", MODELOPT)],
)
def test_gpu_computes_what_the_simulation_does(
    name: str, container: Container, mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = mixed_plan(name, container).export(tmp_path / "out").path
    model = load_packed(path, dtype=torch.float32, device="cuda")
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    ours = logits(model, input_ids.cuda()).cpu()
    theirs = logits(simulated_checkpoint(path, dtype=torch.float32).model, input_ids)
    # Sums in another order move single activations to a neighbouring code.
    assert (ours - theirs).norm() / theirs.norm() <= LOGITS_BOUND
    assert generated(model, input_ids.cuda()).shape[0] == len(input_ids)


def test_generation_settings_of_the_folder_are_taken(
    uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    path = uniform_plan("llama", COMPRESSED, "fp8").export(tmp_path / "out").path
    settings = path / "generation_config.json"
    settings.write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 7}))
    model: Any = load_packed(path)
    assert model.generation_config.max_new_tokens == 3
    assert model.generation_config.eos_token_id == 7
    settings.write_text("{")
    with pytest.raises(ExportError, match=r"generation_config\.json cannot be read"):
        load_packed(path)


# --- what a loaded model is ----------------------------------------------------------------------


def test_loaded_model_is_for_inference(uniform_plan: UniformPlan, tmp_path: Path) -> None:
    path = uniform_plan("llama", MODELOPT, "nvfp4").export(tmp_path / "out").path
    model: Any = load_packed(path)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ExportError, match="cannot be saved again"):
        model.save_pretrained(tmp_path / "copy")
    assert model.config.to_dict()["quantization_config"]["quant_method"] == "modelopt"


def test_loaded_model_can_be_cast(
    uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = uniform_plan("llama", MODELOPT, "nvfp4").export(tmp_path / "out").path
    cast = load_packed(path).to(torch.float32)
    assert torch.equal(
        logits(cast, input_ids), logits(load_packed(path, dtype=torch.float32), input_ids)
    )


def test_fast_ways_to_run_experts_are_refused(
    uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = uniform_plan("mixtral", MODELOPT, "fp8").export(tmp_path / "out").path
    model: Any = load_packed(path)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, PackedExperts)
    for implementation in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        with pytest.raises(Exception, match=r"set_experts_implementation\('eager'\)"):
            logits(model, input_ids)


def test_unquantised_folder_is_loaded_as_it_is(
    uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = uniform_plan("llama", MODELOPT, "none")
    model = load_packed(planned.export(tmp_path / "out").path)
    assert not packed_layers(model)
    assert torch.equal(logits(model, input_ids), logits(planned.tiny.model, input_ids))


# --- checkpoints of many kinds -------------------------------------------------------------------


def test_scales_that_no_norm_takes_are_kept(
    uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = uniform_plan("llama", MODELOPT, "w4a8_awq")
    w4a8, slot = FormatName("w4a8_awq"), "model.layers.0.mlp.down_proj"
    entry = planned.calibration[slot, w4a8]
    powers = torch.exp2(torch.arange(256) % 5 - 2.0)
    with_scale = {(slot, w4a8): replace(entry, pre_quant_scale=powers)}
    planned = replace(planned, calibration={**planned.calibration, **with_scale})
    path = planned.export(tmp_path / "out").path
    layer = load_packed(path).get_submodule(slot)
    assert torch.equal(layer.get_buffer("pre_quant_scale").float(), powers)
    assert_equals_simulation(path, input_ids)


def test_several_files_are_read(mixed_plan: MixedPlan, tmp_path: Path, input_ids: Tensor) -> None:
    planned = mixed_plan("llama", MODELOPT)
    path = planned.export(tmp_path / "out", max_shard_bytes=60_000).path
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_equals_simulation(path, input_ids)


def test_quantised_head_is_packed(
    folder_plan: FolderPlan, tiny: Any, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = folder_plan(tiny("llama").source, COMPRESSED, "fp8", include=("lm_head",))
    path = planned.export(tmp_path / "out").path
    assert isinstance(load_packed(path).get_submodule("lm_head"), PackedLinear)
    assert_equals_simulation(path, input_ids)


def test_names_with_a_prefix_that_loading_removes(
    folder_plan: FolderPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = (
        folder_plan(prefixed_qwen(tmp_path / "model"), MODELOPT, "nvfp4")
        .export(tmp_path / "out")
        .path
    )
    layer = "layers.0.self_attn.q_proj"
    assert f"model.language_model.{layer}.weight" in load_file(path / "model.safetensors")
    assert isinstance(load_packed(path).get_submodule(f"model.{layer}"), PackedLinear)
    assert_equals_simulation(path, input_ids)


def prefixed_qwen(folder: Path) -> Path:
    """A text model in the folder of one that sees, whose tensors have a component more."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=288,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        layer_types=["full_attention"],
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3_5ForCausalLM(config).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    rewrite(
        folder,
        lambda tensors: tensors.update(
            {
                f"model.language_model.{name.removeprefix('model.')}": tensors.pop(name)
                for name in list(tensors)
                if name.startswith("model.")
            }
        ),
    )
    return folder


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "w4a8_awq"])
def test_gate_and_up_may_have_top_scales_of_their_own(
    fmt: str, uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = uniform_plan("mixtral", MODELOPT, fmt).export(tmp_path / "out").path
    top = "weight_scale" if fmt == "fp8" else "weight_scale_2"
    up = f"model.layers.0.block_sparse_moe.experts.1.w3.{top}"
    rewrite(path, lambda tensors: tensors.update({up: tensors[up] * 2}))
    experts: Any = load_packed(path).get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert [isinstance(matrix, PackedRows) for matrix in experts] == [False, True, False, False]
    ours = logits(load_packed(path), input_ids).float()
    theirs = logits(simulated_checkpoint(path).model, input_ids).float()
    # Two products of half the rows may round otherwise than one: a bfloat16 step here and there.
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7)


# --- checkpoints that are refused ----------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one file."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def reconfigure(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"lacks weights of its architecture: {NORM}"),
        (lambda t: t.pop(f"{Q}.input_scale"), rf"{Q} is nvfp4 and lacks input_scale"),
        (lambda t: t.pop(f"{Q}.weight"), rf"{Q} is nvfp4 and lacks weight"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)],
            rf"lacks weights .*: {Q}.weight",
        ),
        (
            lambda t: t.update({"stray": torch.ones(2)}),
            "tensors its architecture does not know: stray",
        ),
        (
            lambda t: t.update({NORM: torch.ones(5)}),
            rf"{NORM} must have shape \(128,\) by .* \(5,\)",
        ),
        (
            lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :-8].contiguous()}),
            rf"{Q}.weight must have shape \(128, 64\), got \(128, 56\)",
        ),
        (
            lambda t: t.update({f"{Q}.weight_scale_2": torch.tensor(float("nan"))}),
            rf"{Q}.weight_scale_2 must be positive and finite",
        ),
        (
            lambda t: t.update(
                {n.replace(Q, "model.extra"): t[n].clone() for n in list(t) if n.startswith(Q)}
            ),
            "quantised weights for model.extra, which is no linear of LlamaForCausalLM",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object],
    message: str,
    uniform_plan: UniformPlan,
    tmp_path: Path,
) -> None:
    path = uniform_plan("llama", MODELOPT, "nvfp4").export(tmp_path / "out").path
    reconfigure(path, uniform_manifest)
    rewrite(path, change)
    with pytest.raises(ExportError, match=message):
        load_packed(path)


def uniform_manifest(config: dict[str, Any]) -> None:
    """As ModelOpt writes it when everything has one format: modules are not listed."""
    manifest = config["quantization_config"]
    manifest.pop("quantized_layers", None)
    manifest["quant_algo"] = "NVFP4"


def test_uniform_manifests_are_read(
    uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    path = uniform_plan("llama", MODELOPT, "nvfp4").export(tmp_path / "out").path
    reconfigure(path, uniform_manifest)
    assert_equals_simulation(path, input_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["quantization_config"].update(quant_method="gptq"),
            "must be modelopt, compressed-tensors or transformers' fp8 to be read, got 'gptq'",
        ),
        (lambda c: c.pop("quantization_config"), "has scales, and .* has no manifest"),
        (lambda c: c.update(architectures=["Unheard"]), "got 'Unheard'$"),
        (
            lambda c: c.update(
                architectures=["Unheard"], auto_map={"AutoModelForCausalLM": "code.Model"}
            ),
            "got 'Unheard'; its config.json names code of its own",
        ),
        (lambda c: c.update(num_hidden_layers=3), r"lacks weights .*: model\.layers\.2\."),
        (lambda c: c.update(num_hidden_layers=1), r"quantised weights for model\.layers\.1\."),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Any]], object],
    message: str,
    uniform_plan: UniformPlan,
    tmp_path: Path,
) -> None:
    path = uniform_plan("llama", MODELOPT, "nvfp4").export(tmp_path / "out").path
    reconfigure(path, change)
    with pytest.raises(ExportError, match=message):
        load_packed(path)


def test_experts_that_are_half_quantised_are_refused(
    uniform_plan: UniformPlan, tmp_path: Path
) -> None:
    path = uniform_plan("mixtral", MODELOPT, "fp8").export(tmp_path / "out").path
    experts = "model.layers.0.block_sparse_moe.experts.1."

    def unquantise(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(experts)]:
            tensor = tensors.pop(name)
            if name.endswith(".weight"):
                tensors[name] = tensor.to(torch.bfloat16)

    rewrite(path, unquantise)
    with pytest.raises(ExportError, match=r"some experts of model\.layers\.0\.mlp\.experts quan"):
        load_packed(path)


# --- code that a folder brings -------------------------------------------------------------------

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnModel(LlamaForCausalLM):
    config_class = LlamaConfig
    own = True
"""


def test_code_of_the_folder_runs_only_if_it_is_trusted(
    uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    path = uniform_plan("llama", MODELOPT, "nvfp4").export(tmp_path / "out").path
    expected = logits(load_packed(path), input_ids)
    trusting = {"trust_remote_code": True}
    code = {"AutoModelForCausalLM": "own_code.OwnModel"}
    reconfigure(path, lambda config: config.update(auto_map=code))

    model: Any = load_packed(path)
    assert not hasattr(model, "own")
    with pytest.raises(ExportError, match=r"the model code own_code\.OwnModel .* cannot be run"):
        load_packed(path, **trusting)

    (path / "own_code.py").write_text(CODE)
    model = load_packed(path, **trusting)
    assert model.own
    assert torch.equal(logits(model, input_ids), expected)
