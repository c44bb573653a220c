"""AWQ scales that are multiplied into the norm before their layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autoq.formats import NONE, FormatName
from autoq.layers import LayerCalibration
from autoq.models import ModelMap, SlotName

Calibrations = Mapping[tuple[SlotName, FormatName], LayerCalibration]


def folded_scales(
    slot_formats: Mapping[SlotName, FormatName], calibration: Calibrations
) -> dict[str, tuple[SlotName, Tensor]]:
    """Path of a norm -> the first slot that folds into it, and the scale float32 [features]."""
    folds: dict[str, tuple[SlotName, Tensor]] = {}
    for slot, fmt in slot_formats.items():
        entry = calibration.get((slot, fmt))
        if fmt != NONE and entry is not None and has_folded_scale(entry):
            assert entry.folds_into is not None and entry.pre_quant_scale is not None
            folds.setdefault(entry.folds_into, (slot, entry.pre_quant_scale))
    return folds


def has_folded_scale(entry: LayerCalibration) -> bool:
    """Whether the layer's scale goes into a norm."""
    return entry.pre_quant_scale is not None and entry.folds_into is not None


def stored_scale(entry: LayerCalibration) -> Tensor | None:
    """The scale that has to be written beside the weight because no norm takes it."""
    return entry.pre_quant_scale if entry.folds_into is None else None


def fold(
    name: str, tensor: Tensor, folds: Mapping[str, tuple[SlotName, Tensor]]
) -> tuple[Tensor, bool]:
    """The tensor of that name with its norm's scale in it, and whether there is one.

    Scales are powers of two, so the product is exact unless it leaves the dtype's range.
    """
    module, _, parameter = name.rpartition(".")
    if module not in folds or parameter not in ("weight", "bias"):
        return tensor, False
    scale = folds[module][1].to(tensor.device)
    return (tensor.float() * scale).to(tensor.dtype), True


def folding_refusals(
    model: nn.Module,
    model_map: ModelMap,
    slot_formats: Mapping[SlotName, FormatName],
    calibration: Calibrations,
) -> list[str]:
    """Why scales cannot be folded as calibration says, a line per norm."""
    folds = folded_scales(slot_formats, calibration)
    lines = [line for norm, (_, scale) in folds.items() for line in _inexact(model, norm, scale)]
    for slot, fmt in slot_formats.items():
        entry = calibration.get((slot, fmt))
        if fmt == NONE or entry is None or not has_folded_scale(entry):
            continue
        assert entry.folds_into is not None and entry.pre_quant_scale is not None
        first, scale = folds[entry.folds_into]
        if not torch.equal(entry.pre_quant_scale, scale):
            lines.append(
                f"a norm takes one AWQ scale, and {first} and {slot} fold different ones into "
                f"{entry.folds_into}; calibrate them together"
            )
    return lines


def _inexact(model: nn.Module, norm: str, scale: Tensor) -> list[str]:
    try:
        module = model.get_submodule(norm)
    except AttributeError:
        return [f"an AWQ scale folds into a norm of the model, and {norm} is none"]
    return [
        f"the AWQ scale must fold into {norm}.{name} exactly, and the product leaves the range of "
        f"{str(parameter.dtype).removeprefix('torch.')}; use another format there"
        for name, parameter in module.named_parameters(recurse=False)
        # One without values is looked at when it is folded.
        if not (parameter.is_meta or _is_exact(parameter.detach(), scale))
    ]


def _is_exact(parameter: Tensor, scale: Tensor) -> bool:
    scale = scale.to(parameter.device)
    product = (parameter.float() * scale).to(parameter.dtype)
    return torch.equal(product.float() / scale, parameter.float())
