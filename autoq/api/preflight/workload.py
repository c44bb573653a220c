"""A search, as far as its needs go: shapes, formats, and who works on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from autoq.api.config import ScoringConfig
from autoq.api.preflight.teams import ALONE, Team
from autoq.api.refinement.options import RefineOptions
from autoq.api.streamed.memory_bound import experts_per_token
from autoq.calibration.moments import moment_owners
from autoq.calibration.scales import sharing_sets
from autoq.formats import FORMATS, NONE, QuantFormat
from autoq.formats.kv_cache import KV_CACHE_FORMATS
from autoq.models import ModelMap, SlotKind, WeightSlot
from autoq.models.forward import output_kind, text_config

_FLOAT = 4  # bytes of a float32

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Workload:
    """A search, as far as its needs go."""

    model: nn.Module  # on the meta device
    model_map: ModelMap
    config: ScoringConfig
    tokens_in_sequence: int
    held_out_sequences: int  # 0: nothing is measured
    exports: bool
    dtype: torch.dtype  # of the model while it is searched
    stored_bytes: int  # of the model's files
    is_mapped: bool = False  # whether weights are used as the files hold them, which all share
    scorers: Team = ALONE
    refining: RefineOptions | None = None  # None: no trials are measured
    trial_workers: Team = ALONE
    scores_cache: bool = False  # whether the key/value cache is scored, too

    @cached_property
    def formats(self) -> list[QuantFormat]:
        """Those that quantise."""
        return [FORMATS[name] for name in self.config.formats if name != NONE]

    @cached_property
    def parameters(self) -> int:
        """How many numbers the model has; what is tied counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Of the whole model in memory."""
        return self.parameters * self.dtype.itemsize

    @property
    def mapped_bytes(self) -> int:
        """Of weights that processes of a machine share, as pages of the model's files."""
        return self.weight_bytes if self.is_mapped else 0

    @property
    def slots(self) -> Iterable[WeightSlot]:
        """The matrices that are searched."""
        return self.model_map.slots.values()

    @cached_property
    def searched_weights(self) -> int:
        """How many weights they have."""
        return sum(slot.weights for slot in self.slots)

    @cached_property
    def batch_tokens(self) -> int:
        """Tokens that run together."""
        sequences = min(self.config.batch_size, self.config.calibration_sequences)
        return sequences * self.tokens_in_sequence

    @property
    def calibration_tokens(self) -> int:
        """Tokens of all sequences that are calibrated on."""
        return self.config.calibration_sequences * self.tokens_in_sequence

    @cached_property
    def output_width(self) -> int:
        """Numbers in the output of a token."""
        config = text_config(self.model)
        if output_kind(self.model) == "logits":
            return int(getattr(config, "vocab_size", 0) or self._embedding.shape[0])
        return int(self._embedding.shape[-1])

    @cached_property
    def hidden_width(self) -> int:
        """Numbers that blocks hand on for a token."""
        return int(getattr(text_config(self.model), "hidden_size", 0) or self._embedding.shape[-1])

    @property
    def _embedding(self) -> Any:
        return self.model.get_input_embeddings().weight  # type: ignore[operator]

    @cached_property
    def active_share(self) -> float:
        """Of the experts, that a token runs through; 1 where there are none."""
        config = text_config(self.model)
        experts = next((n for k in _EXPERT_COUNTS if (n := getattr(config, k, None))), None)
        taken = experts_per_token(self.model)
        return 1.0 if not (experts and taken) else min(1.0, taken / experts)

    def share_of_tokens(self, slot: WeightSlot) -> float:
        """That reach a slot."""
        return self.active_share if slot.kind is SlotKind.EXPERT else 1.0

    @cached_property
    def widths_of_block(self) -> float:
        """Numbers for a token that the largest block's products read and give."""
        largest = 0.0
        for block in self.model_map.blocks or ("",):
            start = f"{block}." if block else ""
            inside = [slot for slot in self.slots if slot.module.startswith(start)]
            read_and_given = sum(
                self.share_of_tokens(slot) * (slot.in_features + slot.out_features)
                for slot in inside
            )
            largest = max(largest, read_and_given)
        return largest

    @cached_property
    def largest_set(self) -> int:
        """Weights of the largest set of matrices that are calibrated together."""
        sets = [names for group in self.model_map.groups for names in sharing_sets(group)]
        return max(sum(self.model_map.slots[n].weights for n in names) for names in sets)

    @cached_property
    def input_widths(self) -> list[int]:
        """Of every distinct input whose second moment is wanted, with errors fed back."""
        if not any(
            fmt.algorithm(self.config.calibration).feeds_errors_back for fmt in self.formats
        ):
            return []
        owners = set(moment_owners(self.model_map.groups).values())
        return [self.model_map.slots[name].in_features for name in owners]

    @cached_property
    def calibration_bytes(self) -> int:
        """Of codes, scales and importances of all formats, in memory as in the store."""
        channels = sum(slot.in_features for slot in self.slots)
        total = 0
        for fmt in self.formats:
            steps = fmt.algorithm(self.config.calibration)
            if steps.feeds_errors_back:
                total += self.searched_weights // 2  # two codes in a byte
            total += channels * _FLOAT * (steps.searches_input_scales + steps.weighs_errors)
            total += sum(_branch_bytes(fmt, slot) for slot in self.slots)
        return total

    # The key/value cache

    @cached_property
    def cached_elements(self) -> int:
        """Of the key/value cache, for a token in a layer."""
        config = text_config(self.model)
        heads = int(getattr(config, "num_attention_heads", 0) or 0)
        cached_heads = int(getattr(config, "num_key_value_heads", 0) or heads)
        size = int(getattr(config, "head_dim", 0) or self.hidden_width // max(1, heads))
        return 2 * (cached_heads * size or self.hidden_width)

    @property
    def cache_scores(self) -> int:
        """Numbers that scoring the cache stores: a sequence's, of each layer in each format."""
        scored = len(KV_CACHE_FORMATS) - 1  # all that quantise, whatever is offered
        return self.config.calibration_sequences * max(1, len(self.model_map.blocks)) * scored

    # Measured trials

    def refined_sequences(self, which: str) -> int:
        """That a refinement measures on: "selection", "fresh" or "held_out"."""
        assert self.refining is not None  # trials are asked for
        if which == "selection":
            return min(self.refining.sequences, self.config.calibration_sequences)
        fresh = which == "fresh"
        return self.refining.fresh_sequences if fresh else self.refining.held_out_sequences

    def refined_tokens(self, which: str) -> int:
        """Tokens of these."""
        return self.refined_sequences(which) * self.tokens_in_sequence

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Of the largest checkpoint that the formats allow; budgets make it smaller."""
        unsearched = self.parameters - self.searched_weights
        rest = unsearched * self.stored_bytes // self.parameters
        return rest + sum(max(self._slot_bits(slot)) for slot in self.slots) // 8

    def _slot_bits(self, slot: WeightSlot) -> Iterator[int]:
        """Of a slot in each format; as it is where it takes none of them."""
        rows, columns = slot.out_features, slot.in_features
        fitting = [fmt for fmt in self.formats if not fmt.refusal(rows, columns)]
        for fmt in fitting:
            yield fmt.storage_bits(rows, columns).effective_bits
        if not fitting or NONE in self.config.formats:
            yield FORMATS[NONE].storage_bits(rows, columns).effective_bits


def _branch_bytes(fmt: QuantFormat, slot: WeightSlot) -> int:
    rank = fmt.branch_rank(slot.out_features, slot.in_features)
    return rank * (slot.out_features + slot.in_features) * 2  # bfloat16
