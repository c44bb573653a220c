"""What a search will need of memory and disk, from shapes alone.

Each term is a buffer that the code keeps, by its size; where a step makes many short-lived ones,
how many are alive at once was counted in the code, and the sum held against measured peaks
(`benchmarks/preflight.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoq.api.config import ScoringConfig
from autoq.api.memory_bound import experts_per_token
from autoq.calibration.moments import moment_owners
from autoq.calibration.scales import sharing_sets
from autoq.evaluators.reference import MEMORY_BYTES as REFERENCE_BYTES
from autoq.export.export import MAX_SHARD_BYTES
from autoq.formats import FORMATS, NONE, Container, FormatName, QuantFormat
from autoq.models import ModelMap, SlotKind, WeightSlot
from autoq.models.forward import output_kind, text_config
from autoq.search._projections import LARGEST_ERROR_BYTES, WEIGHT_ERROR_CACHE_BYTES
from autoq.search.sensitivity import KEPT_ACTIVATION_BYTES

_FLOAT = 4  # bytes of a float32

_SHARE_OF_FREE_MEMORY = 0.25
"""That moments of inputs may take: see `autoq.calibration.moments`."""

_ROUNDED_COPIES = 4
"""Matrices in float32 that are alive while one is rounded: itself, scaled, codes' values, error."""

_LOGITS_IN_SCORING = 4
"""The output, its softmax or root, the noise's direction, and the gradient."""

_LOGITS_IN_MEASURING = 3
"""The model's, the original's, and logarithms of a sequence at a time."""

_STORED_TWICE = 2
"""Arrays on their way into the store: themselves, and as the database's bytes."""

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


def memory_by_stage(work: Workload, base_bytes: int, free_bytes: int) -> dict[str, int]:
    """Peak of each stage of a search, in bytes.

    Args:
        base_bytes: what the process has before it begins: Python, torch, transformers.
        free_bytes: what it could still take, of which moments take a share.
    """
    stages = {
        "loading": work.stored_bytes * (work.dtype.itemsize == _FLOAT) // 2,
        "calibrating": _calibrating(work, free_bytes),
        "scoring": _scoring(work),
    }
    if work.held_out_sequences:
        stages["measuring"] = _measuring(work)
    if work.exports:
        stages["exporting"] = _exporting(work)
    return {name: base_bytes + work.weight_bytes + bytes_ for name, bytes_ in stages.items()}


def _block_bytes(work: Workload) -> int:
    """What one block computes for a batch."""
    return int(work.batch_tokens * work.widths_of_block * work.dtype.itemsize)


def _calibrating(work: Workload, free_bytes: int) -> int:
    squares = [width * width * _FLOAT for width in work.input_widths]
    moments = min(sum(squares), max([int(free_bytes * _SHARE_OF_FREE_MEMORY), *squares, 0]))
    rounding = _ROUNDED_COPIES * work.largest_set * _FLOAT + 3 * max(squares, default=0)
    gathering = _block_bytes(work) + moments
    finding = moments + rounding + work.calibration_bytes
    return max(gathering, finding, _STORED_TWICE * work.calibration_bytes)


def _scoring(work: Workload) -> int:
    names: list[FormatName] = [fmt.name for fmt in work.formats]
    itemsize = work.dtype.itemsize
    errors = min(WEIGHT_ERROR_CACHE_BYTES, work.searched_weights * len(names) * itemsize)
    making = min(LARGEST_ERROR_BYTES, work.largest_set * _FLOAT) * _ROUNDED_COPIES
    handed_on = work.batch_tokens * work.hidden_width * itemsize * len(work.model_map.blocks)
    logits = _LOGITS_IN_SCORING * work.batch_tokens * work.output_width * _FLOAT
    kept = min(KEPT_ACTIVATION_BYTES, 2 * _block_bytes(work) * max(len(work.model_map.blocks), 1))
    block = 2 * _block_bytes(work)  # forward's insides and their gradients
    return work.calibration_bytes + errors + handed_on + kept + max(logits, block, making)


def _measuring(work: Workload) -> int:
    originals = work.searched_weights * work.dtype.itemsize
    output = work.batch_tokens * work.output_width * _FLOAT
    batches = -(-work.held_out_sequences // work.config.batch_size)
    reference = min(REFERENCE_BYTES, output * batches)
    running = max(_LOGITS_IN_MEASURING * output, _block_bytes(work))
    return work.calibration_bytes + originals + reference + running


def _exporting(work: Workload) -> int:
    shard = min(MAX_SHARD_BYTES, work.checkpoint_bytes)
    compared = 0
    if work.config.container is Container.COMPRESSED_TENSORS:  # transformers loads it, twice
        compared = 2 * work.weight_bytes
    return work.calibration_bytes + max(shard, compared)


def store_bytes(work: Workload) -> int:
    """Of the store's file when the search is over, its log of what is being written included."""
    groups = len(work.model_map.groups)
    scores = work.config.calibration_sequences * groups * len(work.config.formats) * 8
    return _STORED_TWICE * work.calibration_bytes + scores + (1 << 20)


def free_disk_bytes(place: Path) -> int:
    """What is free where a file or folder is, or will be."""
    above = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return shutil.disk_usage(above).free


def largest(stages: Mapping[str, int]) -> tuple[str, int]:
    """The stage that needs most."""
    return max(stages.items(), key=lambda item: item[1])
