"""INT8 as compressed-tensors stores it; no engine reads it from the modelopt container."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts._types import (
    F32,
    MODEL_DTYPES,
    Layout,
    LayoutKey,
    TensorRule,
    Tensors,
    codes,
    config_group,
    no_amaxes,
)
from autoq.formats import Container, FormatName
from autoq.kernels import int8
from autoq.layers import LayerCalibration

_INT8_CHANNEL = {
    "num_bits": 8,
    "type": "int",
    "strategy": "channel",
    "symmetric": True,
    "dynamic": False,
}
_INT8_DYNAMIC_TOKEN = {**_INT8_CHANNEL, "strategy": "token", "dynamic": True}


def _pack(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    return {"weight": part["codes"], "weight_scale": part["scale"]}


def _unpack(stored: Tensors) -> dict[str, Tensor]:
    return {"codes": stored["weight"], "scale": stored["weight_scale"]}


def _pack_words(
    part: Tensors, _: LayerCalibration, storage_dtype: torch.dtype
) -> dict[str, Tensor]:
    return {
        "weight_packed": int8.pack_columns(part["codes"]),
        "weight_scale": part["scale"].to(storage_dtype),
        "weight_shape": torch.tensor(part["codes"].shape, dtype=torch.int64),
    }


def _unpack_words(stored: Tensors) -> dict[str, Tensor]:
    return {
        "codes": int8.unpack_columns(stored["weight_packed"]),
        "scale": stored["weight_scale"].float(),
    }


INT8: dict[LayoutKey, Layout] = {
    (Container.COMPRESSED_TENSORS, FormatName("int8_sq")): Layout(
        manifest=config_group("int-quantized", _INT8_CHANNEL, _INT8_DYNAMIC_TOKEN),
        tensors={
            "weight": codes((torch.int8,), lambda n, k: (n, k)),
            "weight_scale": TensorRule(F32, lambda n, k: (n, 1)),
        },
        pack=_pack,
        unpack=_unpack,
        amaxes=no_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("int8_wo")): Layout(
        manifest=config_group("pack-quantized", _INT8_CHANNEL, None),
        tensors={
            "weight_packed": codes((torch.int32,), lambda n, k: (n, k // 4)),
            "weight_scale": TensorRule(MODEL_DTYPES, lambda n, k: (n, 1)),
            "weight_shape": codes((torch.int64,), lambda n, k: (2,)),
        },
        pack=_pack_words,
        unpack=_unpack_words,
        amaxes=no_amaxes,
    ),
}

WITHOUT_INT8: dict[LayoutKey, str] = {
    (Container.MODELOPT, FormatName("int8_sq")): (
        "no engine reads INT8 weights from modelopt checkpoints: TensorRT-LLM parses "
        "W8A8_SQ_PER_CHANNEL and then refuses it, the others build the layer unquantised; "
        "compressed-tensors holds it for vLLM, SGLang and transformers"
    ),
    (Container.MODELOPT, FormatName("int8_wo")): (
        "no engine reads INT8 weights from modelopt checkpoints; compressed-tensors holds them for "
        "vLLM, SGLang and transformers"
    ),
}
