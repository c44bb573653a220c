"""A Llama whose layers differ, as architecture search leaves them: code for a model's folder.

It is copied beside the weights and loaded as remote code, so it imports nothing but torch and
transformers. Each layer has its own width of the feed-forward part and its own number of heads that
keys and values have, and may lack either part.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP


class ManyShapesConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """A Llama's configuration, and what its layers have of their own."""

    model_type = "many_shapes"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **settings: Any) -> None:
        """
        Args:
            block_configs: of each layer "key_value_heads" and "intermediate_size"; None: the layer
                lacks the part.
        """
        super().__init__(**settings)
        self.block_configs = block_configs or []


class NoPart(nn.Module):
    """Stands where a layer lacks attention or its feed-forward part, and adds nothing."""

    def __init__(self, *, is_attention: bool) -> None:
        super().__init__()
        self._is_attention = is_attention

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        """Zeros for the residual stream; from attention with its weights, which there are none."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self._is_attention else nothing


class ManyShapesForCausalLM(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """A Llama whose layers differ in shape."""

    config_class = ManyShapesConfig

    def __init__(self, config: ManyShapesConfig) -> None:
        super().__init__(config)
        for index, (layer, block) in enumerate(
            zip(self.model.layers, config.block_configs, strict=True)
        ):
            own = deepcopy(config)
            if block["key_value_heads"] is None:
                layer.self_attn = NoPart(is_attention=True)
            else:
                own.num_key_value_heads = block["key_value_heads"]
                layer.self_attn = LlamaAttention(own, layer_idx=index)
            if block["intermediate_size"] is None:
                layer.mlp = NoPart(is_attention=False)
            else:
                own.intermediate_size = block["intermediate_size"]
                layer.mlp = LlamaMLP(own)  # type: ignore[no-untyped-call]
        self.post_init()  # type: ignore[no-untyped-call]
