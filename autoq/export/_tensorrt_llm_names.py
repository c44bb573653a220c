"""Sizes of a model as TensorRT-LLM's engine counts them, and which models it does not load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from torch import nn

from autoq.export._tensorrt_llm_families import FAMILIES, EngineLinear, Family, engine_linears

_ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
_NORM_EPSILON = 1e-5  # that of the engine's LayerNorm, which its Phi and GPT-NeoX leave alone
_SLIDING = "sliding_attention"


@dataclass(frozen=True, slots=True)
class Parallel:
    """How many ranks share each layer, and how many stages of layers there are."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def world(self) -> int:
        """All ranks; that of a stage and a place in it is `place + stage * tensor`."""
        return self.tensor * self.pipeline


def family_of(model: nn.Module) -> Family:
    """The record of the model's architecture, which must be in `FAMILIES`."""
    return FAMILIES[type(model).__name__]


def model_linears(model: nn.Module) -> tuple[EngineLinear, ...]:
    """`engine_linears` of a model."""
    return engine_linears(type(model).__name__, getattr(_config(model), "num_local_experts", 0))


def layer_path(model: nn.Module, layer: int) -> str:
    """Path of a layer in the model."""
    return f"{family_of(model).layers}.{layer}"


def layer_count(model: nn.Module) -> int:
    """Layers of the model."""
    return int(_config(model).num_hidden_layers)


def head_size(config: Any) -> int:
    """Features of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def key_value_heads(config: Any) -> int:
    """Heads of keys and values; of configurations that do not say, those of queries."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def intermediate_size(config: Any) -> int:
    """Features between the linears of an MLP."""
    said = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(said or 4 * config.hidden_size)


def rotary(config: Any) -> dict[str, Any]:
    """Parameters of the rotary embeddings, those of full attention where there are two kinds."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return dict(parameters.get("full_attention", parameters))


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
    yield from _rotary_lines(model)
    for is_so, what in _unknown_to_the_engine(architecture, config):
        if is_so:
            yield (
                f"the model has {what}, which TensorRT-LLM's {architecture} has not; choose another "
                "container"
            )
    if min(parallel.tensor, parallel.pipeline) < 1:
        yield (
            f"tp_size and pp_size must be at least 1, got {parallel.tensor} and {parallel.pipeline}"
        )
        return
    if parallel.pipeline > 1 and not family_of(model).has_stages:
        yield (
            f"TensorRT-LLM's {architecture} has no pipeline stages, got pp_size "
            f"{parallel.pipeline}; choose pp_size 1"
        )
    yield from _division_lines(config, parallel)


def _rotary_lines(model: nn.Module) -> Iterator[str]:
    architecture, config = type(model).__name__, _config(model)
    kind = rotary(config).get("rope_type", "default")
    known: tuple[str, ...] = _ROPE_TYPES
    if architecture in ("Phi3ForCausalLM", "PhimoeForCausalLM"):
        known = (*known, "longrope")
    if architecture in ("GPTJForCausalLM", "GPTNeoXForCausalLM"):
        known = ("default",)
    if architecture == "Gemma3ForCausalLM":
        known = ("default",)  # the engine would scale those of its sliding layers, too
    if kind not in known:
        yield (
            f"tensorrt-llm checkpoints of {architecture} are written with the rotary embeddings "
            f"{', '.join(known)}, and the model's are {kind}; choose another container"
        )


def _unknown_to_the_engine(architecture: str, config: Any) -> Iterator[tuple[bool, str]]:
    """Settings that the engine's layers do not have, and whether the model has them."""
    if architecture == "GPT2LMHeadModel":
        yield not config.scale_attn_weights, "attention weights that are not scaled"
        yield config.scale_attn_by_inverse_layer_idx, "attention scaled by the layer's number"
        yield bool(getattr(config, "add_cross_attention", False)), "cross-attention"
    if architecture == "PhiForCausalLM":
        epsilon = config.layer_norm_eps
        yield config.qk_layernorm, "normalised queries and keys"
        is_shared = key_value_heads(config) != config.num_attention_heads
        yield is_shared, "heads of keys and values that queries share"
        yield epsilon != _NORM_EPSILON, f"norms with epsilon {epsilon}"
    if architecture in ("GPTJForCausalLM", "GPTNeoXForCausalLM"):
        inner = intermediate_size(config)
        is_other = inner != 4 * config.hidden_size
        yield is_other, f"{inner} intermediate features, not four times the hidden size,"
    if architecture == "GPTNeoXForCausalLM":
        epsilon = config.layer_norm_eps
        yield epsilon != _NORM_EPSILON, f"norms with epsilon {epsilon}"
        yield not config.use_parallel_residual, "an MLP behind attention, not beside it,"
        yield not config.attention_bias, "attention without biases"
    if architecture == "PhimoeForCausalLM":
        yield not config.attention_bias, "attention without biases"
        yield not config.lm_head_bias, "an output head without a bias"
        yield config.hidden_act != "silu", f"the activation function {config.hidden_act}"
    if architecture == "Phi3ForCausalLM":
        yield config.hidden_act != "silu", f"the activation function {config.hidden_act}"
    if architecture.startswith("Gemma"):
        is_open = getattr(config, "use_bidirectional_attention", None)
        yield bool(is_open), "attention in both directions"
    if architecture == "Gemma3ForCausalLM":
        pattern = sliding_pattern(config)
        expected = [(number + 1) % pattern != 0 for number in range(config.num_hidden_layers)]
        found = [kind == _SLIDING for kind in config.layer_types]
        yield found != expected, f"sliding layers that are not all but every {pattern}th"


def sliding_pattern(config: Any) -> int:
    """Gemma 3: every how many layers one is not sliding."""
    return int(getattr(config, "_sliding_window_pattern", None) or config.sliding_window_pattern)


def _division_lines(config: Any, parallel: Parallel) -> Iterator[str]:
    for count, name in (
        (config.num_attention_heads, "attention heads"),
        (key_value_heads(config), "key-value heads"),
        (intermediate_size(config), "intermediate features"),
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


def attention_windows(model: nn.Module) -> list[int]:
    """Tokens that attention looks back on, where that is less than all; a runtime's option.

    One number for all layers, or as many as repeat; empty where attention sees everything.
    """
    config = _config(model)
    window: int | None = getattr(config, "sliding_window", None)
    whole = config.max_position_embeddings
    if window is None or window >= whole or not getattr(config, "use_sliding_window", True):
        return []
    kinds = getattr(config, "layer_types", None) or [_SLIDING]
    return _shortest_period([window if kind == _SLIDING else whole for kind in kinds])


def _shortest_period(numbers: list[int]) -> list[int]:
    for size in range(1, len(numbers)):
        if all(one == other for one, other in zip(numbers, cycle(numbers[:size]), strict=False)):
            return numbers[:size]
    return numbers


def _config(model: nn.Module) -> Any:
    return model.config
