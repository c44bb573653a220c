"""INT4 as the containers store it."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts._types import (
    F32,
    MODEL_DTYPES,
    SCALAR,
    U8,
    Layout,
    LayoutKey,
    TensorRule,
    Tensors,
    amax_of,
    codes,
    config_group,
    no_amaxes,
)
from autoq.export._layouts.fp8 import E4M3_DYNAMIC_TOKEN
from autoq.formats import Container, FormatName
from autoq.kernels import fp8, int4, w4a8
from autoq.layers import LayerCalibration

_INT4_GROUP_128 = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": 128,
    "symmetric": True,
    "dynamic": False,
}


def _pack_modelopt_w4a8(
    part: Tensors, calibration: LayerCalibration, _: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight": int4.pack_rows(part["codes"]),
        "weight_scale": part["group_scale"],
        "weight_scale_2": part["tensor_scale"],
        "input_scale": fp8.tensor_scale(calibration.input_amax),
    }


def _pack_compressed(
    part: Tensors, _: LayerCalibration, storage_dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight_packed": int4.pack_columns(part["codes"]),
        "weight_scale": part["group_scale"].to(storage_dtype),
        "weight_shape": torch.tensor(part["codes"].shape, dtype=torch.int64),
    }


def _unpack_modelopt_w4a8(stored: Tensors) -> dict[str, Tensor]:
    return {
        "codes": int4.unpack_rows(stored["weight"].contiguous()),
        "group_scale": stored["weight_scale"],
        "tensor_scale": stored["weight_scale_2"],
    }


def _unpack_compressed_w4a8(stored: Tensors) -> dict[str, Tensor]:
    tensors = _unpack_compressed(stored)
    return {**tensors, "tensor_scale": w4a8.tensor_scale(int4.pack(**tensors))}


def _modelopt_w4a8_amaxes(stored: Tensors, unpacked: Tensors) -> tuple[float, float]:
    weight_amax = amax_of(unpacked["tensor_scale"], fp8.LARGEST)
    return weight_amax, amax_of(stored["input_scale"], fp8.LARGEST)


def _compressed_w4a8_amaxes(_: Tensors, unpacked: Tensors) -> tuple[float, float]:
    return amax_of(unpacked["tensor_scale"], fp8.LARGEST), 0.0


def _pack_modelopt_awq(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    return {"weight": int4.pack_rows(part["codes"]), "weight_scale": part["group_scale"]}


def _unpack_modelopt_awq(stored: Tensors) -> dict[str, Tensor]:
    return {
        "codes": int4.unpack_rows(stored["weight"].contiguous()),
        "group_scale": stored["weight_scale"],
    }


def _unpack_compressed(stored: Tensors) -> dict[str, Tensor]:
    return {
        "codes": int4.unpack_columns(stored["weight_packed"]),
        "group_scale": stored["weight_scale"].float(),
    }


_MODELOPT_ENTRY = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
_MODELOPT_TENSORS = {
    "weight": codes(U8, lambda n, k: (n // 2, k)),
    "weight_scale": TensorRule(F32, lambda n, k: (n, k // 128)),
    "pre_quant_scale": TensorRule(MODEL_DTYPES, lambda n, k: (k,), optional=True),
}
_COMPRESSED_TENSORS = {
    "weight_packed": codes((torch.int32,), lambda n, k: (n, k // 8)),
    "weight_scale": TensorRule(MODEL_DTYPES, lambda n, k: (n, k // 128)),
    "weight_shape": codes((torch.int64,), lambda n, k: (2,)),
}

WITHOUT_INT4: dict[LayoutKey, str] = {
    (container, FormatName("int4_dq")): (
        f"{container} has no place for scales in 8 bits under a second level of scales, nor has any "
        "container: take int4_awq, whose groups have plain scales"
    )
    for container in Container
}

INT4: dict[LayoutKey, Layout] = {
    (Container.MODELOPT, FormatName("int4_awq")): Layout(
        manifest={"quant_algo": "W4A16_AWQ", **_MODELOPT_ENTRY},
        tensors=_MODELOPT_TENSORS,
        pack=_pack_modelopt_awq,
        unpack=_unpack_modelopt_awq,
        amaxes=no_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("int4_awq")): Layout(
        manifest=config_group("pack-quantized", _INT4_GROUP_128, None),
        tensors=_COMPRESSED_TENSORS,
        pack=_pack_compressed,
        unpack=_unpack_compressed,
        amaxes=no_amaxes,
    ),
    (Container.MODELOPT, FormatName("w4a8_awq")): Layout(
        manifest={"quant_algo": "W4A8_AWQ", **_MODELOPT_ENTRY},
        tensors={**_MODELOPT_TENSORS, "weight_scale_2": SCALAR, "input_scale": SCALAR},
        pack=_pack_modelopt_w4a8,
        unpack=_unpack_modelopt_w4a8,
        amaxes=_modelopt_w4a8_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("w4a8_awq")): Layout(
        manifest=config_group("pack-quantized", _INT4_GROUP_128, E4M3_DYNAMIC_TOKEN),
        tensors=_COMPRESSED_TENSORS,
        pack=_pack_compressed,
        unpack=_unpack_compressed_w4a8,
        amaxes=_compressed_w4a8_amaxes,
    ),
}
