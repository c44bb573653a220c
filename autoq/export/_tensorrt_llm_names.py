"""What TensorRT-LLM's engine checkpoints call things, family by family, and how ranks share them.

Read in TensorRT-LLM's sources (models/llama, models/qwen, models/modeling_utils.py, layers/) at
versions 0.16 to 1.2 and in ModelOpt's exporter of these checkpoints; nothing of it was run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

EMBEDDING, FINAL_NORM, HEAD = "transformer.vocab_embedding", "transformer.ln_f", "lm_head"
_QWEN_SEQUENCE_LENGTH = 8192  # what TensorRT-LLM takes where config.json has no seq_length
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


@dataclass(frozen=True, slots=True)
class EngineLinear:
    """A linear of a layer as the engine runs it: the model's, one above the other."""

    name: str
    parts: tuple[str, ...]  # paths in the model's layer, in the order of their rows
    splits_rows: bool  # ranks hold rows (outputs); otherwise columns (inputs)
    is_stacked: bool = False  # parts are experts, one behind the other in a third dimension


_ATTENTION = (
    EngineLinear(
        "attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True
    ),
    EngineLinear("attention.dense", ("self_attn.o_proj",), False),
)
_DENSE = (
    # The engine's `fc` is what the activation function is applied to: the model's gate.
    EngineLinear("mlp.fc", ("mlp.gate_proj",), True),
    EngineLinear("mlp.gate", ("mlp.up_proj",), True),
    EngineLinear("mlp.proj", ("mlp.down_proj",), False),
)

BLOCK_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
}
"""Engine's name of a norm before linears -> the model's."""


@dataclass(frozen=True, slots=True)
class Family:
    """What the engine wants of the models of one architecture."""

    qwen_type: str | None = None
    norms: Mapping[str, str] = field(
        default_factory=lambda: BLOCK_NORMS
    )  # engine's name -> model's
    normalises_heads: bool = False
    has_experts: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MixtralForCausalLM": Family(has_experts=True),
    "Qwen2ForCausalLM": Family(qwen_type="qwen2"),
    "Qwen3ForCausalLM": Family(
        qwen_type="qwen3",
        norms={
            **BLOCK_NORMS,
            "attention.q_layernorm": "self_attn.q_norm",
            "attention.k_layernorm": "self_attn.k_norm",
        },
        normalises_heads=True,
    ),
}


ROUTER = "mlp.router"  # the model's mlp.gate; always float32, the same on all ranks


def engine_linears(architecture: str, experts: int) -> tuple[EngineLinear, ...]:
    """The linears of a layer.

    Args:
        experts: how many a layer has; 0 of a family that has none.
    """
    if not FAMILIES[architecture].has_experts:
        return (*_ATTENTION, *_DENSE)
    # Of each expert's gate and up, the engine has up first.
    first = tuple(f"mlp.experts.{number}.gate_up_proj" for number in range(experts))
    last = tuple(f"mlp.experts.{number}.down_proj" for number in range(experts))
    return (
        *_ATTENTION,
        EngineLinear("mlp.fc", first, True, is_stacked=True),
        EngineLinear("mlp.proj", last, False, is_stacked=True),
    )


def model_linears(model: nn.Module) -> tuple[EngineLinear, ...]:
    """`engine_linears` of a model."""
    return engine_linears(type(model).__name__, getattr(_config(model), "num_local_experts", 0))


@dataclass(frozen=True, slots=True)
class Parallel:
    """How many ranks share each layer, and how many stages of layers there are."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def world(self) -> int:
        """All ranks; that of a stage and a place in it is `place + stage * tensor`."""
        return self.tensor * self.pipeline


def layer_count(model: nn.Module) -> int:
    """Layers of the model."""
    return int(_config(model).num_hidden_layers)


def head_size(config: Any) -> int:
    """Features of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def model_refusals(model: nn.Module, parallel: Parallel) -> Iterator[str]:
    """Why the model, split like this, is none that the engine loads, a line each."""
    architecture = type(model).__name__
    if architecture not in FAMILIES:
        yield (
            f"tensorrt-llm checkpoints are written of {', '.join(FAMILIES)}, and the model is "
            f"{architecture}; choose another container"
        )
        return
    config = _config(model)
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        yield (
            f"tensorrt-llm checkpoints are written with the rotary embeddings "
            f"{', '.join(_ROPE_TYPES)}, and the model's are {kind}; choose another container"
        )
    if min(parallel.tensor, parallel.pipeline) < 1:
        yield (
            f"tp_size and pp_size must be at least 1, got {parallel.tensor} and {parallel.pipeline}"
        )
        return
    yield from _division_lines(config, parallel)


def _division_lines(config: Any, parallel: Parallel) -> Iterator[str]:
    for count, name in (
        (config.num_attention_heads, "attention heads"),
        (config.num_key_value_heads, "key-value heads"),
        (config.intermediate_size, "intermediate features"),
    ):
        if count % parallel.tensor:
            yield (
                f"tp_size must divide the model's {count} {name}, got {parallel.tensor}; "
                "choose another"
            )
    if config.num_hidden_layers % parallel.pipeline:
        yield (
            f"pp_size must divide the model's {config.num_hidden_layers} layers, got "
            f"{parallel.pipeline}; choose another"
        )


def engine_config(model: nn.Module, dtype: str, parallel: Parallel) -> dict[str, Any]:
    """config.json of the checkpoint, without its quantisation.

    Args:
        dtype: "float16" or "bfloat16".
    """
    config, family = _config(model), FAMILIES[type(model).__name__]
    rope = dict(config.rope_parameters or {})
    base = rope.pop("rope_theta", 10000.0)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    fields: dict[str, Any] = {
        "architecture": type(model).__name__,
        "dtype": dtype,
        "logits_dtype": "float16" if dtype == "bfloat16" else dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_size": head_size(config),
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": base,
        "rotary_scaling": scaling and {**scaling, "type": scaling["rope_type"]},
        "attn_bias": has_bias(model, "self_attn.q_proj"),
        "mlp_bias": not family.has_experts and has_bias(model, "mlp.gate_proj"),
        "qk_layernorm": family.normalises_heads,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "mapping": {
            "world_size": parallel.world,
            "tp_size": parallel.tensor,
            "pp_size": parallel.pipeline,
        },
    }
    if family.has_experts:
        fields |= _moe_fields(config, fields["mapping"])
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


def has_bias(model: nn.Module, part: str) -> bool:
    """Whether a linear of the first layer has a bias, as those of all layers then have."""
    return model.get_submodule(f"model.layers.0.{part}").bias is not None


def attention_window(model: nn.Module) -> int | None:
    """Tokens that attention looks back on, where that is less than all; a runtime's option."""
    config = _config(model)
    window: int | None = getattr(config, "sliding_window", None)
    is_limited = window is not None and window < config.max_position_embeddings
    return window if is_limited and getattr(config, "use_sliding_window", True) else None


def _config(model: nn.Module) -> Any:
    return model.config
