"""What engine checkpoints of TensorRT-LLM store of a matrix in each format, taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autoq.export._tensorrt_llm_layouts import ENGINE_LAYOUTS
from autoq.formats import NONE, FormatName
from autoq.kernels import int4

_Unpacker = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

_SCALE, _SCALE_2, _ROWS = "weights_scaling_factor", "weights_scaling_factor_2", "per_channel_scale"

LEAVES: Mapping[str, tuple[str, ...]] = {
    NONE: ("weight",),
    "fp8": ("weight", _SCALE),
    "fp8_pc_pt": ("weight", _ROWS),
    "nvfp4": ("weight", _SCALE, _SCALE_2),
    "int4_awq": ("weight", _SCALE),
    "w4a8_awq": ("weight", _SCALE, _SCALE_2),
    "int8_sq": ("weight", _ROWS),
}

UNPACKERS: Mapping[str, _Unpacker] = {
    NONE: lambda stored: {"weight": stored["weight"]},
    "fp8": lambda stored: {"codes": stored["weight"], "scale": stored[_SCALE].reshape(())},
    "fp8_pc_pt": lambda stored: {"codes": stored["weight"], "scale": stored[_ROWS].reshape(-1, 1)},
    "nvfp4": lambda stored: {
        "codes": stored["weight"],
        "block_scale": stored[_SCALE],
        "global_scale": stored[_SCALE_2].reshape(()),
    },
    "int4_awq": lambda stored: {
        "codes": int4.unpack_rows(stored["weight"].view(torch.uint8)),
        "group_scale": stored[_SCALE],
    },
    "w4a8_awq": lambda stored: {
        "codes": int4.unpack_rows(stored["weight"].view(torch.uint8)),
        "group_scale": stored[_SCALE],
        "tensor_scale": stored[_SCALE_2].reshape(()),
    },
    "int8_sq": lambda stored: {"codes": stored["weight"], "scale": stored[_ROWS].reshape(-1, 1)},
}

ALGORITHMS: Mapping[str, FormatName] = {
    layout.algorithm: fmt for fmt, layout in ENGINE_LAYOUTS.items()
}
