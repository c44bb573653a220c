"""config.json of TensorRT-LLM's engine checkpoints, without its quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autoq.export._tensorrt_llm_families import engine_architecture
from autoq.export._tensorrt_llm_names import (
    Parallel,
    family_of,
    head_size,
    intermediate_size,
    key_value_heads,
    layer_path,
    rotary,
    sliding_pattern,
)

_QWEN_SEQUENCE_LENGTH = 8192  # what TensorRT-LLM takes where config.json has no seq_length
_EPSILONS = ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps")
_ACTIVATIONS = ("hidden_activation", "activation_function", "hidden_act")
# The engine's gelu is the approximation by tanh, under all of these names (`gelu` in functional.py).
_EXACT_GELUS = frozenset({"gelu", "gelu_python"})
_GELUS = _EXACT_GELUS | {"gelu_new", "gelu_fast", "gelu_pytorch_tanh"}


def engine_config(model: nn.Module, dtype: str, parallel: Parallel) -> dict[str, Any]:
    """config.json of the checkpoint, without its quantisation.

    Args:
        dtype: "float16" or "bfloat16".
    """
    config: Any = model.config
    fields: dict[str, Any] = {
        "architecture": engine_architecture(type(model).__name__),
        "dtype": dtype,
        "logits_dtype": "float16" if dtype == "bfloat16" else dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": key_value_heads(config),
        "head_size": head_size(config),
        "intermediate_size": intermediate_size(config),
        "hidden_act": _activation(config),
        "norm_epsilon": _first(config, _EPSILONS),
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "qk_layernorm": family_of(model).normalises_heads,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {
            "world_size": parallel.world,
            "tp_size": parallel.tensor,
            "pp_size": parallel.pipeline,
        },
    }
    return fields | _rotary_fields(config) | _family_fields(model, fields["mapping"])


def _first(config: Any, names: tuple[str, ...]) -> Any:
    """The first of these settings that a configuration has."""
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _activation(config: Any) -> str:
    said = str(_first(config, _ACTIVATIONS))
    return "gelu" if said in _GELUS else said


def approximates_gelu(model: nn.Module) -> bool:
    """Whether the model's gelu is exact, by erf, which the engine's is not."""
    return str(_first(model.config, _ACTIVATIONS)) in _EXACT_GELUS


def _rotary_fields(config: Any) -> dict[str, Any]:
    rope = rotary(config)
    base = rope.pop("rope_theta", 10000.0)
    rope.pop("partial_rotary_factor", None)
    kind = rope.get("rope_type", "default")
    scaling = None if kind in ("default", "longrope") else {**rope, "type": kind}
    return {"rotary_base": base, "rotary_scaling": scaling}


def _family_fields(model: nn.Module, mapping: Mapping[str, int]) -> dict[str, Any]:
    config: Any = model.config
    match type(model).__name__:
        case "GPT2LMHeadModel":
            return {
                "gpt_variant": "gpt2",
                "bias": True,
                "position_embedding_type": "learned_absolute",
            }
        case "Starcoder2ForCausalLM":
            return {"gpt_variant": "starcoder2", "bias": bool(config.use_bias), "rotary_pct": 1.0}
        case "PhiForCausalLM":
            return {"rotary_pct": _partial(config)}
        case "Phi3ForCausalLM":
            return _phi3_fields(config)
        case "PhimoeForCausalLM":
            return _phimoe_fields(config, mapping)
        case "GPTJForCausalLM":
            return {"position_embedding_type": "rope_gptj", "rotary_dim": config.rotary_dim}
        case "GPTNeoXForCausalLM":
            base = rotary(config).get("rope_theta", 10000.0)
            return {"rotary_pct": _partial(config), "rotary_emb_base": base}
        case "GemmaForCausalLM":
            return _biases(model)
        case "Gemma2ForCausalLM":
            return {
                **_biases(model),
                "query_pre_attn_scalar": config.query_pre_attn_scalar,
                "final_logit_softcapping": config.final_logit_softcapping,
                "attn_logit_softcapping": config.attn_logit_softcapping,
            }
        case "Gemma3ForCausalLM":
            return {
                **_biases(model),
                "query_pre_attn_scalar": config.query_pre_attn_scalar,
                "final_logit_softcapping": config.final_logit_softcapping,
                "_sliding_window_pattern": sliding_pattern(config),
                "rope_local_base_freq": config.rope_parameters["sliding_attention"]["rope_theta"],
                "sliding_window": config.sliding_window,
            }
        case _:
            return _llama_fields(model, mapping)


def _llama_fields(model: nn.Module, mapping: Mapping[str, int]) -> dict[str, Any]:
    family, config = family_of(model), model.config
    fields: dict[str, Any] = {**_biases(model)}
    if family.has_experts:
        fields |= _moe_fields(config, mapping)
    if family.qwen_type is not None:
        fields |= {
            "qwen_type": family.qwen_type,
            "seq_length": _QWEN_SEQUENCE_LENGTH,
            "moe_intermediate_size": 0,
            "moe_shared_expert_intermediate_size": 0,
        }
    return fields


def _moe_fields(config: Any, mapping: Mapping[str, int]) -> dict[str, Any]:
    return {
        "hidden_act": "swiglu",
        "moe": {
            "num_experts": config.num_local_experts,
            "top_k": config.num_experts_per_tok,
            "normalization_mode": 1,  # the chosen experts' shares add up to one
        },
        "mapping": {**mapping, "moe_tp_size": mapping["tp_size"], "moe_ep_size": 1},
    }


def _phi3_fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"hidden_act": "swiglu", "rotary_pct": _partial(config)}
    rope = rotary(config)
    if rope.get("rope_type") == "longrope":
        fields |= {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "longrope_scaling_short_factors": list(rope["short_factor"]),
            "longrope_scaling_long_factors": list(rope["long_factor"]),
        }
    return fields


def _phimoe_fields(config: Any, mapping: Mapping[str, int]) -> dict[str, Any]:
    fields = _phi3_fields(config) | _moe_fields(config, mapping)
    fields["moe"] |= {
        "normalization_mode": 2,  # sparse mixer: each choice against what is left and near it
        "sparse_mixer_epsilon": config.router_jitter_noise,
    }
    rope = rotary(config)
    if rope.get("rope_type") == "longrope":
        for length in ("short", "long"):
            fields[f"longrope_{length}_mscale"] = rope[f"{length}_mscale"]
    return {**fields, "attention_bias": True}


def _partial(config: Any) -> float:
    """The share of a head's features that rotary embeddings turn."""
    return float(rotary(config).get("partial_rotary_factor", 1.0))


def _biases(model: nn.Module) -> dict[str, bool]:
    """Whether the linears of the first layer have biases, as those of all layers then have."""
    has_experts, first = family_of(model).has_experts, layer_path(model, 0)
    return {
        "attn_bias": _has_bias(model, f"{first}.self_attn.q_proj"),
        "mlp_bias": not has_experts and _has_bias(model, f"{first}.mlp.gate_proj"),
    }


def _has_bias(model: nn.Module, path: str) -> bool:
    return model.get_submodule(path).bias is not None
