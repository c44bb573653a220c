"""What `--max-memory` asks, and what a model that is searched a block at a time needs at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from autoq.api.config import ScoringConfig
from autoq.api.task import LoadedModel, output_width
from autoq.errors import InputError
from autoq.models import ModelMap, SlotKind
from autoq.models.forward import text_config
from autoq.search.estimators import ESTIMATORS
from autoq.search.streamed import refuse_unstreamed_estimator

PROGRAM_BYTES = 600 * 10**6
"""What Python, torch, transformers and the study's small things take."""

_BYTES_OF_AN_ERROR = 6
"""For each weight: the quantised one in float32, and the error in bfloat16."""

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")
_EXPERTS_OF_A_TOKEN = 2  # where a configuration does not say, as in most mixtures

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
    handed_on_by_token: int  # what one block gives for a token

    @classmethod
    def of(cls, loaded: LoadedModel, model_map: ModelMap, config: ScoringConfig) -> MemoryNeeds:
        """Those of a model on the meta device."""
        longest = loaded.longest_sequence or config.sequence_length
        tokens = config.batch_size * min(config.sequence_length, longest)
        model = loaded.model
        size = next(model.parameters()).element_size()
        blocks = [model.get_submodule(path) for path in model_map.blocks]
        taken = experts_per_token(model) or _EXPERTS_OF_A_TOKEN
        widths = [_widths(model_map, path, taken) for path in model_map.blocks]
        inside = {id(p) for block in blocks for p in block.parameters()}
        return cls(
            block=max(map(_parameter_bytes, blocks)),
            activations=tokens * max(widths) * size,
            matrix=_BYTES_OF_AN_ERROR * max(slot.weights for slot in model_map.slots.values()),
            outside=_largest_outside(model, inside),
            output=_LOGITS_AT_ONCE * tokens * output_width(model) * 4,
            handed_on=len(blocks) * tokens * _hidden_width(model) * size,
            handed_on_by_token=_hidden_width(model) * size,
        )

    @property
    def least(self) -> int:
        """The smallest bound that works."""
        inside = self.block + self.activations + self.matrix
        return PROGRAM_BYTES + max(inside, self.outside + self.output)

    def room_of(self, bound: int) -> int:
        """Bytes of a bound that hold what blocks give; the rest of that goes to the disk."""
        return max(0, bound - self.least) // 2

    def kept_at_least(self, calibration_tokens: int) -> int:
        """Of what blocks give, that waits somewhere at once, in memory or on the disk.

        Calibration keeps the inputs and outputs of a block for all its tokens, scoring what all
        blocks give for one batch, or for more where there is room.
        """
        return max(2 * calibration_tokens * self.handed_on_by_token, self.handed_on)

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


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts of a block a token runs through; None where the configuration has no word."""
    config = text_config(model)
    found = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
    return next((int(number) for number in found if number), None)


def _widths(model_map: ModelMap, block: str, experts_of_a_token: int) -> int:
    """Values that a token has at the products of a block, inputs and outputs."""
    plain = experts = 0
    for slot in model_map.slots.values():
        if slot.module.startswith(f"{block}."):
            width = slot.in_features + slot.out_features
            plain += width if slot.kind is not SlotKind.EXPERT else 0
            experts += width if slot.expert == 0 else 0
    return plain + experts_of_a_token * experts


def _hidden_width(model: nn.Module) -> int:
    embeddings: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[1])
