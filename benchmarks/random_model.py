"""A random Llama-like model on disk, as large as one likes, for benchmarks of what streams models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHT_BYTES = 2  # bfloat16
POOL_VALUES = 1 << 26


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model, and how many layers a file of it holds."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    shard_layers: int

    @property
    def layer_weights(self) -> int:
        """How many weights the linears of a layer have."""
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate


def write_random_model(folder: Path, gigabytes: float, shape: ModelShape) -> int:
    """Write a random model of about that size, one shard in memory; returns its bytes.

    Matrices are pieces of one pool of normal numbers, from random places on: drawing billions of
    numbers takes longer than all else.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layers = max(1, round(gigabytes * 1e9 / (shape.layer_weights * WEIGHT_BYTES)))
    LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    pool = _Pool()
    weight_map: dict[str, str] = {}
    total = 0
    for first in range(0, layers, shape.shard_layers):
        tensors: dict[str, Any] = {}
        for number in range(first, min(first + shape.shard_layers, layers)):
            tensors.update(_layer(number, shape, pool))
        if first == 0:
            tensors["model.embed_tokens.weight"] = pool.matrix(shape.vocabulary, shape.hidden)
            tensors["lm_head.weight"] = pool.matrix(shape.vocabulary, shape.hidden)
            tensors["model.norm.weight"] = pool.ones(shape.hidden)
        file = f"model-{first // shape.shard_layers:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class _Pool:
    def __init__(self) -> None:
        import torch

        self._generator = torch.Generator().manual_seed(0)
        self._values = torch.randn(POOL_VALUES, generator=self._generator)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """Normal numbers whose products with normal inputs are normal, bfloat16 [rows, columns]."""
        import torch

        last = POOL_VALUES - rows * columns
        start = int(torch.randint(last, (1,), generator=self._generator))
        values = self._values[start : start + rows * columns] * columns**-0.5
        return values.view(rows, columns).to(torch.bfloat16)

    def ones(self, size: int) -> torch.Tensor:
        import torch

        return torch.ones(size, dtype=torch.bfloat16)


def _layer(number: int, shape: ModelShape, pool: _Pool) -> dict[str, torch.Tensor]:
    at = f"model.layers.{number}"
    hidden, intermediate = shape.hidden, shape.intermediate
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors[f"{at}.self_attn.{name}.weight"] = pool.matrix(hidden, hidden)
    for name in ("gate_proj", "up_proj"):
        tensors[f"{at}.mlp.{name}.weight"] = pool.matrix(intermediate, hidden)
    tensors[f"{at}.mlp.down_proj.weight"] = pool.matrix(hidden, intermediate)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{at}.{name}.weight"] = pool.ones(hidden)
    return tensors
