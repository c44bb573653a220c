"""Repairs of triton's interpreter, which is silently wrong for the formats here.

Values of bfloat16 and of the 8-bit floating types are decoded to float32, computed, and encoded
with torch's casts, which round to nearest even. Written for triton 3.6 to 3.9; `test_platform.py`
is the gate that proves it on the triton at hand.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

_Builder, _Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def decode(data, dtype):
    """Float32 numbers of what the interpreter stores for a value of `dtype`."""
    dtype = dtype.scalar
    if dtype not in _TORCH:
        return data
    raw = np.ascontiguousarray(data).view(np.int16 if dtype is tl.bfloat16 else np.uint8).copy()
    return torch.from_numpy(raw).view(_TORCH[dtype]).float().numpy()


def encode(values, dtype):
    """The other way: nearest even, 8-bit types saturating as the hardware's conversions do."""
    dtype = dtype.scalar
    tensor = torch.from_numpy(np.array(values))
    if dtype in _LARGEST:
        limit = _LARGEST[dtype]
        # The hardware knows one NaN per type, torch keeps the sign.
        tensor = torch.where(torch.isnan(tensor), torch.nan, tensor.clamp(-limit, limit))
    rounded = tensor.to(_TORCH[dtype])
    if dtype is tl.bfloat16:
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return rounded.view(torch.uint8).numpy()


def fma(x, y, z):
    """x * y + z of float32 or float16, rounded once.

    Products are exact in float64. The sum there is rounded to odd, which a second rounding to
    nearest cannot see (Boldo and Melquiond, IEEE Trans. Comput. 57, 2008).
    """
    product = x.astype(np.float64) * y.astype(np.float64)
    addend = z.astype(np.float64)
    total = np.atleast_1d(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    away = (error > 0) == (total > 0)
    odd = bits + np.where(away, 1, -1)
    inexact = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    return np.where(inexact, odd, bits).view(np.float64).astype(x.dtype).reshape(z.shape)


def smaller(left, right):
    """As the GPU's `min`: a NaN is dropped, -0.0 is less than 0.0."""
    zeros = (left == 0) & (right == 0)
    return np.where(zeros, -((-left) + (-right)), np.fmin(left, right))


def larger(left, right):
    """As the GPU's `max`: a NaN is dropped, -0.0 is less than 0.0."""
    return np.where((left == 0) & (right == 0), left + right, np.fmax(left, right))


def install() -> None:
    """Patch the interpreter of the imported triton."""
    np.seterr(all="ignore")  # overflow and NaN are as quiet on GPUs
    _repair_casts()
    _repair_arithmetic()
    _repair_reductions()
    _repair_products()
    _repair_version_differences()


def _odd(operand) -> bool:
    return operand.dtype.scalar in _TORCH


def _repair_casts() -> None:
    stock = _Builder.cast_impl

    def cast(self, source, target):
        if not (_odd(source) or target.scalar in _TORCH):
            return stock(self, source, target)
        values = decode(source.data, source.dtype)
        if target.scalar in _TORCH:
            if values.dtype.kind in "iub":
                values = values.astype(np.float32)
            return _Handle(encode(values, target), target.scalar)
        return _Handle(values.astype(interpreter._get_np_dtype(target)), target.scalar)

    def convert(self, source, target, mode):
        if mode == interpreter._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("rounding towards zero")
        return cast(self, source, target)

    _Builder.cast_impl, _Builder.create_fp_to_fp = cast, convert


def _repair_arithmetic() -> None:
    stock_binary, stock_unary = _Builder.binary_op, _Builder.unary_op

    def binary(self, left, right, operation):
        if not (_odd(left) or _odd(right)):
            return stock_binary(self, left, right, operation)
        result = operation(decode(left.data, left.dtype), decode(right.data, right.dtype))
        if result.dtype == np.bool_:
            return _Handle(result, tl.int1)
        return _Handle(encode(result, left.dtype), left.dtype.scalar)

    def unary(self, operand, operation):
        if not _odd(operand):
            return stock_unary(self, operand, operation)
        result = operation(decode(operand.data, operand.dtype))
        return _Handle(encode(result, operand.dtype), operand.dtype.scalar)

    def clamp(self, x, low, high, propagate_nan):
        drop = propagate_nan == interpreter._ir.PROPAGATE_NAN.NONE
        at_least = binary(self, x, low, larger if drop else np.maximum)
        return binary(self, at_least, high, smaller if drop else np.minimum)

    def fused_multiply_add(self, x, y, z):
        if x.data.dtype not in (np.float32, np.float16):
            raise NotImplementedError(f"fma of {x.dtype}")
        return _Handle(fma(*np.broadcast_arrays(x.data, y.data, z.data)), x.dtype.scalar)

    _Builder.binary_op, _Builder.unary_op = binary, unary
    _Builder.create_clampf, _Builder.create_fma = clamp, fused_multiply_add
    _Builder.create_minnumf = lambda self, left, right: binary(self, left, right, smaller)
    _Builder.create_maxnumf = lambda self, left, right: binary(self, left, right, larger)


def _repair_reductions() -> None:
    """tl.sum and, through tl.reduce, the largest and smallest of narrow types; tl.cumsum."""

    def on_decoded(stock):
        def reduced(self, operand, *rest, **named):
            first = operand[0] if isinstance(operand, tuple) else operand
            if not _odd(first.handle):
                return stock(self, operand, *rest, **named)
            wide = self.to_tensor(decode(first.handle.data, first.dtype), tl.float32)
            result = stock(self, wide, *rest, **named)
            if isinstance(result, tl.tensor):
                return narrowed(self, result, first.dtype)
            return type(result)(narrowed(self, part, first.dtype) for part in result)

        return reduced

    def narrowed(self, tensor, dtype):
        if tensor.dtype is not tl.float32:  # an index
            return tensor
        data = encode(tensor.handle.data, dtype)
        block = tensor.type.is_block()
        kind = tl.block_type(dtype.scalar, list(data.shape)) if block else dtype.scalar
        return tl.tensor(_Handle(data, dtype.scalar), kind)

    for operations, name in (
        (interpreter.ReduceOps, "sum"),
        (interpreter.ReduceOps, "min_max"),
        (interpreter.ScanOps, "cumsum"),
    ):
        setattr(operations, name, on_decoded(getattr(operations, name)))


def _repair_products() -> None:
    stock = _Builder.create_dot

    def dot(self, left, right, accumulator, *rest):
        if left.data.dtype.kind in "iu" and not (_odd(left) or _odd(right)):
            # Exact too, and by a fast library routine: integer products have none.
            product = left.data.astype(np.float64) @ right.data.astype(np.float64)
            total = product.astype(accumulator.data.dtype) + accumulator.data
            return _Handle(total, accumulator.dtype.scalar)
        if not (_odd(left) or _odd(right)):
            return stock(self, left, right, accumulator, *rest)
        product = decode(left.data, left.dtype).astype(np.float32) @ decode(
            right.data, right.dtype
        ).astype(np.float32)
        total = (product + accumulator.data).astype(accumulator.data.dtype)
        return _Handle(total, accumulator.dtype.scalar)

    def dot_scaled(self, left, left_scale, left_format, right, right_scale, right_format, *rest):
        _fast_math, left_k_packed, right_k_packed, accumulator = rest
        first = _scaled(left, left_scale, left_format, -1, -1 if left_k_packed else -2)
        second = _scaled(right, right_scale, right_format, -2, -2 if right_k_packed else -1)
        product = (first @ second).astype(np.float32)
        return _Handle(product + accumulator.data, accumulator.dtype.scalar)

    _Builder.create_dot, _Builder.create_dot_scaled = dot, dot_scaled


def _scaled(operand, scale, element_format, k_axis, packed_axis):
    """Float64 values of an operand of tl.dot_scaled; each scale has the rows last but one."""
    if element_format == interpreter._ir.ScaleDotElemTypeTY.E2M1:
        values = _unpacked(operand.data, packed_axis)
    else:
        values = decode(operand.data, operand.dtype).astype(np.float64)
    if scale is None:
        return values
    if scale.dtype.scalar in _TORCH:
        factors = decode(scale.data, scale.dtype).astype(np.float64)
    else:
        exponents = scale.data.view(np.uint8).astype(np.int32) - 127
        factors = np.where(exponents == 128, np.nan, np.ldexp(1.0, exponents))
    factors = np.repeat(factors, values.shape[k_axis] // factors.shape[-1], axis=-1)
    return values * (factors if k_axis == -1 else np.swapaxes(factors, -1, -2))


def _unpacked(data, axis):
    """E2M1 values of bytes, two along `axis`, the even element in the low nibble."""
    codes = np.moveaxis(data.view(np.uint8), axis, -1)
    codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1)
    values = np.where(codes & 8, -_E2M1[codes & 7], _E2M1[codes & 7])
    return np.moveaxis(values, -1, axis)


def _repair_version_differences() -> None:
    """What 3.6 and 3.7 cannot do in the interpreter, and autotuning, which none can."""
    stock_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, *rest):
        stock_patch(tensor, *rest)
        # numpy 2.4 refuses int() of arrays that have a dimension, as scalars here do.
        rest[-1].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor
    # Timing needs a driver. All equal, so that the first configuration is taken.
    Autotuner._bench = lambda self, *args, config, **rest: [1.0, 1.0, 1.0]

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        semantic = interpreter.TritonSemantic
        stock_dot_scaled = semantic.dot_scaled

        def dot_scaled(
            self, left, left_scale, left_format, right, right_scale, right_format, *rest
        ):
            formats = (tl.constexpr(left_format), tl.constexpr(right_format))
            return stock_dot_scaled(
                self, left, left_scale, formats[0], right, right_scale, formats[1], *rest
            )

        semantic.dot_scaled = dot_scaled
