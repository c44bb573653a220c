"""NVFP4 as the containers store it."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts._types import (
    E4M3,
    ONE,
    SCALAR,
    U8,
    Layout,
    LayoutKey,
    TensorRule,
    Tensors,
    amax_of,
    codes,
    config_group,
)
from autoq.formats import Container, FormatName
from autoq.kernels import nvfp4
from autoq.layers import LayerCalibration

E2M1_CODES = codes(U8, lambda n, k: (n, k // 2))
_SCALES = TensorRule(E4M3, lambda n, k: (n, k // 16))
_LARGEST = 6.0 * 448.0

_E2M1_GROUP_16 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
}


def _pack_modelopt(
    part: Tensors, calibration: LayerCalibration, dtype: torch.dtype
) -> dict[str, Tensor]:
    weight = _pack_modelopt_weight(part, calibration, dtype)
    return {**weight, "input_scale": nvfp4.global_scale(calibration.input_amax)}


def _pack_compressed(
    part: Tensors, calibration: LayerCalibration, dtype: torch.dtype
) -> dict[str, Tensor]:
    inputs = nvfp4.global_scale(calibration.input_amax).reciprocal().reshape(1)
    weight = _pack_compressed_weight(part, calibration, dtype)
    return {**weight, "input_global_scale": inputs}


def _pack_modelopt_weight(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": part["codes"],
        "weight_scale": part["block_scale"],
        "weight_scale_2": part["global_scale"],
    }


def _pack_compressed_weight(
    part: Tensors, _: LayerCalibration, __: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight_packed": part["codes"],
        "weight_scale": part["block_scale"],
        "weight_global_scale": part["global_scale"].reciprocal().reshape(1),
    }


def _unpack_modelopt(stored: Tensors) -> dict[str, Tensor]:
    return {
        "codes": stored["weight"],
        "block_scale": stored["weight_scale"],
        "global_scale": stored["weight_scale_2"],
    }


def _unpack_compressed(stored: Tensors) -> dict[str, Tensor]:
    return {
        "codes": stored["weight_packed"],
        "block_scale": stored["weight_scale"],
        "global_scale": stored["weight_global_scale"].reciprocal().reshape(()),
    }


def _modelopt_amaxes(stored: Tensors, unpacked: Tensors) -> tuple[float, float]:
    return _amax(unpacked["global_scale"]), _amax(stored["input_scale"])


def _compressed_amaxes(stored: Tensors, unpacked: Tensors) -> tuple[float, float]:
    """Two reciprocals may lose the last bit."""
    return _amax(unpacked["global_scale"]), _amax(stored["input_global_scale"].reciprocal())


def _weight_amax(_: Tensors, unpacked: Tensors) -> tuple[float, float]:
    return _amax(unpacked["global_scale"]), 0.0


def _amax(scale: Tensor) -> float:
    return amax_of(scale, _LARGEST, nvfp4.global_scale)


NVFP4: dict[LayoutKey, Layout] = {
    (Container.MODELOPT, FormatName("nvfp4")): Layout(
        manifest={"quant_algo": "NVFP4", "group_size": 16},
        tensors={
            "weight": E2M1_CODES,
            "weight_scale": _SCALES,
            "weight_scale_2": SCALAR,
            "input_scale": SCALAR,
        },
        pack=_pack_modelopt,
        unpack=_unpack_modelopt,
        amaxes=_modelopt_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("nvfp4")): Layout(
        manifest=config_group(
            "nvfp4-pack-quantized", _E2M1_GROUP_16, {**_E2M1_GROUP_16, "dynamic": "local"}
        ),
        tensors={
            "weight_packed": E2M1_CODES,
            "weight_scale": _SCALES,
            "weight_global_scale": ONE,
            "input_global_scale": ONE,
        },
        pack=_pack_compressed,
        unpack=_unpack_compressed,
        amaxes=_compressed_amaxes,
    ),
    (Container.MODELOPT, FormatName("nvfp4_wo")): Layout(
        manifest={"quant_algo": "W4A16_NVFP4", "group_size": 16},
        tensors={"weight": E2M1_CODES, "weight_scale": _SCALES, "weight_scale_2": SCALAR},
        pack=_pack_modelopt_weight,
        unpack=_unpack_modelopt,
        amaxes=_weight_amax,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("nvfp4_wo")): Layout(
        manifest=config_group("nvfp4-pack-quantized", _E2M1_GROUP_16, None),
        tensors={
            "weight_packed": E2M1_CODES,
            "weight_scale": _SCALES,
            "weight_global_scale": ONE,
        },
        pack=_pack_compressed_weight,
        unpack=_unpack_compressed,
        amaxes=_weight_amax,
    ),
}
