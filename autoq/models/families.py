"""What differs between model families: names of fused siblings, routers and experts on disk.

Discovery is structural; these tables hold the few facts that structure does not show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autoq.errors import ModelError
from autoq.models._types import SlotKind, WeightSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedSiblings:
    """Linears of one parent that read the same input, and that engines run as one matrix."""

    names: tuple[str, ...]
    reason: str
    cross_attention_names: tuple[str, ...] | None = None  # those that still share an input there


_QKV = "q/k/v read one input and engines run them as one matrix"
_GATE_UP = "gate/up read one input and engines run them as one matrix"
_PROJECTIONS = "these projections read one input and engines run them as one matrix"

FUSED_SIBLINGS: tuple[FusedSiblings, ...] = (
    FusedSiblings(
        names=("q_proj", "k_proj", "v_proj"),
        reason=_QKV,
        cross_attention_names=("k_proj", "v_proj"),
    ),
    FusedSiblings(
        names=("query", "key", "value"), reason=_QKV, cross_attention_names=("key", "value")
    ),
    FusedSiblings(names=("q", "k", "v"), reason=_QKV, cross_attention_names=("k", "v")),
    FusedSiblings(names=("q_a_proj", "kv_a_proj_with_mqa"), reason=_PROJECTIONS),
    FusedSiblings(names=("in_proj_qkv", "in_proj_z"), reason=_PROJECTIONS),
    FusedSiblings(names=("in_proj_b", "in_proj_a"), reason=_PROJECTIONS),
    FusedSiblings(names=("gate_proj", "up_proj"), reason=_GATE_UP),
    FusedSiblings(names=("wi_0", "wi_1"), reason=_GATE_UP),
    FusedSiblings(names=("w1", "w3"), reason=_GATE_UP),
)

CROSS_ATTENTION_REASON = (
    "k/v of cross-attention read the encoder's output, which engines run as one matrix"
)

_CROSS_ATTENTION = re.compile(
    r"(^|[._])(EncDecAttention|encoder_attn|cross_?attn|cross_?attention|encoder_attention)"
)


def is_cross_attention(module: str) -> bool:
    """Whether a module path lies inside attention whose keys come from another sequence."""
    return _CROSS_ATTENTION.search(module) is not None


ROUTER_NAMES = frozenset({"gate", "router", "gating", "shared_expert_gate"})
"""First path component, beside the experts, of what decides where a token goes."""

OTHER_INPUT_PARTS = frozenset(
    {
        "audio_model",
        "audio_tower",
        "embed_audio",
        "embed_vision",
        "multi_modal_projector",
        "vision_embed_tokens",
        "vision_encoder",
        "vision_model",
        "vision_tower",
        "visual",
    }
)
"""Path components of what encodes images and sounds and hands them to the language model."""

PLAIN_LINEAR_CLASSES = frozenset({"FalconLinear"})
"""Subclasses of `nn.Linear` with a forward of their own that computes the same product."""

READ_AS_TENSORS: Mapping[str, str] = MappingProxyType(
    {"dt_proj": "Mamba's code takes its weight itself, and cannot take a quantised one"}
)
"""Last path component of linears whose forward the model never calls -> why they stay."""

ABSORBED: Mapping[str, str] = MappingProxyType(
    {"kv_b_proj": "engines multiply it into other matrices of latent attention, unquantised"}
)
"""Last path component of linears that engines do not multiply by as they stand -> why."""

EXPERT_PARAMETERS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Three-dimensional parameters [experts, out, in] of transformers' fused experts modules."""


_OTHER_HEADS = re.compile(r"^(bert\.pooler|cls\.seq_relationship)\.")


def belongs_to_another_head(tensor: str) -> bool:
    """Whether a checkpoint's tensor is of a training head that the loaded class leaves out.

    Original BERT checkpoints name a masked language model and carry next-sentence prediction too.
    """
    return _OTHER_HEADS.match(tensor) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNaming:
    """How a family spells its experts in a checkpoint: one Linear per expert and projection."""

    gate: str
    up: str
    down: str
    container: tuple[str, str] | None = None  # path component in memory -> on disk


_MIXTRAL = ExpertNaming(gate="w1", up="w3", down="w2", container=("mlp", "block_sparse_moe"))
_QWEN = ExpertNaming(gate="gate_proj", up="up_proj", down="down_proj")

# As in the tables of transformers/conversion_mapping.py (5.23), for the model types whose
# conversion is nothing but this splitting and renaming.
_EXPERT_NAMING: Mapping[str, ExpertNaming] = MappingProxyType(
    {
        "mixtral": _MIXTRAL,
        "minimax": _MIXTRAL,
        "minimax_m2": _MIXTRAL,
        "phimoe": _MIXTRAL,
        "deepseek_v2": _QWEN,
        "deepseek_v3": _QWEN,
        "dots1": _QWEN,
        "flex_olmo": _QWEN,
        "glm4_moe": _QWEN,
        "olmoe": _QWEN,
        "qwen2_moe": _QWEN,
        "qwen3_moe": _QWEN,
        "qwen3_next": _QWEN,
    }
)


def expert_naming_known(model_type: str) -> bool:
    """Whether the experts of this `config.model_type` can be written to a checkpoint."""
    return model_type in _EXPERT_NAMING


def expert_tensor_names(model_type: str, slot: WeightSlot) -> tuple[str, ...]:
    """Module names, as the original checkpoint spells them, that one expert slot is split into.

    A `gate_up_proj` slot [2 * intermediate, hidden] gives (gate, up), the first and the second
    half of its rows; `down_proj` gives (down,). Append ".weight" for the tensor.

    Args:
        model_type: `config.model_type` of the model.
        slot: a slot of kind EXPERT.
    Raises:
        ModelError: the family's spelling is not known.
    """
    if slot.kind is not SlotKind.EXPERT:
        raise ValueError(f"{slot.name} is a {slot.kind.value} slot, not an expert's")
    naming = _naming(model_type)
    module = f"{checkpoint_module_name(model_type, slot.module)}.{slot.expert}"
    projections = {
        "gate_up_proj": (naming.gate, naming.up),
        "gate_proj": (naming.gate,),
        "up_proj": (naming.up,),
        "down_proj": (naming.down,),
    }[slot.parameter]
    return tuple(f"{module}.{projection}" for projection in projections)


def checkpoint_module_name(model_type: str, module: str) -> str:
    """Path of a module in the original checkpoint, for experts and routers.

    Mixtral's "model.layers.0.mlp.gate" is stored as "model.layers.0.block_sparse_moe.gate";
    families without an entry keep their paths.
    """
    naming = _EXPERT_NAMING.get(model_type)
    if naming is None or naming.container is None:
        return module
    in_memory, on_disk = naming.container
    return ".".join(on_disk if part == in_memory else part for part in module.split("."))


def _naming(model_type: str) -> ExpertNaming:
    if model_type not in _EXPERT_NAMING:
        known = ", ".join(sorted(_EXPERT_NAMING))
        raise ModelError(
            f"how experts are spelled on disk is not known for model_type {model_type!r} "
            f"(known: {known}); exclude its experts"
        )
    return _EXPERT_NAMING[model_type]
