"""The gate: what every other test here takes for granted of the interpreter, or of the GPU.

The interpreter fails it without the repairs of `interpreter.py`: tests/kernels/test_triton.py
proves that.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from autoq.kernels._reference.fp8 import decode_byte
from autoq.kernels._reference.nvfp4 import MAGNITUDES as E2M1_MAGNITUDES

E4M3_MAGNITUDES = np.array([decode_byte(code) for code in range(0x7F)])

BLOCK = 2**13

# Float32 sums of at most 128 exact products, in another order than the float64 reference.
SUM_TOLERANCE = 1e-6

# Hopper's matrix units keep about 13 bits of a sum of E4M3 products.
HOPPER_E4M3_TOLERANCE = 2e-3


def _patterns(device: torch.device) -> Tensor:
    """3 * 2**20 floats: every sign, exponent and leading 11 mantissa bits, three endings."""
    leading = np.arange(2**20, dtype=np.uint32) << 12
    bits = np.concatenate([leading | ending for ending in (0, 1, 0xFFF)])
    return torch.from_numpy(bits.view(np.float32).copy()).to(device)


def _e4m3_codes(values: np.ndarray) -> np.ndarray:
    """E4M3 by the table of its values: the nearest, ties to the even code, saturating."""
    magnitudes = np.minimum(np.abs(values.astype(np.float64)), 448.0)
    below = np.searchsorted(E4M3_MAGNITUDES, magnitudes, side="right").clip(1, 127) - 1
    above = np.minimum(below + 1, 126)
    down, up = magnitudes - E4M3_MAGNITUDES[below], E4M3_MAGNITUDES[above] - magnitudes
    code = np.where((up < down) | ((up == down) & (below % 2 == 1)), above, below)
    return np.where(np.isnan(values), 0x7F, code | (np.signbit(values) << 7)).astype(np.uint8)


def _bfloat16_codes(values: np.ndarray) -> np.ndarray:
    """bfloat16 by integer arithmetic: the upper half of the bits, nearest even."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@triton.jit
def _to_e4m3_kernel(x_ptr, codes_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(x_ptr + offsets).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes_ptr + offsets, codes)


@triton.jit
def _to_bfloat16_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))


@pytest.mark.needs("fp8_type")
def test_cast_to_e4m3_rounds_to_nearest_even_and_saturates(device):
    x = _patterns(device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    _to_e4m3_kernel[(x.numel() // BLOCK,)](x, codes, BLOCK=BLOCK)
    np.testing.assert_array_equal(codes.cpu().numpy(), _e4m3_codes(x.cpu().numpy()))


def test_cast_to_bfloat16_rounds_to_nearest_even(device):
    x = _patterns(device)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
    _to_bfloat16_kernel[(x.numel() // BLOCK,)](x, out, BLOCK=BLOCK)
    numbers = ~x.isnan().cpu().numpy()
    actual = out.cpu().view(torch.int16).numpy().view(np.uint16)
    expected = _bfloat16_codes(x.cpu().numpy())
    np.testing.assert_array_equal(actual[numbers], expected[numbers])
    assert out.isnan().cpu().numpy()[~numbers].all()


@triton.jit
def _from_e4m3_kernel(codes_ptr, out_ptr):
    offsets = tl.arange(0, 256)
    codes = tl.load(codes_ptr + offsets).to(tl.float8e4nv, bitcast=True)
    tl.store(out_ptr + offsets, codes.to(tl.float32))


@pytest.mark.needs("fp8_type")
def test_every_e4m3_code_decodes(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.empty(256, device=device)
    _from_e4m3_kernel[(1,)](codes, out)
    np.testing.assert_array_equal(out.cpu().numpy(), [decode_byte(code) for code in range(256)])


@triton.jit
def _bfloat16_arithmetic_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, x + y)
    tl.store(out_ptr + SIZE + offsets, x * y)
    tl.store(out_ptr + 2 * SIZE + offsets, -x)
    tl.store(out_ptr + 3 * SIZE + offsets, tl.maximum(x, y))


def test_bfloat16_arithmetic(device, assert_same_bits):
    x, y = torch.randn(2, 1024, dtype=torch.bfloat16, device=device)
    out = torch.empty(4, 1024, dtype=torch.bfloat16, device=device)
    _bfloat16_arithmetic_kernel[(1,)](x, y, out, SIZE=1024)
    assert_same_bits(out, torch.stack([x + y, x * y, -x, torch.maximum(x, y)]))


@triton.jit
def _bfloat16_reduction_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr, tl.sum(x, 0))
    tl.store(out_ptr + 1, tl.max(x, 0).to(tl.bfloat16))
    tl.store(out_ptr + 2, tl.min(x, 0).to(tl.bfloat16))


def test_bfloat16_reductions(device):
    # Multiples of 1/8 whose sums stay below 32: exact in bfloat16 in any order.
    x = (torch.arange(64, device=device) % 9 - 4).to(torch.bfloat16) / 8
    out = torch.empty(3, dtype=torch.bfloat16, device=device)
    _bfloat16_reduction_kernel[(1,)](x, out, SIZE=64)
    assert out.tolist() == [x.double().sum().item(), 0.5, -0.5]


@triton.jit
def _extremes_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, tl.minimum(x, y))
    tl.store(out_ptr + SIZE + offsets, tl.maximum(x, y))
    tl.store(out_ptr + 2 * SIZE + offsets, tl.clamp(x, -2.0, 2.5))


def test_minimum_maximum_and_clamp_drop_nan(device, assert_same_bits):
    nan = float("nan")
    x = torch.tensor([nan, 1.0, 3.0, -0.0], device=device)
    y = torch.tensor([1.0, nan, -5.0, 0.0], device=device)
    out = torch.empty(3, 4, device=device)
    _extremes_kernel[(1,)](x, y, out, SIZE=4)
    expected = [[1.0, 1.0, -5.0, -0.0], [1.0, 1.0, 3.0, 0.0], [-2.0, 1.0, 2.5, -0.0]]
    assert_same_bits(out, torch.tensor(expected, device=device))


@triton.jit
def _fused_and_divided_kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y, z = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)
    tl.store(out_ptr + offsets, tl.fma(x, y, z))
    tl.store(out_ptr + SIZE + offsets, tl.math.div_rn(x, y))


def test_fma_rounds_once_and_division_to_nearest(device):
    x, y = torch.randn(2, 4096, device=device)
    z = -(x * y)  # what is left is the product's rounding error
    z[::2] = torch.randn(2048, device=device)
    out = torch.empty(2, 4096, device=device)
    _fused_and_divided_kernel[(1,)](x, y, z, out, SIZE=4096)
    first, second, third = (operand.cpu().numpy().astype(np.longdouble) for operand in (x, y, z))
    np.testing.assert_array_equal(out[0].cpu().numpy(), (first * second + third).astype("f4"))
    np.testing.assert_array_equal(out[1].cpu().numpy(), x.cpu().numpy() / y.cpu().numpy())


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + rows[:, None] * K + inner[None, :])
    b = tl.load(b_ptr + columns[None, :] * K + inner[:, None])
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], tl.dot(a, b))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        pytest.param(torch.float8_e4m3fn, marks=pytest.mark.needs("fp8_matmul")),
    ],
    ids=str,
)
def test_dot_multiplies_exactly_and_accumulates_in_float32(dtype, device):
    a, b = torch.randn(2, 64, 128).to(dtype).to(device)
    out = torch.empty(64, 64, device=device)
    _dot_kernel[(1,)](a, b, out, M=64, N=64, K=128)
    expected = a.double() @ b.double().T
    short = dtype is torch.float8_e4m3fn and device.type == "cuda"
    tolerance = HOPPER_E4M3_TOLERANCE if short else SUM_TOLERANCE
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_dot_of_int8_is_exact(device):
    a, b = torch.randint(-128, 128, (2, 64, 128), dtype=torch.int8).to(device)
    out = torch.empty(64, 64, dtype=torch.int32, device=device)
    _dot_kernel[(1,)](a, b, out, M=64, N=64, K=128)
    assert torch.equal(out.cpu(), (a.cpu().int() @ b.cpu().int().T))


@triton.jit
def _dot_scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    FORMAT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    inner, groups = tl.arange(0, K // PACK), tl.arange(0, K // GROUP)
    a = tl.load(a_ptr + rows[:, None] * (K // PACK) + inner[None, :])
    b = tl.load(b_ptr + columns[None, :] * (K // PACK) + inner[:, None])
    a_scale = tl.load(a_scale_ptr + rows[:, None] * (K // GROUP) + groups[None, :])
    b_scale = tl.load(b_scale_ptr + columns[:, None] * (K // GROUP) + groups[None, :])
    product = tl.dot_scaled(a, a_scale, FORMAT, b, b_scale, FORMAT)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], product)


def _e2m1_operand(rows: int) -> tuple[Tensor, Tensor]:
    """Random packed codes of [rows, 128], and their values."""
    codes = torch.randint(0, 16, (rows, 128))
    values = torch.tensor(E2M1_MAGNITUDES, dtype=torch.float64)[codes & 7]
    values = torch.where(codes >= 8, -values, values)
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8), values


@pytest.mark.parametrize(
    ("element", "scale_dtype", "group"),
    [
        pytest.param("e2m1", torch.float8_e4m3fn, 16, marks=pytest.mark.needs("nvfp4_matmul")),
        pytest.param("e2m1", torch.uint8, 32, marks=pytest.mark.needs("mx_matmul")),
        pytest.param("e4m3", torch.uint8, 32, marks=pytest.mark.needs("mx_matmul")),
    ],
    ids=["nvfp4", "mxfp4", "mxfp8"],
)
def test_dot_scaled_decodes_each_scale_by_its_type(element, scale_dtype, group, device):
    rows, columns, size = 128, 128, 128
    operands, values = [], []
    for count in (rows, columns):
        if element == "e2m1":
            codes, numbers = _e2m1_operand(count)
        else:
            codes = torch.randn(count, size).to(torch.float8_e4m3fn)
            numbers = codes.double()
        scale, factors = _random_scale(count, size // group, scale_dtype)
        operands += [codes.to(device), scale.to(device)]
        values.append(numbers * factors.repeat_interleave(group, dim=1))
    out = torch.empty(rows, columns, device=device)
    _dot_scaled_kernel[(1,)](
        *operands, out, M=rows, N=columns, K=size, GROUP=group, FORMAT=element,
        PACK=2 if element == "e2m1" else 1,
    )  # fmt: skip
    expected = values[0] @ values[1].T
    difference = (out.cpu() - expected).abs().max()
    assert difference <= SUM_TOLERANCE * expected.abs().max()


def _random_scale(rows: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random scales and their values: E4M3, or E8M0 as bytes 2**(byte - 127)."""
    if dtype is torch.float8_e4m3fn:
        scale = (torch.rand(rows, groups) + 0.1).to(dtype)
        return scale, scale.double()
    exponents = torch.randint(122, 133, (rows, groups))
    return exponents.to(torch.uint8), torch.exp2(exponents.double() - 127)


def test_e8m0_byte_255_is_nan(device):
    if device.type == "cuda":
        pytest.skip("proved of the interpreter only: GPUs differ in what they make of it")
    codes = torch.zeros(128, 64, dtype=torch.uint8)
    scale = torch.full((128, 4), 127, dtype=torch.uint8)
    scale[5, 2] = 255
    out = torch.empty(128, 128)
    _dot_scaled_kernel[(1,)](
        codes, scale, codes, torch.full_like(scale, 127), out,
        M=128, N=128, K=128, GROUP=32, FORMAT="e2m1", PACK=2,
    )  # fmt: skip
    assert out[5].isnan().all()
    assert (out[:5] == 0).all()


@triton.jit
def _counted_kernel(x_ptr, out_ptr, count):
    total = tl.load(x_ptr)
    for step in range(tl.load(x_ptr + 1)):
        total += step
    for _ in tl.range(0, count):
        total += 100
    tl.store(out_ptr, total)


def test_loops_take_bounds_from_tensors_and_arguments(device):
    x = torch.tensor([7, 4], dtype=torch.int32, device=device)
    out = torch.empty(1, dtype=torch.int32, device=device)
    _counted_kernel[(1,)](x, out, 3)
    assert out.item() == 7 + (0 + 1 + 2 + 3) + 300


@triton.autotune([triton.Config({"STEP": 1}), triton.Config({"STEP": 2})], key=[])
@triton.jit
def _autotuned_kernel(out_ptr, STEP: tl.constexpr):
    tl.store(out_ptr, STEP)


def test_autotuned_kernels_run(device):
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _autotuned_kernel[(1,)](out)
    assert out.item() in (1, 2)


def test_red_zones_notice_writes_beside_a_tensor(device):
    from red_zone import RedZones

    for step in (-1, 8):
        zones = RedZones(device)
        out = zones((8,), torch.int32)
        zones.check()
        _write_at_kernel[(1,)](out, step)
        with pytest.raises(AssertionError, match="4 bytes written"):
            zones.check()


@triton.jit
def _write_at_kernel(out_ptr, place):
    tl.store(out_ptr + place, 5)
