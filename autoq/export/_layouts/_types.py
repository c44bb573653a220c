"""How a container stores a matrix of one format: its tensors, and what the manifest says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from autoq.formats import Container, FormatName
from autoq.kernels import fp8
from autoq.layers import LayerCalibration

Tensors: TypeAlias = Mapping[str, Tensor]
Packer: TypeAlias = Callable[[Tensors, LayerCalibration, torch.dtype], dict[str, Tensor]]
LayoutKey: TypeAlias = tuple[Container, FormatName]

E4M3 = (torch.float8_e4m3fn,)
F32 = (torch.float32,)
U8 = (torch.uint8,)
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

ANY = -1
"""In the shape of a `TensorRule`: as many as there are."""

_E8M0_NAN = 255
_LARGEST_E4M3_BYTE = 0x7F  # NaN; of negative numbers the sign comes on top


def holds_e4m3_nan(codes: Tensor) -> bool:
    """Whether E4M3 codes are NaN somewhere: all bits but the sign."""
    magnitudes = codes.view(torch.uint8) & _LARGEST_E4M3_BYTE
    return bool(magnitudes.numel()) and int(magnitudes.max()) == _LARGEST_E4M3_BYTE


def _is_positive_e4m3(scales: Tensor) -> bool:
    """Whether all E4M3 codes are positive numbers: bytes from 1, and below that of NaN."""
    if not scales.numel():
        return True
    smallest, largest = torch.aminmax(scales.view(torch.uint8))
    return int(smallest) > 0 and int(largest) < _LARGEST_E4M3_BYTE


@dataclass(frozen=True, slots=True)
class TensorRule:
    """What a stored tensor of a matrix [n, k] has to look like."""

    dtypes: tuple[torch.dtype, ...]
    shape: Callable[[int, int], tuple[int, ...]]
    is_scale: bool = True  # positive and finite
    optional: bool = False
    is_factor: bool = False  # finite, of either sign

    def takes_shape(self, found: tuple[int, ...], n: int, k: int) -> bool:
        """Whether a stored tensor of a matrix [n, k] has the shape."""
        wanted = self.shape(n, k)
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(w in (ANY, f) for f, w in pairs)

    def wrong_values(self, tensor: Tensor) -> str | None:
        """What values it must have, if it has not."""
        if tensor.dtype == torch.float8_e4m3fn and holds_e4m3_nan(tensor):
            return "hold no code of NaN"
        if self.is_factor:
            return None if bool(torch.isfinite(tensor).all()) else "be finite everywhere"
        if not self.is_scale:
            return None
        if tensor.dtype == torch.uint8:
            has_nan = bool(tensor.numel()) and int(tensor.max()) == _E8M0_NAN
            return "hold no byte 255 (NaN)" if has_nan else None
        if tensor.dtype == torch.float8_e4m3fn:
            is_positive = _is_positive_e4m3(tensor)
        else:
            values = tensor.float()
            is_positive = bool((torch.isfinite(values) & (values > 0)).all())
        return None if is_positive else "be positive and finite everywhere"


def codes(
    dtypes: tuple[torch.dtype, ...], shape: Callable[[int, int], tuple[int, ...]]
) -> TensorRule:
    """The rule of a tensor in which any bits are numbers."""
    return TensorRule(dtypes, shape, is_scale=False)


def factor(shape: Callable[[int, int], tuple[int, ...]]) -> TensorRule:
    """The rule of a factor of a branch of low rank."""
    return TensorRule(MODEL_DTYPES, shape, is_scale=False, is_factor=True)


SCALAR = TensorRule(F32, lambda n, k: ())
ONE = TensorRule(F32, lambda n, k: (1,))
E4M3_CODES = codes(E4M3, lambda n, k: (n, k))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a container stores a matrix of one format.

    The matrix is [n, k] with its inputs along k; `pack` and `unpack` are each other's inverse.
    """

    manifest: Mapping[str, Any]
    """modelopt: the entry of quantized_layers; compressed-tensors: a config group without targets."""
    tensors: Mapping[str, TensorRule]  # by what follows the module's name
    pack: Packer
    """`QuantizedWeight.tensors`, calibration and the model's dtype -> stored tensors."""
    unpack: Callable[[Tensors], dict[str, Tensor]]
    """Stored tensors -> `QuantizedWeight.tensors`."""
    amaxes: Callable[[Tensors, Tensors], tuple[float, float]]
    """Stored and unpacked tensors -> weight_amax and input_amax that give the stored scales again;
    0 where no such scale is stored."""


def amax_of(
    scale: Tensor, largest: float, scale_of: Callable[[Tensor], Tensor] = fp8.tensor_scale
) -> float:
    """The float32 maximum whose scale, maximum / largest, comes closest to `scale`."""
    scale = scale.float().reshape(())
    middle = scale * largest
    below = torch.nextafter(middle, torch.zeros(()))
    above = torch.nextafter(middle, torch.full((), torch.inf))
    candidates = [middle, below, above]
    return float(min(candidates, key=lambda amax: float((scale_of(amax) - scale).abs())))


def no_amaxes(_: Tensors, __: Tensors) -> tuple[float, float]:
    """`Layout.amaxes` of a format whose scales are of rows, blocks and tokens only."""
    return 0.0, 0.0


def config_group(
    storage: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A config group of compressed-tensors, without its targets."""
    return {
        "format": storage,
        "weights": dict(weights),
        "input_activations": None if inputs is None else dict(inputs),
        "output_activations": None,
    }
