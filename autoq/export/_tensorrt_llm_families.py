"""What TensorRT-LLM's engine calls the layers of each family, and what else it wants of them.

Read in TensorRT-LLM's sources (models/*/convert.py, config.py and model.py, layers/,
quantization/quantize.py) at versions 0.16 to 1.2, and in ModelOpt's exporter of these checkpoints;
nothing of it was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

EMBEDDING, FINAL_NORM, HEAD = "transformer.vocab_embedding", "transformer.ln_f", "lm_head"
POSITIONS = "transformer.position_embedding"
ROUTER = "mlp.router"  # always float32, the same on all ranks
KV_SCALE = "attention.kv_cache_scaling_factor"  # one for a layer's keys and values


class Fused(Enum):
    """Matrices that the model itself has one above the other, in the model's order."""

    QUERY_KEY_VALUE = "q, k, v"
    GATE_UP = "gate, up"  # the engine has up first
    HEADS = "q, k, v of each head"  # the engine has all heads of q first


@dataclass(frozen=True, slots=True)
class EngineLinear:
    """A linear of a layer as the engine runs it: the model's, one above the other."""

    name: str
    parts: tuple[str, ...]  # paths in the model's layer, in the order of their rows
    splits_rows: bool  # ranks hold rows (outputs); otherwise columns (inputs)
    is_stacked: bool = False  # parts are experts, one behind the other in a third dimension
    fused: Fused | None = None  # what the only part consists of


_QKV, _DENSE, _FC, _GATE, _PROJ = (
    "attention.qkv",
    "attention.dense",
    "mlp.fc",
    "mlp.gate",
    "mlp.proj",
)
_SEPARATE_QKV = EngineLinear(
    _QKV, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True
)
_ATTENTION = (_SEPARATE_QKV, EngineLinear(_DENSE, ("self_attn.o_proj",), False))
_GATED = (
    # The engine's `fc` is what the activation function is applied to: the model's gate.
    EngineLinear(_FC, ("mlp.gate_proj",), True),
    EngineLinear(_GATE, ("mlp.up_proj",), True),
    EngineLinear(_PROJ, ("mlp.down_proj",), False),
)
_GPT2 = (
    EngineLinear(_QKV, ("attn.c_attn",), True, fused=Fused.QUERY_KEY_VALUE),
    EngineLinear(_DENSE, ("attn.c_proj",), False),
    EngineLinear(_FC, ("mlp.c_fc",), True),
    EngineLinear(_PROJ, ("mlp.c_proj",), False),
)
_STARCODER2 = (
    *_ATTENTION,
    EngineLinear(_FC, ("mlp.c_fc",), True),
    EngineLinear(_PROJ, ("mlp.c_proj",), False),
)
_PHI = (
    _SEPARATE_QKV,
    EngineLinear(_DENSE, ("self_attn.dense",), False),
    EngineLinear(_FC, ("mlp.fc1",), True),
    EngineLinear(_PROJ, ("mlp.fc2",), False),
)
_PHI3 = (
    EngineLinear(_QKV, ("self_attn.qkv_proj",), True, fused=Fused.QUERY_KEY_VALUE),
    EngineLinear(_DENSE, ("self_attn.o_proj",), False),
    # One matrix whose activation function is swiglu, with up above gate on every rank.
    EngineLinear(_FC, ("mlp.gate_up_proj",), True, fused=Fused.GATE_UP),
    EngineLinear(_PROJ, ("mlp.down_proj",), False),
)

_GPTJ = (
    EngineLinear(_QKV, ("attn.q_proj", "attn.k_proj", "attn.v_proj"), True),
    EngineLinear(_DENSE, ("attn.out_proj",), False),
    EngineLinear(_FC, ("mlp.fc_in",), True),
    EngineLinear(_PROJ, ("mlp.fc_out",), False),
)
_GPT_NEOX = (
    EngineLinear(_QKV, ("attention.query_key_value",), True, fused=Fused.HEADS),
    EngineLinear(_DENSE, ("attention.dense",), False),
    EngineLinear(_FC, ("mlp.dense_h_to_4h",), True),
    EngineLinear(_PROJ, ("mlp.dense_4h_to_h",), False),
)

BLOCK_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
}
"""Engine's name of a norm before linears -> the model's."""

_HEAD_NORMS = {
    "attention.q_layernorm": "self_attn.q_norm",
    "attention.k_layernorm": "self_attn.k_norm",
}
# In Gemma 2 and 3 `post_layernorm` is after attention, and before nothing.
_GEMMA2_NORMS = {
    **BLOCK_NORMS,
    "pre_feedforward_layernorm": "pre_feedforward_layernorm",
    "post_feedforward_layernorm": "post_feedforward_layernorm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the engine wants of the models of one architecture."""

    linears: tuple[EngineLinear, ...] = (*_ATTENTION, *_GATED)
    layers: str = "model.layers"  # path of the list of layers
    final_norm: str = "model.norm"
    norms: Mapping[str, str] = field(default_factory=lambda: BLOCK_NORMS)  # engine's -> model's
    positions: str | None = None  # path of learned positions
    normalises_heads: bool = False
    adds_one: bool = False  # a norm's weight w is for 1 + w, which is what the engine stores
    has_experts: bool = False
    router: str = "mlp.gate"  # path in the model's layer, of families with experts
    adds_up_biases: bool = False  # of `dense` and `proj`, those of all ranks: only one has them
    quantizes_cache: bool = True  # the engine's attention is told of a quantised key/value cache
    engine_name: str | None = None  # the engine's name of the architecture, where it is another
    has_stages: bool = True  # the engine's model can be cut into pipeline stages
    whole_formats: frozenset[str] = frozenset({"fp8_pc_pt", "int8_sq"})
    """Formats of whole layers that the engine has for these layers."""
    qwen_type: str | None = None


_GPT_FORMATS = frozenset({"int8_sq"})

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MixtralForCausalLM": Family(has_experts=True),
    "Qwen2ForCausalLM": Family(qwen_type="qwen2"),
    "Qwen3ForCausalLM": Family(
        qwen_type="qwen3", norms={**BLOCK_NORMS, **_HEAD_NORMS}, normalises_heads=True
    ),
    "GPT2LMHeadModel": Family(
        linears=_GPT2,
        layers="transformer.h",
        final_norm="transformer.ln_f",
        norms={"input_layernorm": "ln_1", "post_layernorm": "ln_2"},
        positions="transformer.wpe",
        whole_formats=_GPT_FORMATS,
    ),
    "Starcoder2ForCausalLM": Family(linears=_STARCODER2, whole_formats=_GPT_FORMATS),
    "PhiForCausalLM": Family(
        linears=_PHI,
        final_norm="model.final_layernorm",
        norms={"input_layernorm": "input_layernorm"},
        has_stages=False,
        whole_formats=frozenset(),
    ),
    "Phi3ForCausalLM": Family(linears=_PHI3, has_stages=False, whole_formats=frozenset()),
    "GemmaForCausalLM": Family(adds_one=True, whole_formats=frozenset()),
    "Gemma2ForCausalLM": Family(norms=_GEMMA2_NORMS, adds_one=True, whole_formats=frozenset()),
    "Gemma3ForCausalLM": Family(
        norms={**_GEMMA2_NORMS, **_HEAD_NORMS},
        normalises_heads=True,
        adds_one=True,
        whole_formats=frozenset(),
    ),
    "GPTJForCausalLM": Family(
        linears=_GPTJ,
        layers="transformer.h",
        final_norm="transformer.ln_f",
        norms={"input_layernorm": "ln_1"},
        adds_up_biases=True,
        has_stages=False,
        whole_formats=frozenset(),
    ),
    "GPTNeoXForCausalLM": Family(
        linears=_GPT_NEOX,
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        norms={
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_attention_layernorm",
        },
        quantizes_cache=False,
        has_stages=False,
        whole_formats=frozenset(),
    ),
    "PhimoeForCausalLM": Family(
        has_experts=True,
        router="mlp.router",
        has_stages=False,
        whole_formats=frozenset(),
        engine_name="PhiMoEForCausalLM",
    ),
}
"""Architecture -> what the engine wants of it."""


def engine_architecture(architecture: str) -> str:
    """What the engine calls an architecture."""
    return FAMILIES[architecture].engine_name or architecture


def family_called(architecture: str) -> tuple[str, Family]:
    """The model's architecture and its record, of the engine's name for it.

    Raises:
        KeyError: autoq writes no checkpoint of that name.
    """
    return {engine_architecture(name): (name, family) for name, family in FAMILIES.items()}[
        architecture
    ]


def engine_linears(architecture: str, experts: int) -> tuple[EngineLinear, ...]:
    """The linears of a layer.

    Args:
        experts: how many a layer has; 0 of a family that has none.
    """
    if not FAMILIES[architecture].has_experts:
        return FAMILIES[architecture].linears
    # Of each expert's gate and up, the engine has up first.
    first = tuple(f"mlp.experts.{number}.gate_up_proj" for number in range(experts))
    last = tuple(f"mlp.experts.{number}.down_proj" for number in range(experts))
    return (
        *_ATTENTION,
        EngineLinear(_FC, first, True, is_stacked=True),
        EngineLinear(_PROJ, last, False, is_stacked=True),
    )
