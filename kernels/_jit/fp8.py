"""FP8 E4M3: element-wise kernels. Codes travel as bytes, because sm_80 has no type for them."""

import triton
import triton.language as tl

from autoq.kernels._jit.rounding import divide, encode_e4m3, shared_divisor, sign_bit


@triton.jit
def quantize_tensor_kernel(
    x_ptr, codes_ptr, scale_ptr, size, BLOCK: tl.constexpr, HARDWARE: tl.constexpr
):
    """codes = e4m3(x / scale) with one scale, over a flat tensor."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    power, normal, reciprocal = shared_divisor(tl.load(scale_ptr))
    quotient = divide(tl.abs(x), power, normal, reciprocal)
    code = encode_e4m3(quotient, HARDWARE) | sign_bit(x)
    tl.store(codes_ptr + offsets, code.to(tl.uint8), mask=inside)
