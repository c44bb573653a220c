"""Plain data of calibration, as the store keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.formats import FormatName
from autoq.layers import LayerCalibration, LowRank
from autoq.layers.low_rank import DOWN, UP
from autoq.models import SlotName

CalibrationTable = Mapping[tuple[SlotName, FormatName], LayerCalibration]


def calibration_to_plain(
    table: CalibrationTable,
) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """(one JSON record per slot and format, the input scales, importances and codes by name).

    Slots that share one importance in memory share it in the store.
    """
    records = []
    arrays: dict[str, NDArray[Any]] = {}
    names_of_importances: dict[int, str] = {}
    for (slot, fmt), calibration in table.items():
        scale, importance = calibration.pre_quant_scale, calibration.importance
        if scale is not None:
            arrays[_scale_name(slot, fmt)] = scale.numpy(force=True)
        name = None
        if importance is not None:
            name = names_of_importances.setdefault(id(importance), f"importance|{slot}|{fmt}")
            arrays.setdefault(name, importance.numpy(force=True))
        if calibration.codes is not None:
            arrays[_codes_name(slot, fmt)] = calibration.codes.numpy(force=True)
        block_scale = calibration.block_scale
        if block_scale is not None:
            arrays[_block_scale_name(slot, fmt)] = _without_float8(block_scale).numpy(force=True)
        branch = calibration.low_rank
        if branch is not None:
            for part, factor in branch.tensors().items():
                arrays[_factor_name(part, slot, fmt)] = _as_bits(factor)
        records.append(
            {
                "slot": slot,
                "format": fmt,
                "weight_amax": calibration.weight_amax,
                "input_amax": calibration.input_amax,
                "has_input_scale": scale is not None,
                "folds_into": calibration.folds_into,
                "importance": name,
                "has_codes": calibration.codes is not None,
                "block_scale": None if block_scale is None else _dtype_name(block_scale),
                "low_rank": None if branch is None else _dtype_name(branch.down),
                "input_rows": calibration.input_rows,
            }
        )
    return records, arrays


def calibration_from_plain(
    records: list[dict[str, Any]], arrays: Mapping[str, NDArray[Any]]
) -> dict[tuple[SlotName, FormatName], LayerCalibration]:
    """The table that `calibration_to_plain` was given; records of older stores name no importance."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    return {key_of(record): entry_from_plain(record, tensors.__getitem__) for record in records}


def key_of(record: Mapping[str, Any]) -> tuple[SlotName, FormatName]:
    """Slot and format of a record."""
    return SlotName(record["slot"]), FormatName(record["format"])


def array_names(record: Mapping[str, Any]) -> list[str]:
    """Names of the arrays that `entry_from_plain` asks for."""
    slot, fmt = key_of(record)
    found = [] if record.get("importance") is None else [str(record["importance"])]
    if record["has_input_scale"]:
        found.append(_scale_name(slot, fmt))
    if record.get("has_codes"):
        found.append(_codes_name(slot, fmt))
    if record.get("block_scale") is not None:
        found.append(_block_scale_name(slot, fmt))
    if record.get("low_rank") is not None:
        found += [_factor_name(part, slot, fmt) for part in (DOWN, UP)]
    return found


def entry_without_arrays(record: Mapping[str, Any]) -> LayerCalibration:
    """The calibration of one record as far as the record has it."""
    return LayerCalibration(
        weight_amax=record["weight_amax"],
        input_amax=record["input_amax"],
        folds_into=record["folds_into"],
        input_rows=record.get("input_rows"),
    )


def entry_from_plain(
    record: Mapping[str, Any], tensor: Callable[[str], Tensor]
) -> LayerCalibration:
    """The calibration of one record.

    Args:
        tensor: name of an array -> what is stored under it.
    """
    slot, fmt = key_of(record)
    importance = record.get("importance")
    return LayerCalibration(
        weight_amax=record["weight_amax"],
        input_amax=record["input_amax"],
        pre_quant_scale=tensor(_scale_name(slot, fmt)) if record["has_input_scale"] else None,
        folds_into=record["folds_into"],
        importance=None if importance is None else tensor(importance),
        codes=tensor(_codes_name(slot, fmt)) if record.get("has_codes") else None,
        block_scale=_block_scale(record, tensor),
        low_rank=_branch(record, tensor),
        input_rows=record.get("input_rows"),
    )


def _branch(record: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> LowRank | None:
    if record.get("low_rank") is None:
        return None
    dtype = getattr(torch, record["low_rank"])
    slot, fmt = record["slot"], record["format"]
    names = [_factor_name(part, slot, fmt) for part in (DOWN, UP)]
    return LowRank(*(tensor(name).view(dtype) for name in names))


def _block_scale(record: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> Tensor | None:
    if record.get("block_scale") is None:
        return None
    stored = tensor(_block_scale_name(record["slot"], record["format"]))
    return stored.view(getattr(torch, record["block_scale"]))


def _without_float8(scale: Tensor) -> Tensor:
    """numpy has no float8."""
    return scale.contiguous().view(torch.uint8) if scale.element_size() == 1 else scale


def _as_bits(factor: Tensor) -> NDArray[Any]:
    """numpy has no bfloat16."""
    bits: NDArray[Any] = factor.contiguous().view(torch.int16).numpy(force=True)
    return bits


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _factor_name(part: str, slot: SlotName, fmt: FormatName) -> str:
    return f"{part}|{slot}|{fmt}"


def _scale_name(slot: SlotName, fmt: FormatName) -> str:
    return f"input_scale|{slot}|{fmt}"


def _block_scale_name(slot: SlotName, fmt: FormatName) -> str:
    return f"block_scale|{slot}|{fmt}"


def _codes_name(slot: SlotName, fmt: FormatName) -> str:
    return f"codes|{slot}|{fmt}"
