"""The microscaling formats as the containers store them."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts._types import (
    E4M3_CODES,
    U8,
    Layout,
    LayoutKey,
    TensorRule,
    Tensors,
    codes,
    config_group,
    no_amaxes,
)
from autoq.formats import Container, FormatName
from autoq.layers import LayerCalibration

_EXPONENTS = TensorRule(U8, lambda n, k: (n, k // 32))

_E4M3_GROUP_32 = {
    "num_bits": 8,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.uint8",
}
_E2M1_GROUP_32 = {**_E4M3_GROUP_32, "num_bits": 4}


def _pack(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    return {"weight": part["codes"], "weight_scale": part["block_scale"]}


def _unpack(stored: Tensors) -> dict[str, Tensor]:
    return {"codes": stored["weight"], "block_scale": stored["weight_scale"]}


def _pack_pairs(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    return {"weight_packed": part["codes"], "weight_scale": part["block_scale"]}


def _unpack_pairs(stored: Tensors) -> dict[str, Tensor]:
    return {"codes": stored["weight_packed"], "block_scale": stored["weight_scale"]}


MX: dict[LayoutKey, Layout] = {
    (Container.MODELOPT, FormatName("mxfp8")): Layout(
        manifest={"quant_algo": "MXFP8", "group_size": 32},
        tensors={"weight": E4M3_CODES, "weight_scale": _EXPONENTS},
        pack=_pack,
        unpack=_unpack,
        amaxes=no_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("mxfp8")): Layout(
        manifest=config_group(
            "mxfp8-quantized", _E4M3_GROUP_32, {**_E4M3_GROUP_32, "dynamic": True}
        ),
        tensors={"weight": E4M3_CODES, "weight_scale": _EXPONENTS},
        pack=_pack,
        unpack=_unpack,
        amaxes=no_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("mxfp4")): Layout(
        manifest=config_group(
            "mxfp4-pack-quantized", _E2M1_GROUP_32, {**_E2M1_GROUP_32, "dynamic": True}
        ),
        tensors={
            "weight_packed": codes(U8, lambda n, k: (n, k // 2)),
            "weight_scale": _EXPONENTS,
        },
        pack=_pack_pairs,
        unpack=_unpack_pairs,
        amaxes=no_amaxes,
    ),
}

WITHOUT_MX: dict[LayoutKey, str] = {
    (Container.MODELOPT, FormatName("mxfp4")): (
        "vLLM, SGLang and TensorRT-LLM know no MXFP4 linears in modelopt checkpoints; use "
        "--container compressed-tensors, or another format"
    ),
}
