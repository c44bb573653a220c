"""What an evaluator is: a name, the metrics it gives, what it needs, and how it measures.

`autoq.evaluators.measure_metrics(subject, reference, names)` measures any registered metrics and
evaluation tasks of a model in memory. `EVALUATORS.register(name, evaluator)` adds another evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.evaluators.estimate import Estimate
from autoq.evaluators.reference import ReferenceOutputs
from autoq.models.forward import forward_logits, is_causal, output_kind
from autoq.registry import Registry

T = TypeVar("T")


class Need(StrEnum):
    """What a model must be or have for an evaluator."""

    LOGITS = "an output head"
    CAUSAL = "to predict the next token"
    HIDDEN = "hidden states as its output"
    GENERATION = "to generate text"
    TOKENIZER = "a tokenizer"
    PACKED = "weights that are packed as in its checkpoint (autoq.load)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number that an evaluator gives."""

    name: str
    better: Literal["lower", "higher"]
    perfect: float | None = None  # of the original beside itself; None: depends on the model
    repeatable: bool = True  # measuring again gives the same bits; times do not
    of_text: bool = False  # counts the text's words or bytes, which only a tokenizer knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that is measured: in memory, in eval mode, perhaps simulated or packed."""

    model: nn.Module
    tokenizer: Any = None  # the transformers tokenizer, where there is one

    def lacks(self, needs: frozenset[Need]) -> list[Need]:
        """Those of the needs that the model does not meet."""
        return [need for need in Need if need in needs and not self._meets(need)]

    def _meets(self, need: Need) -> bool:
        model = self.model
        match need:
            case Need.LOGITS:
                return output_kind(model) == "logits"
            case Need.CAUSAL:
                return is_causal(model)
            case Need.HIDDEN:
                return output_kind(model) == "hidden"
            case Need.GENERATION:
                can_generate = getattr(model, "can_generate", None)
                return can_generate is not None and bool(can_generate())
            case Need.TOKENIZER:
                return self.tokenizer is not None
            case Need.PACKED:
                return any(isinstance(part, _packed_modules()) for part in model.modules())


def _packed_modules() -> tuple[type[nn.Module], ...]:
    from autoq.layers.packed import PackedExperts, PackedLinear

    return PackedLinear, PackedExperts


class OutputSource(Protocol):
    """Gives the original's outputs beside another model's, batch by batch."""

    def pairs(
        self,
        reference: Callable[[Sequence[Tensor]], list[Tensor]],
        changed: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """(token ids, the original's output, the changed model's) of every batch, in order."""
        ...


class Reference:
    """The original model on some tokens: what every subject is measured beside.

    All subjects see the same tokens, so that they compare sequence by sequence. Whatever evaluators
    need of the original is computed once and kept.
    """

    def __init__(
        self,
        batches: Sequence[Tensor],
        original: Callable[[], AbstractContextManager[nn.Module]],
        *,
        outputs: OutputSource | None = None,
    ) -> None:
        """
        Args:
            batches: token ids, int64 [sequences, tokens] each, on the model's device.
            original: a context in which the model it gives is the original; where the subject is
                the same module with simulated weights, it changes them back and forth.
            outputs: where the original's outputs are kept; None keeps them in memory, as many as
                `ReferenceOutputs` holds.
        """
        self.batches = batches
        self._original = original
        self._outputs = outputs
        self._known: dict[Any, Any] = {}

    @property
    def sequences(self) -> int:
        """How many token sequences there are."""
        return sum(len(batch) for batch in self.batches)

    def pairs(self, changed: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """(token ids, the original's output, the changed model's) of every batch, in order.

        The original's output is a tensor as the model gave it, or `CompactLogits`.
        """
        if self._outputs is None:
            self._outputs = ReferenceOutputs(
                self.batches, bytes_per_batch=self.once("bytes", self._bytes_per_batch)
            )
        yield from self._outputs.pairs(self._run, changed)

    def once(self, key: Any, compute: Callable[[nn.Module], T]) -> T:
        """What `compute` gives for the original model; computed the first time."""
        if key not in self._known:
            with self._original() as model, torch.no_grad():
                self._known[key] = compute(model)
        return cast("T", self._known[key])

    def beside(self) -> AbstractContextManager[nn.Module]:
        """The original model, for as long as the context lasts."""
        return self._original()

    def _run(self, part: Sequence[Tensor]) -> list[Tensor]:
        with self._original() as model, torch.no_grad():
            return [forward_logits(model, ids) for ids in part]

    def _bytes_per_batch(self, model: nn.Module) -> int:
        config: Any = getattr(model, "config", None)
        width = int(getattr(config, "vocab_size", 0) or getattr(config, "hidden_size", 1))
        return max((ids.numel() for ids in self.batches), default=0) * width * 4


class Evaluator(Protocol):
    """Turns a model into named numbers, beside the original on the same tokens.

    Called with the model in eval mode. It must leave the model as it was, and give the same
    numbers for the same weights, but for metrics that say they are not repeatable. It raises
    `EvaluationError` where this model has no value (its output is NaN), which fails one trial;
    whatever no model of this kind can have is said by `needs`, before anything runs.
    """

    @property
    def name(self) -> str:
        """What it is called, in the registry and by users."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What it gives; where the data do not define a metric it may be left out."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """What the model must be or have."""
        ...

    def evaluate(self, subject: Subject, reference: Reference) -> Mapping[str, Estimate]:
        """Metric -> value with its 95 % interval, and where it has them the values of every
        sequence, in the order of the reference's tokens."""
        ...


EVALUATORS: Registry[Evaluator] = Registry("evaluator")
"""Name -> evaluator."""


def check_needs(evaluator: Evaluator, subject: Subject) -> None:
    """Refuse to measure what this kind of model cannot have.

    Raises:
        InputError: names the evaluator, the model and what is missing.
    """
    missing = subject.lacks(evaluator.needs)
    if missing:
        raise InputError(
            f"{evaluator.name} needs {' and '.join(missing)}, which "
            f"{type(subject.model).__name__} lacks; leave it out"
        )
