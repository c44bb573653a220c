"""Formats as TensorRT-LLM's engine checkpoints store them, and which they cannot hold.

The names are those before the engine builder's own preprocessing (`preprocess_weights` in
models/modeling_utils.py), which interleaves block scales and INT4 codes for the GPU itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from autoq.formats import FORMATS, NONE, FormatName
from autoq.kernels import int4
from autoq.layers import Container, LayerCalibration
from autoq.layers.quantize import input_scale

Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """How a linear of one format is stored."""

    algorithm: str  # quant_algo
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of QuantConfig
    pack: Callable[[Tensors], dict[str, Tensor]]
    """`QuantizedWeight.tensors` of one rank -> stored tensors."""
    pack_experts: Callable[[Tensors], dict[str, Tensor]] | None = None
    """The same of experts, whose tensors have a dimension more; None: not known to autoq."""
    input_scaling: str | None = None  # name of the stored scale of inputs
    input_multiplier: str | None = None  # of what inputs are multiplied by, one per column
    input_divisor: str | None = None  # of what inputs of `dense` and `proj` are divided by
    everywhere: bool = False  # the engine has whole layers of it, and no single linear


def _fp8(part: Tensors) -> dict[str, Tensor]:
    return {"weight": part["codes"], "weights_scaling_factor": part["scale"].reshape(1)}


def _fp8_rows(part: Tensors) -> dict[str, Tensor]:
    return {"weight": part["codes"], "per_channel_scale": part["scale"].squeeze(1)}


def _nvfp4(part: Tensors) -> dict[str, Tensor]:
    return {
        "weight": part["codes"],
        "weights_scaling_factor": part["block_scale"],
        "weights_scaling_factor_2": part["global_scale"].reshape(-1),
    }


def _fp8_experts(part: Tensors) -> dict[str, Tensor]:
    return {"weight": part["codes"], "weights_scaling_factor": part["scale"].reshape(-1, 1)}


def _int4(part: Tensors) -> dict[str, Tensor]:
    return {
        "weight": int4.pack_rows(part["codes"].contiguous()).view(torch.int8),
        "weights_scaling_factor": part["group_scale"],
    }


def _w4a8(part: Tensors) -> dict[str, Tensor]:
    return {**_int4(part), "weights_scaling_factor_2": part["tensor_scale"].reshape(1)}


def _int8_rows(part: Tensors) -> dict[str, Tensor]:
    return {"weight": part["codes"], "per_channel_scale": part["scale"].reshape(1, -1)}


_ACTIVATION = "activation_scaling_factor"
_PREQUANT = "prequant_scaling_factor"
_AWQ_OPTIONS = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}

ENGINE_LAYOUTS: Mapping[FormatName, EngineLayout] = {
    FormatName("fp8"): EngineLayout(
        algorithm="FP8", pack=_fp8, pack_experts=_fp8_experts, input_scaling=_ACTIVATION
    ),
    FormatName("nvfp4"): EngineLayout(
        algorithm="NVFP4",
        options={"group_size": 16},
        pack=_nvfp4,
        pack_experts=_nvfp4,
        input_scaling=_ACTIVATION,
    ),
    FormatName("int4_awq"): EngineLayout(
        algorithm="W4A16_AWQ", options=_AWQ_OPTIONS, pack=_int4, input_multiplier=_PREQUANT
    ),
    FormatName("w4a8_awq"): EngineLayout(
        algorithm="W4A8_AWQ",
        options=_AWQ_OPTIONS,
        pack=_w4a8,
        input_scaling=_ACTIVATION,
        input_multiplier=_PREQUANT,
    ),
    FormatName("fp8_pc_pt"): EngineLayout(
        algorithm="FP8_PER_CHANNEL_PER_TOKEN", pack=_fp8_rows, everywhere=True
    ),
    # W8A8_SQ_PER_CHANNEL scales inputs by a constant, which the search did not score.
    FormatName("int8_sq"): EngineLayout(
        algorithm="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
        pack=_int8_rows,
        input_divisor="smoother",
        everywhere=True,
    ),
}

WHOLE = ("scale",)
"""Tensors of `QuantizedWeight` that say something of rows alone: no rank has a part of their columns."""

NORM_SCALE = "scale_to_int"
"""A tensor of ones beside the norms of a model in int8_sq, which static scales would fill."""

_NOT_HELD: Mapping[str, str] = {
    "int8_wo": "the engine builder wants INT8 weights rearranged for the GPU that it runs on",
    "fp8_block": "the engine's layers of these families know no block scales of FP8",
    "nvfp4_svdquant": "the engine builder has no branch of low rank beside NVFP4",
    "nvfp4_wo": "the engine has no NVFP4 weights without NVFP4 inputs",
}


def engine_refusals(used: Iterable[FormatName]) -> list[str]:
    """Why the checkpoint cannot hold these formats, or not together, a line each."""
    formats = list(dict.fromkeys(used))
    held = ", ".join(ENGINE_LAYOUTS)
    lines = []
    for fmt in formats:
        if fmt != NONE and fmt not in ENGINE_LAYOUTS:
            reason = _NOT_HELD.get(fmt, "the engine has no such layers")
            lines.append(
                f"tensorrt-llm cannot hold {fmt}: {reason}; formats that it can hold: {held}"
            )
    for fmt in formats:
        if fmt in ENGINE_LAYOUTS and ENGINE_LAYOUTS[fmt].everywhere and len(formats) > 1:
            others = ", ".join(other for other in formats if other != fmt)
            lines.append(
                f"tensorrt-llm has {fmt} for all layers or none, and others are {others}; solve for "
                "one format, or search without it"
            )
    return lines


CACHES: Mapping[FormatName, str] = {FormatName("fp8"): "FP8", FormatName("int8"): "INT8"}
"""Format of the key/value cache -> its name in `kv_cache_quant_algo`."""


def quantization(
    formats: Mapping[str, FormatName],
    unquantized: Iterable[str] = (),
    cache: FormatName = NONE,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What config.json says of the formats, and quant_cfg.json where there are several.

    Args:
        formats: of every linear of the layers, by the engine's names on one stage.
        unquantized: other modules that stay as they are.
        cache: format of the key/value cache, one of `CACHES` or none.
    """
    stated = {"kv_cache_quant_algo": CACHES.get(cache)}
    used = sorted({fmt for fmt in formats.values() if fmt != NONE})
    if len(used) > 1:
        layers = {name: _entry(fmt) for name, fmt in formats.items() if fmt != NONE}
        head = {"quant_algo": "MIXED_PRECISION", **stated}
        return head, {**head, "quantized_layers": layers}
    if not used:
        return {"quant_algo": None, **stated}, None
    # Where nothing is named, the engine leaves out heads, embeddings and the last norm itself.
    left_out = [name for name, fmt in formats.items() if fmt == NONE]
    names = ["lm_head", "transformer.vocab_embedding", "transformer.ln_f", *left_out, *unquantized]
    is_whole = ENGINE_LAYOUTS[used[0]].everywhere
    single = {
        **_entry(used[0]),
        **stated,
        "exclude_modules": None if is_whole else names,
    }
    return single, None


def _entry(fmt: FormatName) -> dict[str, Any]:
    layout = ENGINE_LAYOUTS[fmt]
    return {"quant_algo": layout.algorithm, **layout.options}


def stored_input_scale(fmt: FormatName, calibration: LayerCalibration) -> Tensor | None:
    """The static scale of inputs, float32 [1]; None where they have none."""
    scale = input_scale(FORMATS[fmt], calibration, container=Container.MODELOPT)
    return None if scale is None else scale.reshape(1)
