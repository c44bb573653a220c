"""FP8 as the containers store it."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts._types import (
    E4M3_CODES,
    ONE,
    SCALAR,
    Layout,
    LayoutKey,
    Tensors,
    amax_of,
    config_group,
)
from autoq.formats import Container, FormatName
from autoq.kernels import fp8
from autoq.layers import LayerCalibration

E4M3_STATIC_TENSOR = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
E4M3_DYNAMIC_TOKEN = {**E4M3_STATIC_TENSOR, "strategy": "token", "dynamic": True}


def _pack_modelopt(
    part: Tensors, calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight": part["codes"],
        "weight_scale": part["scale"],
        "input_scale": fp8.tensor_scale(calibration.input_amax),
    }


def _pack_compressed(
    part: Tensors, calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight": part["codes"],
        "weight_scale": part["scale"].reshape(1),
        "input_scale": fp8.tensor_scale(calibration.input_amax).reshape(1),
    }


def _unpack(stored: Tensors) -> dict[str, Tensor]:
    return {"codes": stored["weight"], "scale": stored["weight_scale"].reshape(())}


def _amaxes(stored: Tensors, unpacked: Tensors) -> tuple[float, float]:
    return amax_of(unpacked["scale"], fp8.LARGEST), amax_of(stored["input_scale"], fp8.LARGEST)


FP8: dict[LayoutKey, Layout] = {
    (Container.MODELOPT, FormatName("fp8")): Layout(
        manifest={"quant_algo": "FP8"},
        tensors={"weight": E4M3_CODES, "weight_scale": SCALAR, "input_scale": SCALAR},
        pack=_pack_modelopt,
        unpack=_unpack,
        amaxes=_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("fp8")): Layout(
        manifest=config_group("float-quantized", E4M3_STATIC_TENSOR, E4M3_STATIC_TENSOR),
        tensors={"weight": E4M3_CODES, "weight_scale": ONE, "input_scale": ONE},
        pack=_pack_compressed,
        unpack=_unpack,
        amaxes=_amaxes,
    ),
}
