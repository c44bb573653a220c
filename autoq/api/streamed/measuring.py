"""Measuring plans on a model that is read block by block, to the bits of `PlanMeasurer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoq.api.cache_plans import cache_formats
from autoq.api.measured import noise_floor_on
from autoq.api.streamed.streaming import CalibrationByBlocks, workspace
from autoq.api.study_tables import MEASURE
from autoq.api.task import LoadedModel, output_properties, token_batches
from autoq.data import TokenData
from autoq.errors import InputError
from autoq.evaluators import NOISE_FLOOR, Fidelity, measure_fidelity, rounding_noise
from autoq.formats import NONE, FormatName
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models import SlotName
from autoq.models.forward import forward_logits
from autoq.models.kept_tensors import KeptTensors
from autoq.progress import Progress, SilentProgress
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study

Store = Callable[[Fidelity, str, int | None], None]
"""Keeps what was measured, under a label, of a plan or of none."""


def measure_streamed(
    study: Study,
    plans: Sequence[PlanRecord],
    tokens: TokenData,
    store: Store,
    progress: Progress | None = None,
) -> list[Fidelity]:
    """Measure plans, and the noise floor if it is not known; each is stored.

    The original and all plans go through the model side by side: each block is read once for every
    plan, and what it gives for the tokens waits for the next.

    Raises:
        InputError: a plan quantises the key/value cache.
    """
    measurer = _StreamedMeasurer(study, tokens)
    shown = progress or SilentProgress()
    with torch.no_grad(), workspace(study, MEASURE) as folder:
        if noise_floor_on(study, tokens.sha256) is None:
            with shown.task(f"measuring the {NOISE_FLOOR}", len(measurer.batches)) as advance:
                store(measurer.noise_floor(advance), NOISE_FLOOR, None)
        label = plans[0].label if len(plans) == 1 else f"{len(plans)} plans"
        with shown.task(f"measuring {label}", measurer.steps(len(plans))) as advance:
            found = measurer.measure(plans, folder, advance)
    for plan, fidelity in zip(plans, found, strict=True):
        store(fidelity, plan.label, plan.id)
    return found


class _StreamedMeasurer:
    """The model and the tokens of measurements."""

    def __init__(self, study: Study, tokens: TokenData) -> None:
        self._study = study
        loaded = study.loaded()
        assert loaded.stream is not None  # asked before
        self._loaded: LoadedModel = loaded
        self._model = loaded.stream.model(loaded, study.model_map)
        self._room = loaded.stream.room(loaded, study.model_map, study.config)
        self.batches = token_batches(tokens, study.config.batch_size, loaded.device)

    def steps(self, plans: int) -> int:
        """How often measuring plans advances."""
        return (self._model.blocks + 1) * plans

    def noise_floor(self, advance: Callable[[], None]) -> Fidelity:
        """The original beside itself with rounding noise.

        Batch by batch, as the noise goes on from one to the next.
        """
        generator = torch.Generator(self._loaded.device).manual_seed(self._study.config.seed)
        model, model_map = self._loaded.model, self._study.model_map

        def pairs() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for ids in self.batches:
                with self._model.loading_blocks():
                    original = forward_logits(model, ids)
                    slots = model_map.slots.values()
                    with rounding_noise(model, slots, model_map.blocks, generator):
                        noisy = forward_logits(model, ids)
                yield ids, original, noisy
                advance()

        found = measure_fidelity(pairs(), **output_properties(model))
        self._model.forget_outside()
        return found

    def measure(
        self, plans: Sequence[PlanRecord], folder: Path, advance: Callable[[], None]
    ) -> list[Fidelity]:
        """What the plans do, in their order."""
        kept = KeptTensors(folder, self._room.kept_bytes)
        formats = [self._formats_of(plan) for plan in plans]
        calibration = CalibrationByBlocks(self._study)
        for number in range(self._model.blocks):
            for stream, of_slots in enumerate(formats, start=1):
                with self._model.block(number):
                    if stream == 1:
                        self._run(number, 0, kept)
                    with self._simulated(number, of_slots, calibration):
                        self._run(number, stream, kept)
                advance()
        found = []
        for stream in range(1, len(plans) + 1):
            found.append(self._compare(stream, kept))
            advance()
        self._model.forget_outside()
        return found

    def _formats_of(self, plan: PlanRecord) -> Mapping[SlotName, FormatName]:
        if any(name != NONE for name in cache_formats(plan).values()):
            raise InputError(
                f"plan {plan.label} quantises the key/value cache, which is measured on the whole "
                "model only; measure it without a bound on memory"
            )
        return slot_formats_of(self._study.model_map, plan.to_plan().assignment)

    def _run(self, number: int, stream: int, kept: KeptTensors) -> None:
        for index, ids in enumerate(self.batches):
            key = stream * len(self.batches) + index
            before = kept.take((number - 1, key)) if number else None
            kept.put((number, key), self._model.output_of(number, ids, before))

    @contextmanager
    def _simulated(
        self, number: int, formats: Mapping[SlotName, FormatName], calibration: Any
    ) -> Iterator[None]:
        """The block that is in memory computes in the formats, until its weights go."""
        path = self._study.model_map.blocks[number]
        slots = {
            name: slot
            for name, slot in self._study.model_map.slots.items()
            if slot.module.startswith(f"{path}.")
        }
        simulated = SimulatedModel(
            self._loaded.model,
            slots,
            formats,
            calibration,
            container=self._study.config.container,
            scale_dtype=self._study.storage_dtype,
            keep_originals=False,
        )
        try:
            yield
        finally:
            simulated.leave()

    def _compare(self, stream: int, kept: KeptTensors) -> Fidelity:
        """A plan's outputs beside the original's."""
        last = self._model.blocks - 1

        def outputs(stream: int, index: int) -> Tensor:
            with self._model.ending_with(kept.get((last, stream * len(self.batches) + index))):
                return forward_logits(self._loaded.model, self.batches[index])

        pairs = (
            (ids, outputs(0, index), outputs(stream, index))
            for index, ids in enumerate(self.batches)
        )
        return measure_fidelity(pairs, **output_properties(self._loaded.model))
