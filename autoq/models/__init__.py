"""Loading models, finding what can be quantised in them, and forming decision groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoq.lazy import names_from
from autoq.models._types import (
    Assignment,
    DecisionGroup,
    ExcludedSlot,
    GroupName,
    ModelMap,
    SlotKind,
    SlotName,
    WeightSlot,
)

if TYPE_CHECKING:
    from autoq.models.checkpointing import checkpointed_blocks
    from autoq.models.discovery import discover
    from autoq.models.families import checkpoint_module_name, expert_tensor_names
    from autoq.models.forward import forward_logits, is_causal, output_kind
    from autoq.models.loading import load_model, load_tokenizer, model_fingerprint
    from autoq.models.weights import check_finite, fingerprint_of_module, slot_weight

__all__ = [
    "Assignment",
    "DecisionGroup",
    "ExcludedSlot",
    "GroupName",
    "ModelMap",
    "SlotKind",
    "SlotName",
    "WeightSlot",
    "check_finite",
    "checkpoint_module_name",
    "checkpointed_blocks",
    "discover",
    "expert_tensor_names",
    "fingerprint_of_module",
    "forward_logits",
    "is_causal",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "output_kind",
    "slot_weight",
]


__getattr__ = names_from(
    __name__,
    {
        "autoq.models.checkpointing": ("checkpointed_blocks",),
        "autoq.models.discovery": ("discover",),
        "autoq.models.families": ("checkpoint_module_name", "expert_tensor_names"),
        "autoq.models.forward": ("forward_logits", "is_causal", "output_kind"),
        "autoq.models.loading": ("load_model", "load_tokenizer", "model_fingerprint"),
        "autoq.models.weights": ("check_finite", "fingerprint_of_module", "slot_weight"),
    },
)
