"""FP8 as the containers store it."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts._types import (
    E4M3_CODES,
    F32,
    ONE,
    SCALAR,
    Layout,
    LayoutKey,
    TensorRule,
    Tensors,
    amax_of,
    config_group,
    no_amaxes,
)
from autoq.formats import Container, FormatName
from autoq.kernels import fp8
from autoq.kernels._scaling import blocks_of
from autoq.layers import LayerCalibration

E4M3_STATIC_TENSOR = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
E4M3_DYNAMIC_TOKEN = {**E4M3_STATIC_TENSOR, "strategy": "token", "dynamic": True}
_E4M3_CHANNEL = {**E4M3_STATIC_TENSOR, "strategy": "channel"}
_E4M3_BLOCK = {**E4M3_STATIC_TENSOR, "strategy": "block", "block_structure": [128, 128]}
_E4M3_DYNAMIC_GROUP = {
    **E4M3_STATIC_TENSOR,
    "strategy": "group",
    "group_size": 128,
    "dynamic": True,
}


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


def _pack_scales(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    """Inputs are scaled at run time, so nothing is stored for them."""
    return {"weight": part["codes"], "weight_scale": part["scale"]}


def _unpack_scales(stored: Tensors) -> dict[str, Tensor]:
    return {"codes": stored["weight"], "scale": stored["weight_scale"]}


def _pack_modelopt_rows(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    return {"weight": part["codes"], "weight_scale": part["scale"].squeeze(1)}


def _unpack_modelopt_rows(stored: Tensors) -> dict[str, Tensor]:
    return {"codes": stored["weight"], "scale": stored["weight_scale"].unsqueeze(1)}


def _pack_modelopt_blocks(part: Tensors, _: LayerCalibration, __: torch.dtype) -> dict[str, Tensor]:
    """The four dimensions are those of the weight seen as blocks, reduced to one value each."""
    return {"weight": part["codes"], "weight_scale": part["scale"][:, None, :, None]}


def _unpack_modelopt_blocks(stored: Tensors) -> dict[str, Tensor]:
    return {"codes": stored["weight"], "scale": stored["weight_scale"][:, 0, :, 0]}


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
    (Container.MODELOPT, FormatName("fp8_pc_pt")): Layout(
        manifest={"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        tensors={"weight": E4M3_CODES, "weight_scale": TensorRule(F32, lambda n, k: (n,))},
        pack=_pack_modelopt_rows,
        unpack=_unpack_modelopt_rows,
        amaxes=no_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("fp8_pc_pt")): Layout(
        manifest=config_group("float-quantized", _E4M3_CHANNEL, E4M3_DYNAMIC_TOKEN),
        tensors={"weight": E4M3_CODES, "weight_scale": TensorRule(F32, lambda n, k: (n, 1))},
        pack=_pack_scales,
        unpack=_unpack_scales,
        amaxes=no_amaxes,
    ),
    (Container.MODELOPT, FormatName("fp8_block")): Layout(
        # In lower case, as ModelOpt writes it: TensorRT-LLM knows no other spelling, vLLM any.
        manifest={"quant_algo": "fp8_pb_wo"},
        tensors={
            "weight": E4M3_CODES,
            "weight_scale": TensorRule(F32, lambda n, k: (blocks_of(n), 1, blocks_of(k), 1)),
        },
        pack=_pack_modelopt_blocks,
        unpack=_unpack_modelopt_blocks,
        amaxes=no_amaxes,
    ),
    (Container.COMPRESSED_TENSORS, FormatName("fp8_block")): Layout(
        manifest=config_group("float-quantized", _E4M3_BLOCK, _E4M3_DYNAMIC_GROUP),
        tensors={
            "weight": E4M3_CODES,
            "weight_scale": TensorRule(F32, lambda n, k: (blocks_of(n), blocks_of(k))),
        },
        pack=_pack_scales,
        unpack=_unpack_scales,
        amaxes=no_amaxes,
    ),
}
