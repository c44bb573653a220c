"""Repairs of triton's interpreter, which is silently wrong for the formats here.

Values of bfloat16 and of the 8-bit floating types are decoded to float32, computed, and encoded
with torch's casts, which round to nearest even. Written for triton 3.6 to 3.9; `test_platform.py`
is the gate that proves it on the triton at hand.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


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
        tensor = torch.where(torch.isnan(tensor), tensor, tensor.clamp(-limit, limit))
    rounded = tensor.to(_TORCH[dtype])
    if dtype is tl.bfloat16:
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return rounded.view(torch.uint8).numpy()


def install() -> None:
    """Patch the interpreter of the imported triton."""
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock_cast, stock_binary, stock_dot = builder.cast_impl, builder.binary_op, builder.create_dot

    def odd(operand) -> bool:
        return operand.dtype.scalar in _TORCH

    def cast(self, source, target):
        if not (odd(source) or target.scalar in _TORCH):
            return stock_cast(self, source, target)
        values = decode(source.data, source.dtype)
        if target.scalar in _TORCH:
            if values.dtype.kind in "iub":
                values = values.astype(np.float32)
            return handle(encode(values, target), target.scalar)
        return handle(values.astype(interpreter._get_np_dtype(target)), target.scalar)

    def binary(self, left, right, operation):
        if not (odd(left) or odd(right)):
            return stock_binary(self, left, right, operation)
        result = operation(decode(left.data, left.dtype), decode(right.data, right.dtype))
        if result.dtype == np.bool_:
            return handle(result, tl.int1)
        return handle(encode(result, left.dtype), left.dtype.scalar)

    def dot(self, left, right, accumulator, *rest):
        if not (odd(left) or odd(right)):
            return stock_dot(self, left, right, accumulator, *rest)
        product = decode(left.data, left.dtype).astype(np.float32) @ decode(
            right.data, right.dtype
        ).astype(np.float32)
        total = (product + accumulator.data).astype(accumulator.data.dtype)
        return handle(total, accumulator.dtype.scalar)

    def fused_multiply_add(self, x, y, z):
        if odd(x):
            raise NotImplementedError("fma of a narrow type")
        wide = np.longdouble if x.data.dtype == np.float32 else x.data.dtype
        total = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        return handle(total.astype(x.data.dtype), x.dtype.scalar)

    builder.cast_impl, builder.binary_op, builder.create_dot = cast, binary, dot
    builder.create_fma = fused_multiply_add
    builder.create_fp_to_fp = lambda self, source, target, mode: cast(self, source, target)
