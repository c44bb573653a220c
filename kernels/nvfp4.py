"""NVFP4: E2M1 values, an E4M3 scale per 16 of them, a float32 scale per tensor.

A value is e2m1(code) * (e4m3(block scale) * global scale), blocks along the last dimension. All
arithmetic is float32; rounding is to nearest, ties to even, saturating at 6. -0.0 becomes code 0;
a negative value that rounds to zero keeps its sign, unless float32 makes its quotient by the scale
zero before.

Infinity saturates, and a block with a NaN in it becomes NaN altogether: its scale is NaN, its codes
are 7. Neither is looked for, because that costs a pass: whoever knows the layer's name checks and
reports them.
Source: the recipe of the NVFP4 checkpoints that vLLM, SGLang and TensorRT-LLM load.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels._checks import (
    FLOAT_DTYPES,
    checked_amax,
    require_bias,
    require_dtype,
    require_float,
    require_importance,
    require_matrix,
    require_multiple,
    require_record,
    require_same_device,
    require_scale,
    require_shape,
)
from autoq.kernels._packed import PackedTensor
from autoq.kernels._torch import chosen_scales
from autoq.kernels._torch import nvfp4 as _torch
from autoq.kernels._torch.chunks import scale_from_amax
from autoq.kernels.dispatch import triton_target

BLOCK = _torch.BLOCK
"""Values that share a block scale."""

_LARGEST_VALUE = 6.0 * 448.0


@dataclass(frozen=True, slots=True, eq=False)
class NVFP4Tensor(PackedTensor):
    """A tensor [..., K] in NVFP4."""

    codes: Tensor
    """uint8 [..., K/2], the even element in the low nibble; E2M1, bit 3 the sign."""
    block_scale: Tensor
    """float8_e4m3fn [..., K/16]."""
    global_scale: Tensor
    """float32 scalar."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: (..., K)."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


def global_scale(amax: float | Tensor) -> Tensor:
    """The second-level scale of a tensor whose largest magnitude is `amax`: amax / (6 * 448).

    Args:
        amax: one number, not negative; over a whole fusion set where engines fuse layers.

    Returns:
        float32 scalar on the device of `amax`; 1 if amax is 0, and never below 2**-100.

    Raises:
        InputError: amax is negative, NaN, infinite or not one number.
    """
    return scale_from_amax(checked_amax(amax), _LARGEST_VALUE)


def choose_block_scale(x: Tensor, global_scale: Tensor, importance: Tensor) -> Tensor:
    """Block scales that leave less error than those of the largest magnitudes.

    For every block the sum over its columns of importance * (quantised - exact)**2 is computed
    under the scale of its largest magnitude, under the two E4M3 numbers below and the eight above
    (up to twice the scale); the smallest wins, and of equals the one named first. With E[x_j^2] of
    a layer's inputs as importance that is the squared error of the outputs, correlations between
    inputs left out.
    Source: the same sum decides on clipping in Lin et al., "AWQ" (2023); scales above the maximum's
    pay because E2M1 has no value between 4 and 6 (Cook et al., "Four Over Six", 2025).

    Args:
        x: float32, bfloat16 or float16 [N, K], K a multiple of 16.
        global_scale: float32 scalar.
        importance: float32 [K], not negative.

    Returns:
        float8_e4m3fn [N, K/16], the same bits on every device.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    require_matrix("x", x)
    require_importance(importance, x)
    scale = _checked_scale(x, global_scale)
    return chosen_scales.nvfp4_block_scale(x.detach(), scale, importance.detach().to(x.device))


def quantize(
    x: Tensor, global_scale: Tensor | None = None, block_scale: Tensor | None = None
) -> NVFP4Tensor:
    """Codes and scales of `x`.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16.
        global_scale: float32 scalar from the function `global_scale`; that of the largest |x| if
            left out.
        block_scale: float8_e4m3fn [..., K/16] from `choose_block_scale`; those of the largest
            magnitudes if left out. With it, torch computes on every device.

    Raises:
        InputError: a dtype, shape or scale is not as above; or the scale is left out and x holds
            NaN or infinity. Triton kernels do not wait for the device to find that: every value
            becomes NaN.
    """
    scale, x = _checked_scale(x, global_scale), x.detach()
    if block_scale is not None:
        _require_block_scale(x, block_scale)
        codes = _torch.codes_under(x, scale, block_scale)
        return NVFP4Tensor(codes=codes, block_scale=block_scale, global_scale=scale)
    target = triton_target(x.device)
    if target is None:
        codes, block_scale = _torch.quantize(x, scale)
    else:
        from autoq.kernels._launch import nvfp4 as launch

        codes, block_scale = launch.quantize(x, scale, target=target)
    return NVFP4Tensor(codes=codes, block_scale=block_scale, global_scale=scale)


def dequantize(packed: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., K], computed in float32 and rounded once to `dtype`.

    Args:
        packed: codes and scales.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    _require_packed(packed)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    target = triton_target(packed.codes.device)
    if target is None:
        return _torch.dequantize(*_parts(packed), dtype)
    from autoq.kernels._launch import nvfp4 as launch

    return launch.dequantize(*_parts(packed), dtype, target=target)


def fake_quantize(
    x: Tensor, global_scale: Tensor | None = None, block_scale: Tensor | None = None
) -> Tensor:
    """`dequantize(quantize(x, global_scale, block_scale), x.dtype)`, bit for bit, in one go.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    scale, x = _checked_scale(x, global_scale), x.detach()
    if block_scale is not None:
        _require_block_scale(x, block_scale)
        return _torch.fake_quantize_under(x, scale, block_scale)
    target = triton_target(x.device)
    if target is None:
        return _torch.fake_quantize(x, scale)
    from autoq.kernels._launch import nvfp4 as launch

    return launch.fake_quantize(x, scale, target=target)


def linear(
    x: Tensor,
    weight: NVFP4Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, the input quantised to NVFP4 too if `input_scale` is given.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16.
        weight: [N, K].
        bias: float32, bfloat16 or float16 [N].
        input_scale: float32 scalar, the input's global scale; None: `x` is used as it is.
        out_dtype: float32, bfloat16 or float16; that of `x` if left out.

    Returns:
        [..., N]. On CPUs bit for bit `functional.linear` of what `fake_quantize` and `dequantize`
        return in the dtype of `x`. Triton kernels multiply what is not rounded to that dtype:
        e2m1 * e4m3, exactly, summed in float32 and multiplied by the global scales; float32 `x`
        keeps all its bits. No gradient flows through it.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    require_float("x", x)
    _require_packed(weight, "the weight's ")
    _require_product(x.shape, weight, bias, out_dtype)
    require_same_device(x, weight.codes, bias)
    if input_scale is not None:
        require_scale("input_scale", input_scale)
        input_scale = input_scale.to(x.device)
    target = triton_target(x.device)
    if target is None:
        return _torch.linear(x.detach(), *_parts(weight), bias, input_scale, out_dtype)
    from autoq.kernels._launch import nvfp4_matmul as launch

    operands = (x.detach(), *_parts(weight), bias, input_scale)
    return launch.linear(*operands, out_dtype, target=target)


def matmul(
    a: NVFP4Tensor, b: NVFP4Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """a @ b.T + bias of packed operands, accumulated in float32.

    Args:
        a: [..., K].
        b: [N, K].
        bias: float32, bfloat16 or float16 [N].
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., N].

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    _require_packed(a, "the left operand's ")
    _require_packed(b, "the right operand's ")
    _require_product(a.shape, b, bias, out_dtype)
    require_same_device(a.codes, b.codes, bias)
    target = triton_target(a.codes.device)
    if target is None:
        return _torch.matmul(*_parts(a), *_parts(b), bias, out_dtype)
    from autoq.kernels._launch import nvfp4_matmul as launch

    return launch.matmul(*_parts(a), *_parts(b), bias, out_dtype, target=target)


def _checked_scale(x: Tensor, global_scale: Tensor | None) -> Tensor:
    """The global scale on the device of `x`, computed if it is left out."""
    require_float("x", x)
    require_multiple("the last dimension of x", x.shape[-1], BLOCK)
    if global_scale is not None:
        require_scale("global_scale", global_scale)
        return global_scale.to(x.device)
    target = triton_target(x.device)
    if target is None:
        return scale_from_amax(checked_amax(_torch.amax(x.detach())), _LARGEST_VALUE)
    from autoq.kernels._launch import nvfp4 as launch

    return launch.global_scale(x.detach(), target=target)


def _require_block_scale(x: Tensor, block_scale: Tensor) -> None:
    require_dtype("block_scale", block_scale, torch.float8_e4m3fn)
    require_shape("block_scale", block_scale, (*x.shape[:-1], x.shape[-1] // BLOCK))
    require_same_device(x, block_scale)


def _require_packed(packed: NVFP4Tensor, whose: str = "") -> None:
    require_record(whose.removesuffix("'s ") or "packed", packed, NVFP4Tensor)
    codes, block_scale = packed.codes, packed.block_scale
    require_dtype(f"{whose}codes", codes, torch.uint8)
    require_dtype(f"{whose}block_scale", block_scale, torch.float8_e4m3fn)
    if codes.ndim == 0:
        raise InputError(
            f"{whose}codes must have at least one dimension, got a scalar; give it one"
        )
    require_multiple(f"the last dimension of {whose}codes", codes.shape[-1], BLOCK // 2)
    blocks = (*codes.shape[:-1], codes.shape[-1] * 2 // BLOCK)
    require_shape(f"{whose}block_scale", block_scale, blocks)
    require_same_device(codes, block_scale)
    require_scale(f"{whose}global_scale", packed.global_scale)


def _require_product(
    left: tuple[int, ...], right: NVFP4Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    require_matrix("codes of the right-hand operand", right.codes)
    rows, columns = right.shape
    if left[-1] != columns:
        raise InputError(
            f"both operands must have as many columns, got {left[-1]} and {columns}; "
            "take the input of this very layer"
        )
    require_bias(bias, rows)
    require_dtype("the result", torch.empty(0, dtype=out_dtype), *FLOAT_DTYPES)


def _parts(packed: NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return packed.codes, packed.block_scale, packed.global_scale.to(packed.codes.device)
