"""What a trial of a refinement costs: the loss of one plan on tokens that all trials share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from autoq.api.evaluating.metrics import outputs_in_full
from autoq.api.measuring import ModelBorrower
from autoq.api.refinement._metrics import Aim, AimedMetrics, Gathered
from autoq.api.task import output_bytes, output_properties, token_batches
from autoq.data import TokenData
from autoq.errors import EvaluationError
from autoq.evaluators import Reference, ReferenceOutputs, measure_fidelity, rounding_noise
from autoq.evaluators.cache import LogitsCache
from autoq.formats import FormatName
from autoq.layers.prefix import PrefixReuse, is_exact
from autoq.layers.simulate import slot_formats_of
from autoq.layers.weight_cache import WeightCache
from autoq.memory import available_bytes
from autoq.models import Assignment, SlotName
from autoq.models.forward import forward_logits

if TYPE_CHECKING:
    from autoq.api.study import Study

AVAILABLE_SHARE = 0.25
"""Of the memory that is free on the model's device: what caches may take unless told otherwise."""

_PROBE_TOKENS = 16

_RunAll: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]
"""The original's outputs on batches of tokens."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one plan."""

    losses: tuple[float, ...]  # the objective per sequence; one number where it has none such
    kl_per_sequence: tuple[float, ...]  # nats per token
    complete: bool  # False: stopped early, only the first sequences
    loss: float  # the objective of what was measured
    metrics: Mapping[str, float] = field(default_factory=dict)  # of a complete one


class TrialMeasurer(ModelBorrower):
    """Losses of any number of plans on the same tokens, each as cheap as it can be had exactly.

    Only slots whose format differs from the plan before are changed; their quantised weights, the
    original's outputs, and what the first blocks gave to plans that agree there are kept. What
    comes out is bit for bit what a model gives that was quantised for this plan alone. When the
    context ends the model has its own weights again.
    """

    def __init__(
        self,
        study: Study,
        tokens: TokenData,
        aim: Aim,
        *,
        cache_bytes: int | None = None,
        outputs: LogitsCache | None = None,
    ) -> None:
        """
        Args:
            tokens: what every plan is measured on.
            aim: what is to be known of every plan.
            cache_bytes: bound on quantised weights and block outputs together; None is a share of
                the memory that is free.
            outputs: where the original's outputs are shared with other processes, if they fit there
                to the bit.
        Raises:
            UnknownNameError, InputError: a metric is not known, or not one of such a model.
        """
        super().__init__()
        self._study = study
        loaded = study.loaded()
        self.metrics = AimedMetrics(aim, loaded)
        self._model = loaded.model
        self._batches = token_batches(tokens, study.config.batch_size, loaded.device)
        self._numbers = {id(ids): number for number, ids in enumerate(self._batches)}
        self._reference = ReferenceOutputs(
            self._batches, bytes_per_batch=output_bytes(loaded.model, self._batches[0])
        )
        shared = None if outputs is None else outputs_in_full(outputs, loaded, self._batches)
        self._shared: Callable[[_RunAll], _RunAll] = _alone if shared is None else shared.through
        if cache_bytes is None:
            cache_bytes = int(AVAILABLE_SHARE * available_bytes(loaded.device))
        self._weights = WeightCache(cache_bytes // 2)
        self._prefixes = _Prefixes(study)
        self._reuse_bytes = cache_bytes - cache_bytes // 2
        self._reuse: PrefixReuse | None = None
        self._current: tuple[int, ...] = ()
        self._least = math.inf  # loss of the best plan so far
        self._best: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """How often measuring one plan advances at most."""
        return len(self._batches)

    @property
    def blocks_skipped(self) -> int:
        """How many of the blocks' runs were not needed so far."""
        return 0 if self._reuse is None else self._reuse.blocks_skipped

    def measure(
        self,
        assignment: Assignment,
        *,
        stop: Callable[[Sequence[float]], bool] = lambda so_far: False,
        advance: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Measure a plan.

        Args:
            stop: called after each batch but the last with the losses so far, where the objective
                has one for each sequence.
            advance: called after each batch.
        Raises:
            EvaluationError: the plan's outputs, or its loss, are not finite.
        """
        self._apply(assignment)
        gathered = self.metrics.gathered()
        pairs = self._reference.pairs(self._shared(self._run_original), self._forward)
        for number, (ids, expected, found) in enumerate(pairs, start=1):
            gathered.add(ids, expected, found)
            advance()
            if number < len(self._batches) and gathered.losses and stop(gathered.losses):
                mean = math.fsum(gathered.losses) / len(gathered.losses)
                return self._measured(gathered, mean, complete=False)
        metrics = self.metrics.finished(gathered, self._beside())
        measured = self._measured(gathered, self.metrics.value(metrics), metrics, complete=True)
        if measured.loss < self._least:
            self._least, self._best = measured.loss, self._current
        return measured

    def original(self) -> dict[str, float]:
        """What the original has of the metrics that constraints compare with."""
        return self.metrics.of_the_original(self._beside(paused=False))

    def noise_floor(self) -> float:
        """KL divergence of the original to itself with rounding noise, nats per token."""
        if self._simulated is not None:
            self._simulated.restore()
        noise = torch.Generator(self._study.loaded().device).manual_seed(self._study.config.seed)
        model_map = self._study.model_map

        def noisy(ids: Tensor) -> Tensor:
            with rounding_noise(self._model, model_map.slots.values(), model_map.blocks, noise):
                return forward_logits(self._model, ids)

        pairs = self._reference.pairs(self._shared(self._run_all), noisy)
        found = measure_fidelity(pairs, **output_properties(self._model))
        return found.kl_divergence.value

    def _measured(
        self,
        gathered: Gathered,
        loss: float,
        metrics: Mapping[str, float] | None = None,
        *,
        complete: bool,
    ) -> Measured:
        losses = tuple(gathered.losses) or (loss,)
        if not all(map(math.isfinite, (loss, *losses))):
            text = self.metrics.aim.objective.text
            raise EvaluationError(
                f"the objective {text} is not a finite number; write another, or search with "
                "--dtype float32"
            )
        return Measured(losses, tuple(gathered.divergences), complete, loss, metrics or {})

    def _beside(self, *, paused: bool = True) -> Reference:
        """The same original for metrics that look at more than outputs for the tokens."""

        @contextmanager
        def original() -> Iterator[nn.Module]:
            with self._simulated.paused() if self._simulated and paused else nullcontext():
                yield self._model

        return Reference(self._batches, original, outputs=self._reference)

    def _apply(self, assignment: Assignment) -> None:
        formats = slot_formats_of(self._study.model_map, assignment)
        if self._simulated is None:
            self._simulated = self._study.simulate_formats(formats, cache=self._weights)
            self._reuse = self._exact_reuse()
        else:
            self._simulated.apply(formats)
        self._current = self._prefixes.of(formats)
        if self._reuse is not None:
            self._reuse.prefer(self._best)  # most plans are the best one with few exchanges

    def _exact_reuse(self) -> PrefixReuse | None:
        """None where beginning in the middle is not bit for bit the same, or nothing is kept."""
        blocks = self._study.model_map.blocks
        probe = self._batches[0][:1, :_PROBE_TOKENS]
        if not self._reuse_bytes or not is_exact(
            self._model, blocks, lambda: forward_logits(self._model, probe)
        ):
            return None
        return PrefixReuse(self._model, blocks, memory_bytes=self._reuse_bytes)

    def _forward(self, ids: Tensor) -> Tensor:
        if self._reuse is None:
            return forward_logits(self._model, ids)
        return self._reuse.run(
            self._numbers[id(ids)], self._current, lambda: forward_logits(self._model, ids)
        )

    def _run_original(self, part: Sequence[Tensor]) -> list[Tensor]:
        assert self._simulated is not None  # a plan has been applied
        with self._simulated.paused():
            return self._run_all(part)

    def _run_all(self, part: Sequence[Tensor]) -> list[Tensor]:
        return [forward_logits(self._model, ids) for ids in part]


class _Prefixes:
    """A number for what decides the outputs of the first blocks, for every count of blocks."""

    def __init__(self, study: Study) -> None:
        blocks = study.model_map.blocks
        paths = {f"{path}.": index for index, path in enumerate(blocks)}
        self._slots: list[list[SlotName]] = [[] for _ in blocks]
        for name, slot in study.model_map.slots.items():
            own = (index for path, index in paths.items() if f"{slot.module}.".startswith(path))
            # What is in no block may be computed before all of them.
            index = next(own, 0)
            if index < len(blocks):
                self._slots[index].append(name)
        self._numbers: dict[tuple[int, tuple[FormatName, ...]], int] = {}

    def of(self, formats: Mapping[SlotName, FormatName]) -> tuple[int, ...]:
        """Equal numbers for assignments that are equal in all blocks up to this one."""
        return tuple(self._of(formats))

    def _of(self, formats: Mapping[SlotName, FormatName]) -> Iterator[int]:
        number = 0
        for slots in self._slots:
            key = number, tuple(formats[slot] for slot in slots)
            number = self._numbers.setdefault(key, len(self._numbers) + 1)
            yield number


def _alone(reference: _RunAll) -> _RunAll:
    """Where nothing is shared, the original runs here."""
    return reference
