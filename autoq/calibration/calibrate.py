"""From input statistics and weights to the scales of every layer in every format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoq.calibration.awq import search_input_scale
from autoq.calibration.folding import find_folds
from autoq.calibration.scales import (
    mean_square,
    scaled_importance,
    scaled_input_amax,
    scaled_weight_amax,
    sharing_sets,
)
from autoq.calibration.statistics import InputStatistics, collect_statistics
from autoq.formats import FORMATS, NONE, CalibrationMethod, FormatName, QuantFormat
from autoq.layers import LayerCalibration
from autoq.layers.quantize import Container
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
    method: CalibrationMethod = CalibrationMethod.BEST,
    after_batch: Callable[[], None] = lambda: None,
    after_group: Callable[[], None] = lambda: None,
) -> dict[tuple[SlotName, FormatName], LayerCalibration]:
    """Calibrate every slot in every format it can take, in one pass over `batches`.

    Args:
        formats: names of the formats; "none" needs no calibration and is skipped.
        run: runs the model on one batch.
        run_small: runs the model on some small input and returns its output; used to find out
            where an input scale folds exactly.
        container: input scales that do not fold are searched only where it can store them.
        scale_dtype: the dtype in which the checkpoint stores INT4 group scales.
        method: which of each format's algorithms is meant.
        after_batch: called after every batch, for progress.
        after_group: called when a group is calibrated in one format, for progress.
    Raises:
        ModelError: an input holds NaN or Inf on calibration data; names the layer.
    """
    quantised = [FORMATS[name] for name in formats if name != NONE]
    scaling = [fmt for fmt in quantised if fmt.algorithm(method).searches_input_scales]
    folds = find_folds(model, model_map, run_small) if scaling else {}
    statistics = collect_statistics(
        model,
        model_map,
        batches,
        run,
        batch_count=len(batches),
        keep_rows_of={
            name
            for name in model_map.slots
            if any(_has_place_for_scale(name, fmt, container, folds) for fmt in scaling)
        },
        after_batch=after_batch,
    )
    calibrator = _Calibrator(model, model_map, statistics, folds, container, scale_dtype, method)
    table: dict[tuple[SlotName, FormatName], LayerCalibration] = {}
    with torch.no_grad():
        for fmt in quantised:
            for group in model_map.groups:
                table.update(calibrator.calibrate_group(group, fmt))
                after_group()
    return table


def _has_place_for_scale(
    name: SlotName, fmt: QuantFormat, container: Container, folds: Mapping[SlotName, str]
) -> bool:
    """Whether an input scale of the slot can be written: into a norm, or beside the weight."""
    is_stored = fmt.stores_input_scale and container is not Container.COMPRESSED_TENSORS
    return is_stored or name in folds


@dataclass(frozen=True, slots=True)
class _Calibrator:
    """Everything that calibrating one group in one format needs."""

    model: nn.Module
    model_map: ModelMap
    statistics: Mapping[SlotName, InputStatistics]
    folds: Mapping[SlotName, str]
    container: Container
    scale_dtype: torch.dtype
    method: CalibrationMethod

    def calibrate_group(
        self, group: DecisionGroup, fmt: QuantFormat
    ) -> Iterator[tuple[tuple[SlotName, FormatName], LayerCalibration]]:
        slots = [self.model_map.slots[name] for name in group.slots]
        if any(fmt.refusal(slot.out_features, slot.in_features) for slot in slots):
            return
        algorithm = fmt.algorithm(self.method)
        searches = algorithm.searches_input_scales and self._scalable(group)
        shared_amax = self._shared_input_amax(group)
        importance = self._importance(group) if algorithm.weighs_errors else {}
        for members in sharing_sets(group):
            own = importance.get(members[0])
            scale = self._input_scale(members, fmt, own) if searches else None
            calibration = self._calibrate_set(members, fmt, scale, shared_amax, own)
            for name in members:
                yield (name, fmt.name), calibration

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
            input_amax = scaled_input_amax(self.statistics[first], scale)
        importance = scaled_importance(importance, scale)
        weights = self._weights(members)
        return LayerCalibration(
            weight_amax=scaled_weight_amax(weights, scale, fmt, self.scale_dtype, importance),
            input_amax=input_amax,
            pre_quant_scale=scale,
            folds_into=self.folds.get(first) if scale is not None else None,
            importance=importance,
            input_rows=self.statistics[first].row_count,
        )

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
        # A matrix that several slots share cannot be divided by the scale of each.
        addresses = {weight.data_ptr() for weight in self._weights(group.slots)}
        return len(addresses) == len(group.slots)

    def _shared_input_amax(self, group: DecisionGroup) -> dict[SlotName, float]:
        """Largest input magnitude over each input set, for all its members."""
        shared: dict[SlotName, float] = {}
        for names in group.input_sets:
            amax = max(scaled_input_amax(self.statistics[name], None) for name in names)
            shared.update(dict.fromkeys(names, amax))
        return shared

    def _input_scale(
        self, members: Sequence[SlotName], fmt: QuantFormat, importance: Tensor | None
    ) -> Tensor | None:
        if not _has_place_for_scale(members[0], fmt, self.container, self.folds):
            return None
        return search_input_scale(
            self._weights(members),
            self.statistics[members[0]],
            fmt,
            scale_dtype=self.scale_dtype,
            container=self.container,
            importance=importance,
        )
