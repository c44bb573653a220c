"""What element types, ways of scaling and activation schemes do to numbers, as tables.

A new one adds rows to the module of its family, or a module to `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from types import MappingProxyType

from torch import Tensor

from autoq.formats import ActivationScheme
from autoq.kernels._packed import PackedTensor
from autoq.layers._codecs._types import (
    CodecKey,
    CodeGrid,
    Family,
    InputCodec,
    ScaleChoices,
    WeightCodec,
)
from autoq.layers._codecs.fp8 import FP8
from autoq.layers._codecs.int4 import INT4, int4_group_scale
from autoq.layers._codecs.int8 import INT8
from autoq.layers._codecs.mx import MX
from autoq.layers._codecs.nvfp4 import NVFP4

__all__ = [
    "DEQUANTIZERS",
    "INPUT_CODECS",
    "LINEARS",
    "WEIGHT_CODECS",
    "CodeGrid",
    "Family",
    "InputCodec",
    "ScaleChoices",
    "WeightCodec",
    "int4_group_scale",
]

_FAMILIES = (FP8, NVFP4, INT4, INT8, MX)


def _keep_input(x: Tensor, _: float) -> Tensor:
    return x


WEIGHT_CODECS: Mapping[CodecKey, WeightCodec] = MappingProxyType(
    dict(chain.from_iterable(family.weights.items() for family in _FAMILIES))
)
"""Element and scaling -> what becomes of a weight."""

INPUT_CODECS: Mapping[ActivationScheme, InputCodec] = MappingProxyType(
    {
        ActivationScheme.NONE: InputCodec(fake_quantize=_keep_input),
        **dict(chain.from_iterable(family.inputs.items() for family in _FAMILIES)),
    }
)
"""Activation scheme -> what becomes of an input."""

DEQUANTIZERS: Mapping[type[PackedTensor], Callable[..., Tensor]] = MappingProxyType(
    dict(chain.from_iterable(family.dequantizers.items() for family in _FAMILIES))
)
"""Packed record -> the function that gives its weight."""

LINEARS: Mapping[tuple[type[PackedTensor], ActivationScheme], Callable[..., Tensor]] = (
    MappingProxyType(dict(chain.from_iterable(family.linears.items() for family in _FAMILIES)))
)
"""Packed record and activation scheme -> the product with an input that is quantised on the way."""
