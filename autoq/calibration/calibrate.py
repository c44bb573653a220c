"""From input statistics and weights to the scales of every layer in every format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoq.calibration.awq import search_input_scale
from autoq.calibration.folding import find_folds
from autoq.calibration.scales import scaled_input_amax, scaled_weight_amax, sharing_sets
from autoq.calibration.statistics import InputStatistics, collect_statistics
from autoq.formats import FORMATS, NONE, CalibrationAlgorithm, FormatName, QuantFormat
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
        after_batch: called after every batch, for progress.
        after_group: called when a group is calibrated in one format, for progress.
    Raises:
        ModelError: an input holds NaN or Inf on calibration data; names the layer.
    """
    quantised = [FORMATS[name] for name in formats if name != NONE]
    searches_scales = any(fmt.calibration is CalibrationAlgorithm.AWQ_LITE for fmt in quantised)
    statistics = collect_statistics(
        model,
        model_map,
        batches,
        run,
        batch_count=len(batches),
        keep_rows=searches_scales,
        after_batch=after_batch,
    )
    folds = find_folds(model, model_map, run_small) if searches_scales else {}
    calibrator = _Calibrator(model, model_map, statistics, folds, container, scale_dtype)
    table: dict[tuple[SlotName, FormatName], LayerCalibration] = {}
    with torch.no_grad():
        for fmt in quantised:
            for group in model_map.groups:
                table.update(calibrator.calibrate_group(group, fmt))
                after_group()
    return table


@dataclass(frozen=True, slots=True)
class _Calibrator:
    """Everything that calibrating one group in one format needs."""

    model: nn.Module
    model_map: ModelMap
    statistics: Mapping[SlotName, InputStatistics]
    folds: Mapping[SlotName, str]
    container: Container
    scale_dtype: torch.dtype

    def calibrate_group(
        self, group: DecisionGroup, fmt: QuantFormat
    ) -> Iterator[tuple[tuple[SlotName, FormatName], LayerCalibration]]:
        slots = [self.model_map.slots[name] for name in group.slots]
        if any(fmt.refusal(slot.out_features, slot.in_features) for slot in slots):
            return
        searches = fmt.calibration is CalibrationAlgorithm.AWQ_LITE and self._scalable(group)
        shared_amax = self._shared_input_amax(group)
        for members in sharing_sets(group):
            scale = self._input_scale(members, fmt) if searches else None
            calibration = self._calibrate_set(members, fmt, scale, shared_amax)
            for name in members:
                yield (name, fmt.name), calibration

    def _calibrate_set(
        self,
        members: Sequence[SlotName],
        fmt: QuantFormat,
        scale: Tensor | None,
        shared_amax: Mapping[SlotName, float],
    ) -> LayerCalibration:
        first = members[0]  # the members share their statistics
        input_amax = shared_amax.get(first)
        if input_amax is None:
            input_amax = scaled_input_amax(self.statistics[first], scale)
        return LayerCalibration(
            weight_amax=scaled_weight_amax(self._weights(members), scale, fmt, self.scale_dtype),
            input_amax=input_amax,
            pre_quant_scale=scale,
            folds_into=self.folds.get(first) if scale is not None else None,
            input_rows=self.statistics[first].row_count,
        )

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

    def _input_scale(self, members: Sequence[SlotName], fmt: QuantFormat) -> Tensor | None:
        if self.container is Container.COMPRESSED_TENSORS and members[0] not in self.folds:
            return None
        return search_input_scale(
            self._weights(members),
            self.statistics[members[0]],
            fmt,
            scale_dtype=self.scale_dtype,
            container=self.container,
        )
