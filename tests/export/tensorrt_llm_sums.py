"""What TensorRT-LLM's engine computes of a checkpoint, rank by rank, in torch and in float32.

Written from the engine's layers (layers/attention.py, layers/mlp.py, models/*/model.py), and from
config.json and the ranks' files alone: no line of the exporter is used. Ranks of one stage add up
the products of their columns, and every rank has all of the norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Ranks = list[dict[str, Tensor]]
BESIDE = ("PhiForCausalLM", "GPTJForCausalLM")  # MLP and attention read the same norm
GEMMA = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")


def engine_logits(config: Mapping[str, Any], ranks: Ranks, ids: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of one sequence of ids [tokens]."""
    return _Engine(config, ranks).run(ids)


class _Engine:
    def __init__(self, config: Mapping[str, Any], ranks: Ranks) -> None:
        self.config, self.architecture = config, config["architecture"]
        self.tensor, self.stages = config["mapping"]["tp_size"], config["mapping"]["pp_size"]
        typed = [{name: tensor.float() for name, tensor in rank.items()} for rank in ranks]
        self.ranks = [
            typed[stage * self.tensor : (stage + 1) * self.tensor] for stage in range(self.stages)
        ]

    def run(self, ids: Tensor) -> Tensor:
        first, last = self.ranks[0], self.ranks[-1]
        hidden = self._rows(first, "transformer.vocab_embedding.weight")[ids]
        if self.architecture in GEMMA:
            hidden = hidden * math.sqrt(self.config["hidden_size"])
        if self.config["position_embedding_type"] == "learned_absolute":
            hidden = hidden + self._rows(first, "transformer.position_embedding.weight")[: len(ids)]
        size = self.config["num_hidden_layers"] // self.stages
        for layer in range(self.config["num_hidden_layers"]):
            ranks = self.ranks[layer // size]
            hidden = self._layer(ranks, f"transformer.layers.{layer % size}", layer, hidden)
        hidden = self._norm(last[0], "transformer.ln_f", hidden)
        logits = hidden @ self._rows(last, "lm_head.weight").t()
        if "lm_head.bias" in last[0]:
            logits = logits + self._rows(last, "lm_head.bias")
        cap = self.config.get("final_logit_softcapping")
        logits = logits if not cap else torch.tanh(logits / cap) * cap
        return logits[:, : self.config["vocab_size"]]

    @staticmethod
    def _rows(ranks: Ranks, name: str) -> Tensor:
        return torch.cat([rank[name] for rank in ranks])

    def _layer(self, ranks: Ranks, path: str, layer: int, hidden: Tensor) -> Tensor:
        def norm(name: str, x: Tensor) -> Tensor:
            return self._norm(ranks[0], f"{path}.{name}", x)

        normed = norm("input_layernorm", hidden)
        attended = self._attention(ranks, f"{path}.attention", layer, normed)
        if self.architecture in BESIDE:
            return hidden + attended + self._mlp(ranks, f"{path}.mlp", normed)
        if self.architecture == "GPTNeoXForCausalLM":
            second = norm("post_attention_layernorm", hidden)
            return hidden + attended + self._mlp(ranks, f"{path}.mlp", second)
        if self.architecture in GEMMA[1:]:
            hidden = hidden + norm("post_layernorm", attended)
            last = self._mlp(ranks, f"{path}.mlp", norm("pre_feedforward_layernorm", hidden))
            return hidden + norm("post_feedforward_layernorm", last)
        hidden = hidden + attended
        return hidden + self._mlp(ranks, f"{path}.mlp", norm("post_layernorm", hidden))

    def _norm(self, rank: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
        weight, epsilon = rank[f"{path}.weight"], self.config["norm_epsilon"]
        if self.architecture == "GPTNeoXForCausalLM":
            epsilon = 1e-5  # LayerNorm's own
        if f"{path}.bias" in rank:
            return functional.layer_norm(x, x.shape[-1:], weight, rank[f"{path}.bias"], epsilon)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight

    def _summed(self, ranks: Ranks, path: str, parts: list[Tensor]) -> Tensor:
        """Products of each rank's columns, and the bias once."""
        products = [x @ rank[f"{path}.weight"].t() for x, rank in zip(parts, ranks, strict=True)]
        biased = ranks if self.architecture == "GPTJForCausalLM" else ranks[:1]
        biases = [rank[f"{path}.bias"] for rank in biased if f"{path}.bias" in rank]
        return sum([*products, *biases], torch.zeros(()))

    @staticmethod
    def _product(rank: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
        return functional.linear(x, rank[f"{path}.weight"], rank.get(f"{path}.bias"))

    def _mlp(self, ranks: Ranks, path: str, x: Tensor) -> Tensor:
        if "moe" in self.config:
            return self._experts(ranks, path, x)
        return self._summed(ranks, f"{path}.proj", [self._inner(rank, path, x) for rank in ranks])

    def _inner(self, rank: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
        first = self._product(rank, f"{path}.fc", x)
        act = self.config["hidden_act"]
        if act == "swiglu":
            up, gate = first.chunk(2, -1)
            return functional.silu(gate) * up
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": lambda value: functional.gelu(value, approximate="tanh"),
            "silu": functional.silu,
        }
        inner = functions[act](first)
        is_gated = f"{path}.gate.weight" in rank
        return inner * self._product(rank, f"{path}.gate", x) if is_gated else inner

    def _experts(self, ranks: Ranks, path: str, x: Tensor) -> Tensor:
        """Every expert reads every token; what is not chosen counts nothing."""
        assert self.config["moe"]["normalization_mode"] == 2
        shares = self._sparse_mixer(x @ ranks[0][f"{path}.router.weight"].t())
        total = torch.zeros_like(x)
        for rank in ranks:
            fc, proj = rank[f"{path}.fc.weight"], rank[f"{path}.proj.weight"]
            for number in range(self.config["moe"]["num_experts"]):
                up, gate = (x @ fc[number].t()).chunk(2, -1)
                out = (functional.silu(gate) * up) @ proj[number].t()
                total = total + shares[:, number : number + 1] * out
        return total

    def _sparse_mixer(self, logits: Tensor) -> Tensor:
        """Share of each expert: twice the best, in a softmax of what is left and near it."""
        shares, left = torch.zeros_like(logits), logits
        near = 2 * self.config["moe"]["sparse_mixer_epsilon"]
        for _ in range(self.config["moe"]["top_k"]):
            best, which = left.max(-1, keepdim=True)
            is_far = (best - logits) / logits.abs().clamp(min=best) > near
            within = left.masked_fill(is_far, float("-inf")).softmax(-1)
            shares = shares.scatter(-1, which, within.gather(-1, which))
            left = left.scatter(-1, which, float("-inf"))
        return shares

    def _attention(self, ranks: Ranks, path: str, layer: int, x: Tensor) -> Tensor:
        heads = [self._heads(rank, path, layer, x) for rank in ranks]
        return self._summed(ranks, f"{path}.dense", heads)

    def _heads(self, rank: dict[str, Tensor], path: str, layer: int, x: Tensor) -> Tensor:
        size = self.config["head_size"]
        queries = self.config["num_attention_heads"] // self.tensor
        shared = self.config["num_key_value_heads"] // self.tensor
        fused = self._product(rank, f"{path}.qkv", x).unflatten(-1, (-1, size)).transpose(0, 1)
        q, k, v = fused.split([queries, shared, shared])
        if self.config["qk_layernorm"]:
            q, k = (
                self._norm(rank, f"{path}.{name}_layernorm", one)
                for name, one in (("q", q), ("k", k))
            )
        q, k = self._turned(q, layer), self._turned(k, layer)
        k, v = (one.repeat_interleave(queries // shared, 0) for one in (k, v))
        scalar = self.config.get("query_pre_attn_scalar") or size
        scores = q @ k.transpose(1, 2) / math.sqrt(scalar)
        cap = self.config.get("attn_logit_softcapping")
        scores = scores if not cap else torch.tanh(scores / cap) * cap
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def _turned(self, x: Tensor, layer: int) -> Tensor:
        """Rotary embeddings of [heads, tokens, features]: the halves of the first features."""
        if self.config["position_embedding_type"] == "learned_absolute":
            return x
        size = int(x.shape[-1] * self.config.get("rotary_pct", 1.0))
        size = self.config.get("rotary_dim", size)
        powers = torch.arange(0, size, 2).float() / size
        angles = torch.arange(x.shape[1]).float().outer(self._base(layer) ** -powers)
        cos, sin = angles.cos(), angles.sin()
        if self.config["position_embedding_type"] == "rope_gptj":
            pairs, rest = x[..., :size].unflatten(-1, (-1, 2)), x[..., size:]
            even, odd = pairs.unbind(-1)
            turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
            return torch.cat([turned.flatten(-2), rest], -1)
        first, second, rest = x.split([size // 2, size // 2, x.shape[-1] - size], -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def _base(self, layer: int) -> float:
        pattern = self.config.get("_sliding_window_pattern")
        is_sliding = pattern is not None and (layer + 1) % pattern != 0
        if self.architecture == "GPTNeoXForCausalLM":
            return float(self.config["rotary_emb_base"])
        return float(self.config["rope_local_base_freq" if is_sliding else "rotary_base"])
