"""What `--max-memory` asks, and what a model that is searched a block at a time needs at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from autoq.api.config import ScoringConfig
from autoq.api.task import LoadedModel, output_width
from autoq.errors import InputError
from autoq.models import ModelMap, SlotKind
from autoq.search.estimators import ESTIMATORS
from autoq.search.streamed import refuse_unstreamed_estimator

PROGRAM_BYTES = 600 * 10**6
"""What Python, torch, transformers and the study's small things take."""

_BYTES_OF_AN_ERROR = 6
"""For each weight: the quantised one in float32, and the error in bfloat16."""

_LOGITS_AT_ONCE = 3
"""Logits, what a loss makes of them, and the gradient; in float32."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Bytes that searching a model a block at a time takes."""

    block: int  # weights of the largest, in the dtype to compute in
    activations: int  # of that block, for a batch
    matrix: int  # what quantising the largest matrix takes beside it
    outside: int  # the largest layer that is in no block, such as the output head
    output: int  # logits of a batch, and what is made of them
    handed_on: int  # what all blocks give for a batch

    @classmethod
    def of(cls, loaded: LoadedModel, model_map: ModelMap, config: ScoringConfig) -> MemoryNeeds:
        """Those of a model on the meta device."""
        longest = loaded.longest_sequence or config.sequence_length
        tokens = config.batch_size * min(config.sequence_length, longest)
        model = loaded.model
        size = next(model.parameters()).element_size()
        blocks = [model.get_submodule(path) for path in model_map.blocks]
        widths = [_widths(model_map, path) for path in model_map.blocks]
        inside = {id(p) for block in blocks for p in block.parameters()}
        return cls(
            block=max(map(_parameter_bytes, blocks)),
            activations=tokens * max(widths) * size,
            matrix=_BYTES_OF_AN_ERROR * max(slot.weights for slot in model_map.slots.values()),
            outside=_largest_outside(model, inside),
            output=_LOGITS_AT_ONCE * tokens * output_width(model) * 4,
            handed_on=len(blocks) * tokens * _hidden_width(model) * size,
        )

    @property
    def least(self) -> int:
        """The smallest bound that works."""
        inside = self.block + self.activations + self.matrix
        return PROGRAM_BYTES + max(inside, self.outside + self.output)

    def refuse_less(self, bound: int) -> None:
        """
        Raises:
            InputError: the bound is smaller than `least`.
        """
        if bound >= self.least:
            return
        least = -(-self.least // 10**8) / 10
        raise InputError(
            f"memory must hold a block of the model and a batch's activations in it, {least:.1f}GB, "
            f"and the bound is {bound / 1e9:.1f}GB; give --max-memory {least:.1f}GB or more, or "
            "smaller batches (--batch-size, --sequence-length)"
        )


def refuse_unstreamable(
    config: ScoringConfig, *, is_module: bool, others: Sequence[tuple[bool, str]]
) -> None:
    """Refuse what a search within a bound on memory cannot do, before anything is read.

    Args:
        is_module: the model was given in memory.
        others: whether something was asked for that needs the model in memory, and its option.
    Raises:
        InputError: something was.
    """
    if is_module:
        raise InputError(
            "a search within a bound on memory reads a model folder, and the model was given in "
            "memory; give its folder, or leave max_memory out"
        )
    estimator = ESTIMATORS[config.estimator]
    streams = bool(getattr(estimator, "goes_block_by_block", False))
    refuse_unstreamed_estimator(config.estimator, streams)
    draws = config.draws or getattr(estimator, "default_draws", 1)
    if draws != 1:
        raise InputError(
            f"labels must be drawn once where memory is bounded, and {config.estimator} draws them "
            f"{draws} times; give --draws 1, or leave --max-memory out"
        )
    for is_asked, option in others:
        if is_asked:
            raise InputError(
                f"a search within a bound on memory cannot do what {option} asks, which needs the "
                f"whole model; leave {option} or --max-memory out"
            )


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _largest_outside(model: nn.Module, inside: set[int]) -> int:
    """Embeddings aside, of which only the rows that are looked up are read."""
    sizes: list[int] = [0]
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in inside]
        if own and not isinstance(module, nn.Embedding):
            sizes.append(sum(parameter.nbytes for parameter in own))
    return max(sizes)


def _widths(model_map: ModelMap, block: str) -> int:
    """Values that a token has at the products of a block, inputs and outputs."""
    plain = experts = 0
    for slot in model_map.slots.values():
        if slot.module.startswith(f"{block}."):
            width = slot.in_features + slot.out_features
            plain += width if slot.kind is not SlotKind.EXPERT else 0
            experts += width if slot.expert == 0 else 0
    # A token sees a few experts; their number differs, and two are common.
    return plain + 2 * experts


def _hidden_width(model: nn.Module) -> int:
    embeddings: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[1])
