"""What a family of element types has to say of its weights and inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self, TypeAlias

import torch
from torch import Tensor

from autoq.formats import ActivationScheme, Container, QuantFormat, WeightElement, WeightScaling
from autoq.kernels._packed import PackedTensor
from autoq.kernels._torch import e2m1
from autoq.kernels.scoring import Scheme
from autoq.layers._types import LayerCalibration

Tensors: TypeAlias = Mapping[str, Tensor]

CodecKey: TypeAlias = tuple[WeightElement, WeightScaling]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCodec:
    """What an element type with a way of scaling does to a weight [N, K] that is smoothed already.

    The arguments are those of the public functions, in their order.
    """

    tensors: tuple[str, ...]  # names in QuantizedWeight.tensors
    quantize: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype], Tensors]
    pack: Callable[[Tensors, Container], PackedTensor]
    fake_quantize: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype, Container], Tensor]
    grid: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype], CodeGrid] | None = None
    choices: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype], ScaleChoices] | None = (
        None
    )
    scheme: Callable[[LayerCalibration, Container], tuple[Scheme, Tensor] | None] | None = None
    """How `fake_quantize` rounds, where the scoring kernels can do that themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGrid:
    """The values that a weight [N, K] can take in a 4-bit element, once its scales are chosen.

    Of W4A8 those before the second level rounds them to E4M3.
    """

    levels: Tensor  # float32 [L], ascending
    nibbles: Tensor  # uint8 [L]: the code of each level
    step: Tensor  # float32 [N, K], positive: weights are levels times it

    @classmethod
    def of_e2m1(cls, step: Tensor) -> Self:
        """The fifteen values of E2M1, whose code for -0 is left out."""
        magnitudes = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=step.device)
        numbers = torch.arange(1, 8, dtype=torch.uint8, device=step.device)
        return cls(
            levels=torch.cat([-magnitudes.flip(0), torch.zeros_like(magnitudes[:1]), magnitudes]),
            nibbles=torch.cat([numbers.flip(0) | 8, torch.zeros_like(numbers[:1]), numbers]),
            step=step,
        )

    def pack(self, indices: Tensor) -> Tensor:
        """`LayerCalibration.codes` from indices of levels, uint8 [N, K]."""
        codes = self.nibbles[indices.int()]
        return codes[:, ::2] | codes[:, 1::2] << 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleChoices:
    """The scales that each block of a weight [N, K] can take in a 4-bit element."""

    nearest: Callable[[Tensor], Tensor]  # float32 values to the nearest levels, in place
    stored: Tensor  # [R, N, blocks], as `LayerCalibration.block_scale` has it; the first are taken
    step: Tensor  # float32 [R, N, blocks], positive: weights are levels times it


def nearest_e2m1(values: Tensor) -> Tensor:
    """`ScaleChoices.nearest` of E2M1."""
    e2m1.round_(values, torch.empty_like(values))
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCodec:
    """What an activation scheme does to an input [..., K], given its largest magnitude."""

    fake_quantize: Callable[[Tensor, float], Tensor]
    scale: Callable[[float], Tensor] | None = None  # None where scales follow from the input alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The tables of one family; `autoq.layers._codecs` has those of all."""

    weights: Mapping[CodecKey, WeightCodec]
    inputs: Mapping[ActivationScheme, InputCodec] = field(default_factory=dict)
    dequantizers: Mapping[type[PackedTensor], Callable[..., Tensor]] = field(default_factory=dict)
    """packed, dtype -> weight [N, K]."""
    linears: Mapping[tuple[type[PackedTensor], ActivationScheme], Callable[..., Tensor]] = field(
        default_factory=dict
    )
    """x, packed, bias, input_scale= -> [..., N]; the input is quantised on the way."""
