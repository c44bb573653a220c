"""What the two microscaling contracts share: blocks, the rule for their scales, checks.

A block is 32 values along the last dimension with one E8M0 scale: the byte b stands for the power
of two 2**(b - 127); 255 is NaN, there is no zero. Source: OCP Microscaling Formats (MX)
Specification v1.0, sections 5.1 to 5.4 and 6.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels._checks import (
    FLOAT_DTYPES,
    require_bias,
    require_dtype,
    require_float,
    require_member,
    require_record,
    require_same_device,
    require_shape,
)
from autoq.kernels._packed import PackedTensor

BLOCK = 32
"""Values that share a scale."""


class ScaleRule(StrEnum):
    """Which power of two a block gets. Readers only decode, so all make valid files.

    With amax = m * 2**x, 1 <= m < 2, and an element type whose largest number is L = l * 2**e:
    """

    OCP = "ocp"
    """2**(x - e), the conversion of section 6.3: values above L times that saturate, amax by at
    most 2 / l. Also the default of torchao."""
    UP = "up"
    """The smallest with amax / scale <= L, that is 2**(x - e), doubled if m > l: nothing saturates
    and small values get one bit less. What cuBLAS, TensorRT-LLM and FlashInfer do to inputs and
    ModelOpt to weights."""
    HALF = "half"
    """Between the two: 2**(x - e), doubled from m = 1.75 on, which is as if amax were rounded to
    E2M1's one mantissa bit first. What compressed-tensors does, for both elements."""


@dataclass(frozen=True, slots=True)
class Element:
    """An element type."""

    dtype: torch.dtype  # of its codes; two E2M1 codes share a byte
    codes_per_byte: int
    largest: float  # L
    largest_exponent: int  # e
    largest_mantissa_bits: int  # of l, as float32 stores it

    def increment(self, rule: ScaleRule) -> int:
        """What to add to the bits of amax so that their exponent is the one the rule wants."""
        match rule:
            case ScaleRule.OCP:
                return 0
            case ScaleRule.UP:
                return 0x7FFFFF - self.largest_mantissa_bits
            case ScaleRule.HALF:
                return 0x200000


E4M3 = Element(torch.float8_e4m3fn, 1, 448.0, 8, 0x600000)
E2M1 = Element(torch.uint8, 2, 6.0, 2, 0x400000)


@dataclass(frozen=True, slots=True, eq=False)
class MXTensor(PackedTensor):
    """Codes and E8M0 scales of a tensor [..., K]."""

    codes: Tensor
    block_scale: Tensor
    """uint8 [..., K/32]: the byte b is 2**(b - 127), 255 is NaN."""

    @property
    def element(self) -> Element:
        """The type of the codes."""
        return E2M1 if self.codes.dtype == E2M1.dtype else E4M3

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: (..., K)."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * self.element.codes_per_byte)


def require_blocks(x: Tensor) -> None:
    """Refuse what is not a floating tensor whose last dimension is a multiple of 32."""
    require_float("x", x)
    _require_whole_blocks("x", x.shape[-1])


def require_packed(name: str, packed: MXTensor, *elements: Element) -> None:
    """Refuse codes of other types than `elements`, and scales that do not belong to the codes."""
    require_record(name, packed, MXTensor)
    codes, block_scale = packed.codes, packed.block_scale
    require_dtype(f"the codes of {name}", codes, *(element.dtype for element in elements))
    require_dtype(f"the block scale of {name}", block_scale, torch.uint8)
    if codes.ndim == 0:
        raise InputError(f"{name} must have at least one dimension, got a scalar; give it one")
    _require_whole_blocks(name, packed.shape[-1])
    require_shape(
        f"the block scale of {name}", block_scale, (*codes.shape[:-1], packed.shape[-1] // BLOCK)
    )
    require_same_device(codes, block_scale)


def require_rule(rule: ScaleRule) -> None:
    """Refuse what is no rule for scales."""
    require_member("rule", rule, ScaleRule)


def require_result(dtype: torch.dtype) -> None:
    """Refuse a result that is not float32, bfloat16 or float16."""
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)


def require_product(
    left: tuple[int, ...], device: torch.device, right: MXTensor, bias: Tensor | None
) -> None:
    """Refuse operands [..., K] and [N, K] that do not multiply."""
    if len(right.shape) != 2:
        raise InputError(f"the right operand must be a matrix, got {right.shape}; reshape it")
    if left[-1] != right.shape[1]:
        raise InputError(
            f"both operands must have as many columns, got {left[-1]} and {right.shape[1]}; "
            "take the input of this very layer"
        )
    require_bias(bias, right.shape[0])
    require_same_device(torch.empty(0, device=device), right.codes, bias)


def _require_whole_blocks(name: str, columns: int) -> None:
    if columns % BLOCK:
        raise InputError(
            f"the last dimension of {name} must be a multiple of 32, got {columns}; "
            "pad it or use another format"
        )
