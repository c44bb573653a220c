"""Calibration without the input scales that a container cannot store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from autoq.calibration.scales import scaled_importance, scaled_weight_amax
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import LayerCalibration
from autoq.models import ModelMap, SlotName, WeightSlot
from autoq.models.weights import slot_weight


def without_unfolded_scales(
    model: nn.Module,
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration],
    scale_dtype: torch.dtype,
) -> tuple[dict[tuple[SlotName, FormatName], LayerCalibration], list[SlotName]]:
    """Plain rounding for every slot whose input scale no norm absorbs; needs no data.

    Only for containers whose engines scale the inputs of such layers at run time: the calibrated
    `input_amax` stays that of the scaled input.

    Returns:
        The calibration, and the slots that lost their input scale.
    """
    changed = plain_entries(
        partial(slot_weight, model), model_map, slot_formats, calibration, scale_dtype
    )
    table = {**calibration, **changed}
    return table, [slot for slot, _ in changed]


def plain_entries(
    weight_of: Callable[[WeightSlot], Tensor],
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration],
    scale_dtype: torch.dtype,
) -> dict[tuple[SlotName, FormatName], LayerCalibration]:
    """What `without_unfolded_scales` changes; of a model that need not be in memory.

    Args:
        weight_of: a slot -> its weight [out_features, in_features].
        calibration: entries are looked up one by one.
    """
    changed: dict[tuple[SlotName, FormatName], LayerCalibration] = {}
    fusion_set_of = {
        name: names for group in model_map.groups for names in group.fusion_sets for name in names
    }
    for name, fmt in slot_formats.items():
        entry = calibration[name, fmt] if fmt != NONE else None
        if entry is None or entry.pre_quant_scale is None or entry.folds_into is not None:
            continue
        members = fusion_set_of.get(name, (name,))
        weights = [weight_of(model_map.slots[member]) for member in members]
        importance = scaled_importance(entry.importance, entry.pre_quant_scale.reciprocal())
        amax = scaled_weight_amax(weights, None, FORMATS[fmt], scale_dtype, importance)
        changed[name, fmt] = replace(
            entry,
            weight_amax=amax,
            pre_quant_scale=None,
            importance=importance,
            block_scale=None,
            codes=None,
        )
    return changed
