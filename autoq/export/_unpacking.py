"""From the tensors of a container back to codes, scales and calibration; `_packing`'s inverse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from autoq.errors import ExportError
from autoq.formats import FormatName
from autoq.kernels import fp8, int4, nvfp4, w4a8
from autoq.layers import LayerCalibration, QuantizedWeight
from autoq.layers.quantize import Container
from autoq.models import SlotKind

_Tensors: TypeAlias = Mapping[str, Tensor]

_E4M3 = (torch.float8_e4m3fn,)
_F32 = (torch.float32,)
_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FP8_LARGEST = 448.0
_NVFP4_LARGEST = 6.0 * 448.0


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a stored tensor of a matrix [n, k] has to look like."""

    dtypes: tuple[torch.dtype, ...]
    shape: Callable[[int, int], tuple[int, ...]]
    is_scale: bool = True  # positive and finite
    optional: bool = False


_SCALAR = _Rule(_F32, lambda n, k: ())
_ONE = _Rule(_F32, lambda n, k: (1,))
_E4M3_CODES = _Rule(_E4M3, lambda n, k: (n, k), is_scale=False)
_E2M1_CODES = _Rule((torch.uint8,), lambda n, k: (n, k // 2), is_scale=False)
_E2M1_SCALES = _Rule(_E4M3, lambda n, k: (n, k // 16))

_RULES: Mapping[tuple[Container, str], Mapping[str, _Rule]] = {
    (Container.MODELOPT, "fp8"): {
        "weight": _E4M3_CODES,
        "weight_scale": _SCALAR,
        "input_scale": _SCALAR,
    },
    (Container.MODELOPT, "nvfp4"): {
        "weight": _E2M1_CODES,
        "weight_scale": _E2M1_SCALES,
        "weight_scale_2": _SCALAR,
        "input_scale": _SCALAR,
    },
    (Container.MODELOPT, "w4a8_awq"): {
        "weight": _Rule((torch.uint8,), lambda n, k: (n // 2, k), is_scale=False),
        "weight_scale": _Rule(_F32, lambda n, k: (n, k // 128)),
        "weight_scale_2": _SCALAR,
        "input_scale": _SCALAR,
        "pre_quant_scale": _Rule(_MODEL_DTYPES, lambda n, k: (k,), optional=True),
    },
    (Container.COMPRESSED_TENSORS, "fp8"): {
        "weight": _E4M3_CODES,
        "weight_scale": _ONE,
        "input_scale": _ONE,
    },
    (Container.COMPRESSED_TENSORS, "nvfp4"): {
        "weight_packed": _E2M1_CODES,
        "weight_scale": _E2M1_SCALES,
        "weight_global_scale": _ONE,
        "input_global_scale": _ONE,
    },
    (Container.COMPRESSED_TENSORS, "w4a8_awq"): {
        "weight_packed": _Rule((torch.int32,), lambda n, k: (n, k // 8), is_scale=False),
        "weight_scale": _Rule(_MODEL_DTYPES, lambda n, k: (n, k // 128)),
        "weight_shape": _Rule((torch.int64,), lambda n, k: (2,), is_scale=False),
    },
}
"""Container and format -> what follows the module's name -> dtype and shape."""


def expected_tensors(container: Container, fmt: FormatName) -> set[str]:
    """Names that may follow a module's in this format, its bias aside."""
    return set(_RULES[container, fmt])


def checked_tensors(
    module: str,
    tensors: _Tensors,
    *,
    container: Container,
    fmt: FormatName,
    shape: tuple[int, int],
    kind: SlotKind,
) -> dict[str, Tensor]:
    """The module's tensors, looking as the container tabulates them; codes as of [out, in].

    Args:
        module: name for messages.
        shape: [out, in] of the matrix.
    Raises:
        ExportError: one is missing, unknown, of another dtype or shape, or a scale is not
            positive and finite.
    """
    rules = _RULES[container, fmt]
    for name, rule in rules.items():
        if name not in tensors and not rule.optional:
            raise ExportError(f"{module} is {fmt} and lacks {name}; the checkpoint is incomplete")
    checked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in rules:
            raise ExportError(f"{module} is {fmt}, which has no tensor {name}; it is damaged")
        transposed = kind is SlotKind.CONV1D and name == "weight" and tensor.ndim == 2
        checked[name] = tensor.T if transposed else tensor
        _check(f"{module}.{name}", checked[name], rules[name], shape)
    if "weight_shape" in checked and tuple(checked["weight_shape"].tolist()) != shape:
        raise ExportError(
            f"{module}.weight_shape must be {list(shape)}, got {checked['weight_shape'].tolist()}"
        )
    return checked


def unpacked_weight(
    tensors: _Tensors, *, container: Container, fmt: FormatName, shape: tuple[int, int]
) -> QuantizedWeight:
    """Codes and scales of one module, from its checked tensors."""
    unpacked = _UNPACKERS[container, fmt](tensors)
    return QuantizedWeight(format=fmt, tensors=unpacked, shape=shape)


def unpacked_calibration(
    tensors: _Tensors, weight: QuantizedWeight, container: Container
) -> LayerCalibration:
    """The calibration under which a layer computes what the stored tensors say.

    An input maximum is such that it gives the stored scale again; where the container stores the
    scale's reciprocal, the last bit can be lost. It is 0 where inputs are scaled per token.
    """
    if weight.format == "nvfp4":
        inputs = tensors[_NVFP4_INPUT[container]].reshape(())
        inputs = inputs.reciprocal() if container is Container.COMPRESSED_TENSORS else inputs
        return LayerCalibration(
            weight_amax=_amax(weight.tensors["global_scale"], _NVFP4_LARGEST),
            input_amax=_amax(inputs, _NVFP4_LARGEST),
        )
    scale = tensors.get("pre_quant_scale")
    has_scale = scale is not None and bool((scale != 1).any())
    return LayerCalibration(
        weight_amax=_amax(weight.tensors[_TOP_SCALES[weight.format]], _FP8_LARGEST),
        input_amax=_amax(tensors["input_scale"], _FP8_LARGEST) if "input_scale" in tensors else 0.0,
        pre_quant_scale=scale.float() if scale is not None and has_scale else None,
    )


def _check(name: str, tensor: Tensor, rule: _Rule, shape: tuple[int, int]) -> None:
    if tensor.dtype not in rule.dtypes:
        allowed = " or ".join(_dtype_name(dtype) for dtype in rule.dtypes)
        raise ExportError(f"{name} must be {allowed}, got {_dtype_name(tensor.dtype)}")
    expected = rule.shape(*shape)
    if tuple(tensor.shape) != expected:
        raise ExportError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    if rule.is_scale and not _is_positive(tensor.float()):
        raise ExportError(f"{name} must be positive and finite everywhere, and is not")


def _is_positive(values: Tensor) -> bool:
    return bool((torch.isfinite(values) & (values > 0)).all())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unpack_fp8(tensors: _Tensors) -> dict[str, Tensor]:
    return {"codes": tensors["weight"], "scale": tensors["weight_scale"].reshape(())}


def _unpack_modelopt_nvfp4(tensors: _Tensors) -> dict[str, Tensor]:
    return {
        "codes": tensors["weight"],
        "block_scale": tensors["weight_scale"],
        "global_scale": tensors["weight_scale_2"],
    }


def _unpack_compressed_nvfp4(tensors: _Tensors) -> dict[str, Tensor]:
    return {
        "codes": tensors["weight_packed"],
        "block_scale": tensors["weight_scale"],
        "global_scale": tensors["weight_global_scale"].reciprocal().reshape(()),
    }


def _unpack_modelopt_w4a8(tensors: _Tensors) -> dict[str, Tensor]:
    return {
        "codes": int4.unpack_rows(tensors["weight"].contiguous()),
        "group_scale": tensors["weight_scale"],
        "tensor_scale": tensors["weight_scale_2"],
    }


def _unpack_compressed_w4a8(tensors: _Tensors) -> dict[str, Tensor]:
    codes, group_scale = int4.unpack_columns(tensors["weight_packed"]), tensors["weight_scale"]
    packed = int4.pack(codes, group_scale.float())
    return {
        "codes": codes,
        "group_scale": packed.group_scale,
        "tensor_scale": w4a8.tensor_scale(packed),
    }


_UNPACKERS: Mapping[tuple[Container, str], Callable[[_Tensors], dict[str, Tensor]]] = {
    (Container.MODELOPT, "fp8"): _unpack_fp8,
    (Container.MODELOPT, "nvfp4"): _unpack_modelopt_nvfp4,
    (Container.MODELOPT, "w4a8_awq"): _unpack_modelopt_w4a8,
    (Container.COMPRESSED_TENSORS, "fp8"): _unpack_fp8,
    (Container.COMPRESSED_TENSORS, "nvfp4"): _unpack_compressed_nvfp4,
    (Container.COMPRESSED_TENSORS, "w4a8_awq"): _unpack_compressed_w4a8,
}

_NVFP4_INPUT = {
    Container.MODELOPT: "input_scale",
    Container.COMPRESSED_TENSORS: "input_global_scale",
}
_TOP_SCALES = {"fp8": "scale", "w4a8_awq": "tensor_scale"}


def _amax(scale: Tensor, largest: float) -> float:
    """The float32 maximum whose scale, maximum / largest, comes closest to `scale`."""
    scale = scale.float().reshape(())
    make = nvfp4.global_scale if largest == _NVFP4_LARGEST else fp8.tensor_scale
    middle = scale * largest
    below = torch.nextafter(middle, torch.zeros(()))
    above = torch.nextafter(middle, torch.full((), torch.inf))
    candidates = [middle, below, above]
    return float(min(candidates, key=lambda amax: float((make(amax) - scale).abs())))
