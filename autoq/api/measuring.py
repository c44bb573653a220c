"""Measuring a study's plans against the original model, on tokens never calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from autoq.api.kv_cache import cache_simulation
from autoq.api.measured import KL_DIVERGENCE, OTHER_DATA, PER_SEQUENCE, noise_floor_on
from autoq.api.task import load_data, output_bytes, output_properties, token_batches
from autoq.data import TokenData
from autoq.data.sources import HELD_OUT_SHARE
from autoq.evaluators import (
    NOISE_FLOOR,
    Fidelity,
    ReferenceOutputs,
    measure_fidelity,
    rounding_noise,
)
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models.forward import forward_logits
from autoq.progress import Progress, SilentProgress
from autoq.studies import MeasurementRecord, PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study

Item = TypeVar("Item")


def held_out_tokens(study: Study, data: str | None = None, *, sequences: int) -> TokenData:
    """Tokens that were not calibrated on.

    Args:
        data: where they come from; None is the held-out part of the calibration data. Of another
            source everything may be used.
    Raises:
        DataError: the data cannot be read, or are too short.
    """
    calibrated_on = study.config.calibration_data
    source = calibrated_on if data is None else data
    return load_data(
        study.loaded(),
        source,
        sequences=sequences,
        sequence_length=study.config.sequence_length,
        split="held_out",
        seed=study.config.seed,
        held_out_share=HELD_OUT_SHARE if _same_source(source, calibrated_on) else 1.0,
    )


def measure_plan(
    study: Study,
    plan: PlanRecord,
    tokens: TokenData,
    *,
    data: str | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Measure a plan on tokens, and the noise floor if it is not known; store what was found.

    Args:
        data: where the tokens come from, if not from the study's own held-out data.
    """
    return measure_plans(study, [plan], tokens, data=data, progress=progress)[0]


def measure_plans(
    study: Study,
    plans: Sequence[PlanRecord],
    tokens: TokenData,
    *,
    data: str | None = None,
    progress: Progress | None = None,
) -> list[Fidelity]:
    """As `measure_plan` for several plans; the original model runs once for all of them."""
    if study.loaded().stream is not None:
        from autoq.api.streamed.measuring import measure_streamed

        store = partial(store_fidelity, study, tokens, data)
        return measure_streamed(study, plans, tokens, store, progress)
    with PlanMeasurer(study, tokens, data=data) as measurer:
        measurer.noise_floor(progress)
        return [measurer.measure(plan, progress) for plan in plans]


class ModelBorrower:
    """A context that may quantise a model in place; at its end the model has its own weights."""

    def __init__(self) -> None:
        self._simulated: SimulatedModel | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """The context itself."""
        self._stack.enter_context(torch.no_grad())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the model its own weights back."""
        try:
            if self._simulated is not None:
                self._simulated.restore()
        finally:
            self._stack.close()


class PlanMeasurer(ModelBorrower):
    """Measures any number of a study's plans on the same tokens, and stores each at once.

    The original's outputs are shared by all plans, as far as they fit in memory. Only the slots
    whose format differs from the plan before are quantised. When the context ends the model has
    its own weights again.
    """

    def __init__(self, study: Study, tokens: TokenData, *, data: str | None = None) -> None:
        """
        Args:
            data: where the tokens come from, if not from the study's own held-out data.
        """
        super().__init__()
        self._study, self._tokens, self._data = study, tokens, data
        loaded = study.loaded()
        self._model = loaded.model
        self._batches = token_batches(tokens, study.config.batch_size, loaded.device)
        self._reference = ReferenceOutputs(
            self._batches, bytes_per_batch=output_bytes(loaded.model, self._batches[0])
        )
        self._noise = torch.Generator(loaded.device).manual_seed(study.config.seed)

    @property
    def steps(self) -> int:
        """How often measuring one plan advances its progress."""
        return len(self._batches)

    def measure(self, plan: PlanRecord, progress: Progress | None = None) -> Fidelity:
        """Measure a plan and store what was found."""
        progress = progress or SilentProgress()
        with progress.task(f"measuring {plan.label}", self.steps) as advance:
            return self.measure_silently(plan, advance)

    def measure_silently(self, plan: PlanRecord, advance: Callable[[], None]) -> Fidelity:
        """As `measure`, as part of a larger task; `advance` is called after every batch."""
        self._apply(plan)
        fidelity = self._fidelity(self._run_original, advance)
        store_fidelity(self._study, self._tokens, self._data, fidelity, plan.label, plan.id)
        return fidelity

    def noise_floor(self, progress: Progress | None = None) -> MeasurementRecord:
        """KL divergence of the original to itself with rounding noise; measured if not stored."""
        known = self._known_floor()
        if known is not None:
            return known
        progress = progress or SilentProgress()
        with progress.task(f"measuring the {NOISE_FLOOR}", self.steps) as advance:
            self._to_original()
            fidelity = self._fidelity(self._forward_all, advance, self._run_noisy)
        store_fidelity(self._study, self._tokens, self._data, fidelity, NOISE_FLOOR, None)
        found = self._known_floor()
        assert found is not None  # it was stored just now
        return found

    def _known_floor(self) -> MeasurementRecord | None:
        return noise_floor_on(self._study, self._tokens.sha256)

    def _fidelity(
        self,
        reference: Callable[[Sequence[Tensor]], list[Tensor]],
        advance: Callable[[], None],
        changed: Callable[[Tensor], Tensor] | None = None,
    ) -> Fidelity:
        pairs = self._reference.pairs(reference, changed or self._forward)
        return measure_fidelity(advancing(pairs, advance), **output_properties(self._model))

    def _apply(self, plan: PlanRecord) -> None:
        if self._simulated is None:
            self._simulated = self._study.simulate(plan)
        else:
            assignment = plan.to_plan().assignment
            self._simulated.apply(slot_formats_of(self._study.model_map, assignment))
            self._simulated.set_kv_cache(cache_simulation(self._study, plan))

    def _to_original(self) -> None:
        if self._simulated is not None:
            self._simulated.restore()

    def _forward(self, ids: Tensor) -> Tensor:
        return forward_logits(self._model, ids)

    def _forward_all(self, part: Sequence[Tensor]) -> list[Tensor]:
        return [self._forward(ids) for ids in part]

    def _run_original(self, part: Sequence[Tensor]) -> list[Tensor]:
        assert self._simulated is not None  # a plan has been applied
        with self._simulated.paused():
            return self._forward_all(part)

    def _run_noisy(self, ids: Tensor) -> Tensor:
        model_map = self._study.model_map
        with rounding_noise(self._model, model_map.slots.values(), model_map.blocks, self._noise):
            return self._forward(ids)


def store_fidelity(
    study: Study,
    tokens: TokenData,
    data: str | None,
    fidelity: Fidelity,
    label: str,
    plan_id: int | None,
) -> None:
    """Keep what was measured.

    Args:
        data: where the tokens come from, if not from the study's own held-out data.
        plan_id: None: it is of no plan.
    """
    intervals = {
        KL_DIVERGENCE: fidelity.kl_divergence,
        "top1_agreement": fidelity.top1_agreement,
    }
    values = {}
    for metric, value in fidelity.metrics().items():
        estimate = intervals.get(metric)
        values[metric] = (value, (estimate.low, estimate.high) if estimate else None)
    study.store.add_measurements(
        study.id,
        values,
        plan_id=plan_id,
        label=label,
        details={} if data is None else {OTHER_DATA: data},
        details_by_metric={KL_DIVERGENCE: {PER_SEQUENCE: list(fidelity.kl_per_sequence)}},
        tokens=fidelity.tokens,
        data_sha256=tokens.sha256,
    )


def advancing(items: Iterable[Item], advance: Callable[[], None]) -> Iterator[Item]:
    """The items, reporting each when the next is asked for."""
    for item in items:
        yield item
        advance()


def _same_source(first: str | None, second: str | None) -> bool:
    """Whether two sources may share documents: other splits of one dataset count as the same."""
    if first is None or second is None:
        return first == second
    names = [
        source if Path(source).exists() else source.split(":")[0] for source in (first, second)
    ]
    return names[0] == names[1] or Path(names[0]).resolve() == Path(names[1]).resolve()
