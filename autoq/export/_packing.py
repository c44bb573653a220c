"""From codes and scales to the tensors of a container.

The tables here and in `_unpacking` are each other's inverse. A GPT-2 `Conv1D` keeps its weight as
[in, out] in its checkpoints and engines transpose whatever is called "weight" while loading, so
its codes are written transposed as well; scales never are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autoq.formats import FormatName
from autoq.kernels import fp8, int4, nvfp4
from autoq.layers import LayerCalibration, QuantizedWeight
from autoq.layers.quantize import Container
from autoq.models import SlotKind

Packer = Callable[[Mapping[str, Tensor], LayerCalibration, torch.dtype], dict[str, Tensor]]


def packed_tensors(
    weight: QuantizedWeight,
    calibration: LayerCalibration,
    *,
    first_row: int,
    rows: int,
    container: Container,
    kind: SlotKind,
    storage_dtype: torch.dtype,
    pre_quant_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of one module, by the part of their name after the module's.

    Args:
        weight: of the whole slot; rows `first_row` to `first_row + rows` go into this module.
        storage_dtype: the model's, for the scales that are stored in it.
        pre_quant_scale: float32 [in_features], to be written beside the others.
    """
    packer = _PACKERS[container, weight.format]
    part = {
        name: tensor[first_row : first_row + rows] if tensor.ndim == 2 else tensor
        for name, tensor in weight.tensors.items()
    }
    tensors = packer(part, calibration, storage_dtype)
    if pre_quant_scale is not None:
        tensors["pre_quant_scale"] = pre_quant_scale.to(storage_dtype)
    if kind is SlotKind.CONV1D:
        tensors["weight"] = tensors["weight"].T.contiguous()
    return tensors


def _modelopt_fp8(
    part: Mapping[str, Tensor], calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight": part["codes"],
        "weight_scale": part["scale"],
        "input_scale": fp8.tensor_scale(calibration.input_amax),
    }


def _modelopt_nvfp4(
    part: Mapping[str, Tensor], calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight": part["codes"],
        "weight_scale": part["block_scale"],
        "weight_scale_2": part["global_scale"],
        "input_scale": nvfp4.global_scale(calibration.input_amax),
    }


def _modelopt_w4a8(
    part: Mapping[str, Tensor], calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight": int4.pack_rows(part["codes"]),
        "weight_scale": part["group_scale"],
        "weight_scale_2": part["tensor_scale"],
        "input_scale": fp8.tensor_scale(calibration.input_amax),
    }


def _compressed_fp8(
    part: Mapping[str, Tensor], calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight": part["codes"],
        "weight_scale": part["scale"].reshape(1),
        "input_scale": fp8.tensor_scale(calibration.input_amax).reshape(1),
    }


def _compressed_nvfp4(
    part: Mapping[str, Tensor], calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight_packed": part["codes"],
        "weight_scale": part["block_scale"],
        "weight_global_scale": part["global_scale"].reciprocal().reshape(1),
        "input_global_scale": nvfp4.global_scale(calibration.input_amax).reciprocal().reshape(1),
    }


def _compressed_w4a8(
    part: Mapping[str, Tensor], _: LayerCalibration, storage_dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight_packed": int4.pack_columns(part["codes"]),
        "weight_scale": part["group_scale"].to(storage_dtype),
        "weight_shape": torch.tensor(part["codes"].shape, dtype=torch.int64),
    }


_PACKERS: Mapping[tuple[Container, FormatName], Packer] = {
    (Container.MODELOPT, FormatName("fp8")): _modelopt_fp8,
    (Container.MODELOPT, FormatName("nvfp4")): _modelopt_nvfp4,
    (Container.MODELOPT, FormatName("w4a8_awq")): _modelopt_w4a8,
    (Container.COMPRESSED_TENSORS, FormatName("fp8")): _compressed_fp8,
    (Container.COMPRESSED_TENSORS, FormatName("nvfp4")): _compressed_nvfp4,
    (Container.COMPRESSED_TENSORS, FormatName("w4a8_awq")): _compressed_w4a8,
}
