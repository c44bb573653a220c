"""From input statistics and weights to the scales of every layer in every format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoq.calibration import workers
from autoq.calibration.awq import search_input_scale
from autoq.calibration.block_scales import with_block_scales
from autoq.calibration.feedback import FeedbackOfSlots
from autoq.calibration.folding import ScalePlaces, find_folds
from autoq.calibration.gptq import ErrorFeedback
from autoq.calibration.moments import (
    MomentCollector,
    collect_moments,
    moment_memory,
    moment_owners,
    parts_in_memory,
)
from autoq.calibration.scales import (
    has_second_level,
    mean_square,
    refuse_broken_weight,
    scaled_importance,
    scaled_input_amax,
    scaled_weight_amax,
    sharing_sets,
)
from autoq.calibration.smooth import search_smoothing_scale
from autoq.calibration.statistics import InputStatistics, collect_statistics
from autoq.calibration.svdquant import with_branches
from autoq.formats import (
    FORMATS,
    NONE,
    Calibration,
    CalibrationMethod,
    FormatName,
    InputScaling,
    QuantFormat,
)
from autoq.layers import LayerCalibration
from autoq.layers.quantize import Container, code_grid, coded_weight
from autoq.models import DecisionGroup, ModelMap, SlotKind, SlotName
from autoq.models.weights import slot_weight

Batch = TypeVar("Batch")


def calibrate(
    model: nn.Module,
    model_map: ModelMap,
    formats: Sequence[FormatName],
    batches: Sequence[Batch],
    run: Callable[[Batch], Any],
    *,
    run_small: Callable[[], Tensor],
    container: Container,
    scale_dtype: torch.dtype,
    method: Calibration = CalibrationMethod.BEST,
    moment_bytes: int | None = None,
    after_batch: Callable[[], None] = lambda: None,
    after_group: Callable[[], None] = lambda: None,
) -> dict[tuple[SlotName, FormatName], LayerCalibration]:
    """Calibrate every slot in every format it can take, in one pass over `batches`.

    Where second moments are needed there are more passes if those of all inputs do not fit in a
    quarter of the memory that is free on the model's device; `moment_bytes` overrules that.

    Where torch.distributed is initialised all ranks call this with the same model and formats, each
    with batches of its own, and all get the scales of all data.

    Args:
        formats: names of the formats; "none" needs no calibration and is skipped.
        run: runs the model on one batch.
        run_small: runs the model on some small input and returns its output; used to find out
            where an input scale folds exactly.
        container: input scales that do not fold are searched only where it can store them.
        scale_dtype: the dtype in which the checkpoint stores INT4 group scales.
        method: which of each format's algorithms is meant, or algorithms that were put together.
        after_batch: called after every batch, for progress.
        after_group: called when a group is calibrated in one format, for progress.
    Raises:
        ModelError: a weight, or an input on calibration data, holds NaN or Inf; names the layer.
        DataError: a rank has no batches.
    """
    device = next(model.parameters()).device
    batch_count = workers.count_batches(len(batches), device)
    quantised = [FORMATS[name] for name in formats if name != NONE]
    steps = [fmt.algorithm(method) for fmt in quantised]
    scaling = [fmt for fmt in quantised if fmt.algorithm(method).searches_input_scales]
    folds = find_folds(model, model_map, run_small) if scaling else {}
    places = ScalePlaces.of(model_map, folds, container)
    parts = [list(model_map.groups)]
    needs_moments = any(step.needs_second_moments for step in steps)
    if needs_moments:
        if moment_bytes is None:
            moment_bytes = workers.least(moment_memory(device), device)
        parts = list(parts_in_memory(model_map, model_map.groups, moment_bytes))
    collector = MomentCollector(parts[0] if needs_moments else [], batch_count)
    statistics = collect_statistics(
        model,
        model_map,
        batches,
        run,
        batch_count=batch_count,
        keep_rows_of={
            name for name in model_map.slots if any(places.take(name, fmt) for fmt in scaling)
        },
        counts_magnitudes=any(step.input_percentile is not None for step in steps),
        also=collector.record,
        after_batch=after_batch,
    )
    collector.share(model_map, device)
    calibrator = _Calibrator(model, model_map, statistics, places, container, scale_dtype, method)
    table: dict[tuple[SlotName, FormatName], LayerCalibration] = {}
    moments = collector.moments
    for index, part in enumerate(parts):
        if index:
            moments.clear()
            moments = collect_moments(model, model_map, part, batches, run, batch_count=batch_count)
        with torch.no_grad():
            for group in part:  # so that what feedback needs of an input is not kept for all
                feedback = FeedbackOfSlots(moments, moment_owners([group]))
                for fmt in quantised:
                    table.update(calibrator.calibrate_group(group, fmt, feedback))
                    after_group()
    return table


@dataclass(frozen=True, slots=True)
class _Calibrator:
    """Everything that calibrating one group in one format needs."""

    model: nn.Module
    model_map: ModelMap
    statistics: Mapping[SlotName, InputStatistics]
    places: ScalePlaces
    container: Container
    scale_dtype: torch.dtype
    method: Calibration

    def calibrate_group(
        self, group: DecisionGroup, fmt: QuantFormat, feedback: FeedbackOfSlots
    ) -> Iterator[tuple[tuple[SlotName, FormatName], LayerCalibration]]:
        slots = [self.model_map.slots[name] for name in group.slots]
        if any(fmt.refusal(slot.out_features, slot.in_features) for slot in slots):
            return
        algorithm = fmt.algorithm(self.method)
        searches = algorithm.searches_input_scales and self._scalable(group)
        shared_amax = self._shared_input_amax(group, algorithm.input_percentile)
        importance = self._importance(group) if algorithm.weighs_errors else {}
        for members in sharing_sets(group):
            own = importance.get(members[0])
            scale = self._input_scale(members, fmt, own) if searches else None
            calibration = self._calibrate_set(members, fmt, scale, shared_amax, own)
            calibrations = dict.fromkeys(members, calibration)
            if fmt.low_rank and self._own_matrices(group):
                weights = self._weights(members)
                entries = with_branches(weights, fmt, calibration, scale_dtype=self.scale_dtype)
                calibrations = dict(zip(members, entries, strict=True))
            if algorithm.needs_second_moments and self._own_matrices(group):
                calibrations = self._refined(fmt, calibrations, feedback, scale)
            for name in members:
                yield (name, fmt.name), calibrations[name]

    def _calibrate_set(
        self,
        members: Sequence[SlotName],
        fmt: QuantFormat,
        scale: Tensor | None,
        shared_amax: Mapping[SlotName, float],
        importance: Tensor | None,
    ) -> LayerCalibration:
        first = members[0]  # the members share their statistics
        input_amax = shared_amax.get(first)
        if input_amax is None:
            percentile = fmt.algorithm(self.method).input_percentile
            input_amax = scaled_input_amax(self.statistics[first], scale, percentile)
        importance = scaled_importance(importance, scale)
        weights = self._weights(members)
        for name, weight in zip(members, weights, strict=True):
            refuse_broken_weight(name, weight)
        return LayerCalibration(
            weight_amax=scaled_weight_amax(weights, scale, fmt, self.scale_dtype, importance),
            input_amax=input_amax,
            pre_quant_scale=scale,
            folds_into=self.places.folds.get(first) if scale is not None else None,
            importance=importance,
            input_rows=self.statistics[first].row_count,
        )

    def _refined(
        self,
        fmt: QuantFormat,
        calibrations: dict[SlotName, LayerCalibration],
        feedback: FeedbackOfSlots,
        scale: Tensor | None,
    ) -> dict[SlotName, LayerCalibration]:
        """With codes that errors are fed back to, or else with block scales by the outputs' error."""
        members = tuple(calibrations)
        options = fmt.algorithm(self.method).feedback
        if options is not None:
            found = feedback.of(members[0], scale, options)
            return calibrations if found is None else self._with_codes(fmt, calibrations, found)
        moment = feedback.moment(members[0], scale)
        if moment is None:
            return calibrations
        weights = dict(zip(members, self._weights(members), strict=True))
        return with_block_scales(weights, fmt, calibrations, moment, self.scale_dtype)

    def _with_codes(
        self,
        fmt: QuantFormat,
        calibrations: dict[SlotName, LayerCalibration],
        feedback: ErrorFeedback,
    ) -> dict[SlotName, LayerCalibration]:
        """The members' calibrations with the codes that error feedback finds."""
        coded, grids = [], []
        for weight, entry in zip(
            self._weights(tuple(calibrations)), calibrations.values(), strict=True
        ):
            grid = code_grid(weight.float(), fmt, entry, scale_dtype=self.scale_dtype)
            if grid is None:
                return calibrations
            coded.append(coded_weight(weight.float(), entry))
            grids.append(grid)
        levels = grids[0].levels
        steps = torch.cat([grid.step for grid in grids])
        found = feedback.round(torch.cat(coded), steps, levels)
        if has_second_level(fmt):
            amax = float((levels[found.int()] * steps).abs().max())
            calibrations = {n: replace(e, weight_amax=amax) for n, e in calibrations.items()}
        indices = torch.split(found, [len(weight) for weight in coded])
        return {
            name: replace(entry, codes=grid.pack(index).cpu())
            for (name, entry), grid, index in zip(calibrations.items(), grids, indices, strict=True)
        }

    def _importance(self, group: DecisionGroup) -> dict[SlotName, Tensor]:
        """Mean squares of the input's channels by slot, over each input set for all its members.

        One expert sees few tokens, so experts that read the same tensor pool theirs.
        """
        squares: dict[SlotName, Tensor] = {}
        for members in sharing_sets(group):  # which share their statistics
            own = mean_square([self.statistics[members[0]]])
            squares.update(dict.fromkeys(members, own))
        for names in group.input_sets:
            pooled = mean_square([self.statistics[name] for name in names])
            squares.update(dict.fromkeys(names, pooled))
        return squares

    def _weights(self, members: Sequence[SlotName]) -> list[Tensor]:
        return [slot_weight(self.model, self.model_map.slots[name]) for name in members]

    def _scalable(self, group: DecisionGroup) -> bool:
        """Whether the group's slots can have input scales of their own."""
        if group.input_sets or self.model_map.slots[group.slots[0]].kind is SlotKind.EXPERT:
            # Experts share one input with the router and no container stores a scale for them.
            return False
        return self._own_matrices(group)

    def _own_matrices(self, group: DecisionGroup) -> bool:
        """Whether none of the group's slots share a matrix, which cannot be changed for each."""
        addresses = {weight.data_ptr() for weight in self._weights(group.slots)}
        return len(addresses) == len(group.slots)

    def _shared_input_amax(
        self, group: DecisionGroup, percentile: float | None
    ) -> dict[SlotName, float]:
        """Largest input magnitude over each input set, for all its members."""
        shared: dict[SlotName, float] = {}
        for names in group.input_sets:
            entries = [self.statistics[name] for name in names]
            amax = max(scaled_input_amax(entry, None, percentile) for entry in entries)
            shared.update(dict.fromkeys(names, amax))
        return shared

    def _input_scale(
        self, members: Sequence[SlotName], fmt: QuantFormat, importance: Tensor | None
    ) -> Tensor | None:
        if not self.places.take(members[0], fmt):
            return None
        weights, statistics = self._weights(members), self.statistics[members[0]]
        options: Any = {"scale_dtype": self.scale_dtype, "container": self.container}
        algorithm = fmt.algorithm(self.method)
        if algorithm.input_scaling is InputScaling.SMOOTH:
            strength = algorithm.smooth_strength
            return search_smoothing_scale(weights, statistics, fmt, strength=strength, **options)
        return search_input_scale(weights, statistics, fmt, importance=importance, **options)
