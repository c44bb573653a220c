"""A model with a plan, as the tensors that its checkpoint holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.export._folding import Calibrations, fold, folded_scales, stored_scale
from autoq.export._fp8_manifest import stored_name
from autoq.export._kv_cache import ExportedCache, cache_refusal, cache_tensors
from autoq.export._names import (
    CheckpointNames,
    checkpoint_tensors,
    linear_modules,
    unquantized_groups,
)
from autoq.export._packing import packed_tensors
from autoq.export._types import Spelling
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import LayerCalibration, QuantizedWeight
from autoq.layers.quantize import Container, quantize_weight
from autoq.models import ModelMap, SlotName, WeightSlot
from autoq.models.weights import slot_weight


@dataclass(frozen=True)
class ExportPlan:
    """What is to be written: original weights, a format for every slot, and its calibration."""

    model: nn.Module
    model_map: ModelMap
    slot_formats: Mapping[SlotName, FormatName]
    calibration: Calibrations
    container: Container
    scale_dtype: torch.dtype
    spelling: Spelling = field(default=Spelling.OWN, kw_only=True)
    kv_cache: ExportedCache | None = field(default=None, kw_only=True)

    @cached_property
    def names(self) -> CheckpointNames:
        """Where everything stands in the checkpoint."""
        return checkpoint_names(self.model, self.model_map)

    @cached_property
    def module_formats(self) -> dict[str, FormatName]:
        """Checkpoint module -> format, for everything linear."""
        return self.names.module_formats(self.slot_formats)

    @cached_property
    def quantized_slots(self) -> list[WeightSlot]:
        """Slots that are not "none"."""
        slots = self.model_map.slots.items()
        return [slot for name, slot in slots if self.slot_formats.get(name, NONE) != NONE]

    def entry(self, slot: WeightSlot) -> LayerCalibration:
        """Calibration of a quantised slot in its format."""
        return self.calibration[slot.name, self.slot_formats[slot.name]]

    def matrix(self, slot: WeightSlot) -> Tensor:
        """The slot's original weight [out_features, in_features]."""
        return slot_weight(self.model, slot)

    def quantize(self, slot: WeightSlot) -> QuantizedWeight:
        """Codes and scales of a slot's weight.

        Raises:
            ModelError: it holds NaN or infinity; the message names the slot.
        """
        fmt = FORMATS[self.slot_formats[slot.name]]
        try:
            return quantize_weight(
                self.matrix(slot), fmt, self.entry(slot), scale_dtype=self.scale_dtype
            )
        except ModelError as error:
            raise ModelError(f"{slot.name}: {error}") from error

    def packed(self, slot: WeightSlot, weight: QuantizedWeight) -> Iterator[tuple[str, Tensor]]:
        """Name in the checkpoint -> tensor, for one quantised slot."""
        entry = self.entry(slot)
        for part in self.names.parts(slot.name):
            tensors = packed_tensors(
                weight,
                entry,
                first_row=part.first_row,
                rows=part.rows,
                container=self.container,
                kind=slot.kind,
                storage_dtype=self.scale_dtype,
                pre_quant_scale=self.written_pre_quant_scale(slot, entry),
            )
            for suffix, tensor in tensors.items():
                is_own = self.spelling is Spelling.OWN
                yield f"{part.module}.{suffix if is_own else stored_name(suffix)}", tensor

    @property
    def cache_format(self) -> FormatName:
        """Of the key/value cache in all layers."""
        return NONE if self.kv_cache is None else self.kv_cache.format

    def cache_scales(self) -> dict[str, Tensor]:
        """Name in the checkpoint -> scale of a layer's keys or values; none where neither has one."""
        if self.kv_cache is None or self.cache_format == NONE:
            return {}
        modules = {path: self.names.module(path) for path in linear_modules(self.model)}
        return cache_tensors(self.kv_cache, modules, self.container)

    def cache_refusals(self) -> list[str]:
        """Why the container cannot hold the cache; empty if it can."""
        if self.kv_cache is None:
            return []
        reason = cache_refusal(self.kv_cache.formats.values(), self.container)
        if reason is None and self.cache_format != NONE and not self.quantized_slots:
            reason = (
                "a checkpoint with no quantised layer has no manifest to state the key/value cache's "
                "format in; quantise a layer, or search without --kv-formats"
            )
        return [] if reason is None else [reason]

    def unquantized_groups(self) -> Iterator[Mapping[str, Tensor]]:
        """Model name -> tensor for everything that is stored as it is, a layer at a time."""
        return unquantized_groups(self.model, self.model_map, self.quantized_slots)

    def folded(self, group: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Checkpoint name -> tensor, AWQ scales in the norms, and how many tensors have one."""
        folds = folded_scales(self.slot_formats, self.calibration)
        pairs = {name: fold(name, tensor, folds) for name, tensor in group.items()}
        tensors = checkpoint_tensors(self.model, {name: pair[0] for name, pair in pairs.items()})
        return tensors, sum(is_folded for _, is_folded in pairs.values())

    def written_pre_quant_scale(self, slot: WeightSlot, entry: LayerCalibration) -> Tensor | None:
        """The input scale that stands beside the slot's weight; None where there is none.

        TensorRT-LLM demands one of every AWQ linear that it does not fuse, of ones too.
        """
        scale = stored_scale(entry)
        is_demanded = (
            self.container is Container.MODELOPT
            and FORMATS[self.slot_formats[slot.name]].stores_input_scale
            and slot.name not in self._fused
        )
        return torch.ones(slot.in_features) if scale is None and is_demanded else scale

    @cached_property
    def _fused(self) -> set[SlotName]:
        sets = [fused for group in self.model_map.groups for fused in group.fusion_sets]
        return {name for fused in sets for name in fused}


_known_names: MutableMapping[nn.Module, tuple[ModelMap, CheckpointNames]] = (
    weakref.WeakKeyDictionary()
)


def checkpoint_names(model: nn.Module, model_map: ModelMap) -> CheckpointNames:
    """The names of a model, found once: whether a plan can be written is asked for every group.

    Raises:
        ExportError: a module's weight is not one tensor in the checkpoint.
        ModelError: how the experts are spelled is not known.
    """
    known = _known_names.get(model)
    if known is None or known[0] is not model_map:
        known = (model_map, CheckpointNames(model, model_map))
        _known_names[model] = known
    return known[1]
