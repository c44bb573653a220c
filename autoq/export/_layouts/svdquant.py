"""NVFP4 beside a branch of low rank, as ModelOpt stores it for language models.

ModelOpt 0.47 leaves the factors under the name of its quantiser, and has another name for them in
the checkpoints of diffusion models, which autoq does not write.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts._types import (
    ANY,
    MODEL_DTYPES,
    Layout,
    LayoutKey,
    TensorRule,
    Tensors,
    factor,
)
from autoq.export._layouts.nvfp4 import NVFP4
from autoq.formats import Container, FormatName
from autoq.layers import LayerCalibration
from autoq.layers.low_rank import DOWN, UP

_SVDQUANT, _PLAIN = FormatName("nvfp4_svdquant"), FormatName("nvfp4")
_RESIDUAL = NVFP4[Container.MODELOPT, _PLAIN]
STORED_DOWN, STORED_UP = (
    "weight_quantizer._svdquant_lora_a",
    "weight_quantizer._svdquant_lora_b",
)
"""What follows a module's name."""


def _pack(part: Tensors, calibration: LayerCalibration, dtype: torch.dtype) -> dict[str, Tensor]:
    residual = _RESIDUAL.pack(part, calibration, dtype)
    return {**residual, STORED_DOWN: part[DOWN], STORED_UP: part[UP]}


def _unpack(stored: Tensors) -> dict[str, Tensor]:
    return {**_RESIDUAL.unpack(stored), DOWN: stored[STORED_DOWN], UP: stored[STORED_UP]}


SVDQUANT: dict[LayoutKey, Layout] = {
    (Container.MODELOPT, _SVDQUANT): Layout(
        manifest={
            "quant_algo": "NVFP4_SVD",
            "group_size": 16,
            "has_zero_point": False,
            "pre_quant_scale": True,
        },
        tensors={
            **_RESIDUAL.tensors,
            STORED_DOWN: factor(lambda n, k: (ANY, k)),
            STORED_UP: factor(lambda n, k: (n, ANY)),
            "pre_quant_scale": TensorRule(MODEL_DTYPES, lambda n, k: (k,), optional=True),
        },
        pack=_pack,
        unpack=_unpack,
        amaxes=_RESIDUAL.amaxes,
    ),
}

WITHOUT_SVDQUANT: dict[LayoutKey, str] = {
    (Container.COMPRESSED_TENSORS, _SVDQUANT): (
        "it has no place for a branch of low rank; modelopt holds it, for autoq.load alone"
    ),
}
