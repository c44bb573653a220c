"""INT8 weights times 16-bit inputs: exact numbers in, sums in float32, whatever the sizes."""

from dataclasses import replace

import pytest
import torch

from autoq.kernels import int8
from autoq.kernels._launch import int8_weights as launch
from autoq.kernels._launch.int8_variant import DECODE_ROWS
from autoq.kernels._launch.split_k import parts
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._torch import int8 as body
from autoq.kernels.targets import TARGETS, target_of

# The tiles that are shipped: on a GPU those of its own target.
TARGET = (torch.cuda.is_available() and target_of(torch.device("cuda"))) or TARGETS["sm_90"]
WHOLE = Tile(128, 128, 64, warps=8, stages=2)
# Sums of exact products in float32, in an order of the matrix unit's own: far below a millionth of
# the sum of their magnitudes, which the error is held against.
FLOAT32_SUM = 1e-6
# Of the result: a rounding to nearest.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = [torch.bfloat16, torch.float16]


def _operands(m, n, k, dtype, device):
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = (torch.rand(n, 1, generator=generator) + 0.1) * 0.01
    bias = torch.randn(n, generator=generator)
    return tuple(tensor.to(device) for tensor in (x, codes, scale, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_is_the_number_it_stands_for(dtype, device, assert_same_bits):
    """A product with the unit matrix is the weight: float16 and bfloat16 hold all codes."""
    codes = torch.arange(-128, 128, device=device).to(torch.int8).reshape(2, 128)
    scale = torch.tensor([[0.3], [1e-9]], device=device)
    unit = torch.eye(128, device=device).to(dtype)
    out = launch.matmul(unit, codes, scale, None, torch.float32, target=TARGET, tile=WHOLE)
    assert_same_bits(out, body.dequantize(codes, scale, torch.float32).T.contiguous() + 0.0)


# Decoding in one part and in several, prefill; tails of M, N and K, rows that are not aligned.
SIZES = [(1, 1, 1), (1, 130, 1100), (5, 66, 1040), (33, 129, 100), (70, 140, 208)]
SHIPPED = [
    pytest.param(*sizes, tile, id=f"{sizes[0]}_rows-{number}")
    for sizes in SIZES
    for number, tile in enumerate(launch.tiles(TARGET, sizes[0]))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "tile"), SHIPPED)
def test_sums_scales_and_bias(m, n, k, tile, dtype, device, guard):
    x, codes, scale, bias = _operands(m, n, k, dtype, device)
    for offset, out_dtype in ((bias, torch.float32), (None, dtype)):
        out = launch.matmul(
            guard.copy(x),
            guard.copy(codes),
            guard.copy(scale),
            None if offset is None else guard.copy(offset),
            out_dtype,
            target=TARGET,
            tile=replace(tile, split_k=3 if m <= DECODE_ROWS else 1),
        )
        _assert_close(out, x, codes.double() * scale.double(), offset)


def _assert_close(out, x, weight, bias):
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    magnitudes = x.double().abs() @ weight.abs().T + (0 if bias is None else bias.double().abs())
    error = (out.double() - expected).abs()
    assert (error <= FLOAT32_SUM * magnitudes + ROUNDING[out.dtype] * expected.abs()).all()


def test_rows_that_are_not_finite_stay_so(device):
    x, codes, scale, _ = _operands(3, 5, 32, torch.bfloat16, device)
    x[1], scale[2] = float("inf"), float("nan")
    out = launch.matmul(x, codes, scale, None, torch.float32, target=TARGET)
    assert out[:, 2].isnan().all()
    assert not out[1].isfinite().any()
    rest = out[[0, 2]][:, [0, 1, 3, 4]]
    assert rest.isfinite().all()


def test_a_product_is_cut_along_k_where_rows_are_few(device):
    shape = (3, 130, 4096)
    first = launch.tiles(TARGET, 3)[0]
    assert parts(*shape, block_m=first.block_m, block_n=first.block_n) == 8
    x, codes, scale, bias = _operands(*shape, torch.bfloat16, device)
    out = launch.matmul(x, codes, scale, bias, torch.float32, target=TARGET)
    _assert_close(out, x, codes.double() * scale.double(), bias)


def test_operands_with_strides_and_leading_dimensions(device, assert_same_bits):
    x, codes, scale, bias = _operands(24, 30, 64, torch.float16, device)
    plain = launch.matmul(x, codes, scale, bias, torch.float32, target=TARGET)
    strided = launch.matmul(
        x.t().contiguous().t().unflatten(0, (4, 6)),
        codes.t().contiguous().t(),
        scale.expand(30, 2)[:, :1],
        bias,
        torch.float32,
        target=TARGET,
    )
    assert strided.shape == (4, 6, 30)
    assert_same_bits(strided.reshape(24, 30), plain)


@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 0, 16), (3, 4, 0)], ids=str)
def test_empty_products(shape, device):
    x, codes, scale, _ = _operands(*shape, torch.bfloat16, device)
    bias = torch.arange(shape[1], device=device).float()
    out = launch.matmul(x, codes, scale, bias, torch.float32, target=TARGET)
    assert torch.equal(out, bias.expand(shape[:2]))


def test_linear_takes_the_kernel_for_16_bit_inputs_alone(device, monkeypatch):
    x, codes, scale, bias = _operands(5, 7, 48, torch.bfloat16, device)
    weight = int8.INT8Tensor(codes, scale)
    wide = int8.linear(x.float(), weight, bias, quantize_input=False)
    monkeypatch.setattr(int8, "triton_target", lambda _: TARGET)
    monkeypatch.setattr(int8, "dequantize", None)
    out = int8.linear(x.view(1, 5, 48), weight, bias, quantize_input=False, out_dtype=torch.float32)
    _assert_close(out.view(5, 7), x, codes.double() * scale.double(), bias)
    monkeypatch.undo()
    monkeypatch.setattr(launch, "matmul", None)
    monkeypatch.setattr(int8, "triton_target", lambda _: None)
    assert torch.equal(int8.linear(x.float(), weight, bias, quantize_input=False), wide)
