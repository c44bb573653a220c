"""NVFP4 products: against float64 products of the dequantised operands, in every kernel."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional

from autoq.kernels import nvfp4
from autoq.kernels._jit import nvfp4_matmul as jit
from autoq.kernels._launch import nvfp4 as elementwise
from autoq.kernels._launch import nvfp4_matmul as launch
from autoq.kernels._launch.nvfp4_variant import Kernel, variant
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._reference import nvfp4 as reference
from autoq.kernels.targets import TARGETS, Target, target_of

if triton.knobs.runtime.interpret:
    import ptx

    ptx.install()

# Few rows and many, rows and columns that no tile divides, with a tail along K and without.
SIZES = [(1, 16, 16), (3, 50, 272), (17, 20, 256), (70, 130, 80), (66, 33, 128)]
# All sizes in the usual type, and the other types where there are tails.
CASES = [
    *((size, torch.bfloat16) for size in SIZES),
    *((SIZES[1], dtype) for dtype in (torch.float16, torch.float32)),
]

SUM_ERROR = 2.0**-16
"""Of the sum of all |products|. Products are exact; float32 sums of 512 of them, 16 at a time,
lose 32 last bits at most, and matrix units cut off a bit or two more. A wrong block scale or a
wrong element is 100 times larger in these sizes."""
LAST_BIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def usual(device) -> Target:
    """The GPU at hand."""
    return target_of(device) or TARGETS["sm_90"]


def _need(kind, device) -> None:
    """Skip kernels for a target of which the GPU at hand cannot do all; the interpreter can."""
    here, wanted = target_of(device), TARGETS[kind]
    if here is not None and (
        here.backend != wanted.backend
        or here.fp8_type < wanted.fp8_type
        or (wanted.nvfp4_matmul and here.architecture != wanted.architecture)
    ):
        pytest.skip(f"{here.name} is not {kind}")


def _random(*shape, device, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _packed(rows, columns, device, seed=1) -> nvfp4.NVFP4Tensor:
    x = _random(rows, columns, device="cpu", seed=seed)
    x *= torch.exp2(torch.arange(rows) % 7 - 3.0)[:, None]  # block scales of many sizes
    return nvfp4.quantize(x, nvfp4.global_scale(x.abs().max())).to(device)


def _parts(packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return packed.codes, packed.block_scale, packed.global_scale


def _values(packed) -> torch.Tensor:
    """Float64: e2m1 * e4m3 * global scale without rounding."""
    one = torch.ones(())
    values = reference.dequantize(packed.codes.cpu(), packed.block_scale.cpu(), one)
    return values.double() * packed.global_scale.cpu().double()


def _assert_close(actual, left, right, bias=None) -> None:
    """`actual` is left @ right.T + bias of float64 operands, but for rounding."""
    assert actual.isfinite().all()
    left, right = left.cpu().double(), right.cpu().double()
    bias = torch.zeros(len(right)).double() if bias is None else bias.cpu().double()
    expected = functional.linear(left, right, bias)
    allowed = SUM_ERROR * functional.linear(left.abs(), right.abs(), bias.abs())
    allowed += LAST_BIT[actual.dtype] * expected.abs()
    error = (actual.cpu().double() - expected).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


@pytest.mark.parametrize(
    ("size", "dtype", "kind"),
    [
        # E4M3 by integers, and by the hardware.
        *((size, dtype, kind) for size, dtype in CASES for kind in ("sm_80", "sm_90")),
        # E2M1 without PTX.
        *((SIZES[1], dtype, "gfx942") for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_weight_only(size, dtype, kind, device):
    _need(kind, device)
    m, n, k = size
    x, weight, bias = _random(m, k, device=device, dtype=dtype), _packed(n, k, device), None
    if m > 1:
        bias = _random(n, device=device, dtype=dtype)
    actual = launch.linear(x, *_parts(weight), bias, None, dtype, target=TARGETS[kind])
    assert (actual.dtype, actual.shape) == (dtype, (m, n))
    _assert_close(actual, x, _values(weight), bias)


@pytest.mark.parametrize(
    ("size", "dtype", "kind"),
    [
        *((size, dtype, kind) for size, dtype in CASES for kind in ("sm_90", "sm_100")),
        (SIZES[1], torch.bfloat16, "sm_120"),
    ],
    ids=str,
)
def test_quantised_input(size, dtype, kind, device):
    _need(kind, device)
    m, n, k = size
    x, weight = _random(m, k, device=device, dtype=dtype), _packed(n, k, device)
    bias, scale = _random(n, device=device), nvfp4.global_scale(3.0).to(device)
    actual = launch.linear(x, *_parts(weight), bias, scale, torch.float32, target=TARGETS[kind])
    seen = nvfp4.NVFP4Tensor(*elementwise.quantize(x, scale, target=TARGETS[kind]), scale)
    _assert_close(actual, _values(seen), _values(weight), bias)
    packed = launch.matmul(
        *_parts(seen), *_parts(weight), bias, torch.float32, target=TARGETS[kind]
    )
    assert torch.equal(packed, actual)


@pytest.mark.parametrize("kind", ["sm_90", "sm_100"])
@pytest.mark.parametrize("tile", [None, Tile(16, 64, 256, 4, 2, split_k=4)], ids=["own", "split"])
def test_sums_that_float32_holds_are_exact(kind, tile, device):
    """All products are multiples of 1/4 and small: any order of adding gives one result."""
    _need(kind, device)
    m, n, k = 5, 40, 528
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-6, 7, (m, k), generator=generator).float()
    x[:, ::16] = 6.0  # so that block scales are 1 and x is what E2M1 holds, or rounds to
    x = nvfp4.fake_quantize(x, torch.tensor(1.0)).to(device)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator).to(torch.uint8).to(device)
    scales = torch.exp2(torch.randint(-1, 3, (n, k // 16), generator=generator).float())
    scales = scales.to(torch.float8_e4m3fn).to(device)
    one = torch.ones((), device=device)
    weight = nvfp4.NVFP4Tensor(codes, scales, one)
    expected = (x.cpu().double() @ _values(weight).T).float()
    for dtype, scale in ((torch.bfloat16, one), (torch.float32, one), (torch.bfloat16, None)):
        actual = launch.linear(
            x.to(dtype),
            *_parts(weight),
            None,
            scale,
            torch.float32,
            target=TARGETS[kind],
            tile=tile,
        )
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("kind", ["sm_90", "sm_100"])
@pytest.mark.parametrize("split", [2, 8])
def test_cut_along_k(split, kind, device):
    """Into parts of which the last are empty: 272 columns are five tiles of 64."""
    _need(kind, device)
    x, weight = _random(7, 272, device=device, dtype=torch.bfloat16), _packed(40, 272, device)
    bias, tile = _random(40, device=device), Tile(16, 64, 64, 4, 2, split_k=split)
    for scale in (None, nvfp4.global_scale(3.0).to(device)):
        args = (*_parts(weight), bias, scale, torch.float16)
        cut = launch.linear(x, *args, target=TARGETS[kind], tile=tile)
        seen = x if scale is None else nvfp4.fake_quantize(x.float().cpu(), scale.cpu())
        _assert_close(cut, seen, _values(weight), bias)
    wide = launch.linear(
        x.float(), *_parts(weight), bias, None, torch.float32, target=TARGETS[kind], tile=tile
    )
    _assert_close(wide, x, _values(weight), bias)


def test_few_rows_are_cut_along_k_and_many_are_not():
    listed = [Tile(16, 128, 128, 4, 4), Tile(16, 64, 128, 4, 4)]
    for rows, parts in ((1, 64), (64, 8), (65, 1)):
        operands = torch.empty(rows, 16384, device="meta"), torch.empty(128, 2048, device="meta")
        assert {tile.split_k for tile in launch._choices(None, listed, operands)} == {parts}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_input_loses_nothing(dtype, device, usual):
    """A sum of what bfloat16 has no bits for, and the ends of the range."""
    x = torch.tensor([[1.0, 2.0**-23, -1.0] + [0.0] * 13, [3e38] + [0.0] * 15], device=device)
    ones = torch.full((2, 8), 0x22, dtype=torch.uint8, device=device)
    scale = torch.ones(2, 1, device=device).to(torch.float8_e4m3fn)
    weight = nvfp4.NVFP4Tensor(ones, scale, torch.ones((), device=device))
    actual = launch.linear(x, *_parts(weight), None, None, torch.float32, target=usual)
    assert torch.equal(actual[0].cpu(), torch.full((2,), 2.0**-23))
    assert actual[1].isfinite().all()
    x[0, 5], x[1, 5] = math.inf, math.nan
    result = launch.linear(x, *_parts(weight), None, None, dtype, target=usual)
    assert result[0].eq(math.inf).all() and result[1].isnan().all()


@pytest.mark.parametrize("kind", ["sm_80", "sm_90", "sm_100"])
def test_a_nan_scale_spoils_its_row_of_the_weight_only(kind, device):
    _need(kind, device)
    weight = _packed(6, 64, device)
    weight.block_scale.view(torch.uint8)[2, 1] = 0x7F
    x = _random(3, 64, device=device, dtype=torch.bfloat16)
    for scale in (None, torch.tensor(0.01, device=device)):
        result = launch.linear(x, *_parts(weight), None, scale, torch.float32, target=TARGETS[kind])
        assert result[:, 2].isnan().all() and result.isnan().sum() == 3


@pytest.mark.parametrize("kind", ["sm_90", "sm_100"])
def test_products_of_nothing(kind, device):
    for m, n, k in ((0, 4, 32), (3, 4, 0), (3, 0, 32)):
        weight = nvfp4.quantize(torch.ones(n, k), torch.tensor(1.0)).to(device)
        bias, x = torch.arange(float(n), device=device), torch.ones(m, k, device=device)
        for scale in (None, torch.ones((), device=device)):
            args = (*_parts(weight), bias, scale, torch.float32)
            result = launch.linear(x, *args, target=TARGETS[kind])
            assert torch.equal(result, bias.expand(m, n))


def test_strided_and_misaligned_operands(device, usual):
    weight = _packed(20, 64, device)
    odd = torch.cat((weight.codes.flatten()[:1], weight.codes.flatten()))[1:].view(20, 32)
    whole = _random(5, 67, device=device, dtype=torch.bfloat16)
    for x in (whole[:, 1:65], whole.t()[3:67].t(), whole.flatten()[1:129].view(2, 64)):
        actual = launch.linear(x, odd, *_parts(weight)[1:], None, None, torch.float32, target=usual)
        _assert_close(actual, x, _values(weight))


def test_the_contract_launches_them(device, usual, monkeypatch, assert_same_bits):
    monkeypatch.setattr(nvfp4, "triton_target", lambda _: usual)
    x, weight = _random(2, 3, 96, device=device, dtype=torch.bfloat16), _packed(10, 96, device)
    scale = nvfp4.global_scale(2.0).to(device)
    result = nvfp4.linear(x, weight, input_scale=scale, out_dtype=torch.float32)
    seen = nvfp4.quantize(x, scale)
    assert_same_bits(nvfp4.dequantize(seen, x.dtype), nvfp4.fake_quantize(x, scale))
    assert torch.equal(result, nvfp4.matmul(seen, weight, out_dtype=torch.float32))
    _assert_close(result.flatten(0, 1), _values(seen).flatten(0, 1), _values(weight))
    own = nvfp4.quantize(x)
    assert_same_bits(own.global_scale.cpu(), nvfp4.global_scale(x.abs().max().cpu()))


def test_the_variant_says_why():
    chosen = {
        (name, rows, quantized): variant(target, rows, 4096, 4096, quantized)
        for name, target in TARGETS.items()
        for rows in (1, 4096)
        for quantized in (False, True)
    }
    scaled = {key for key, value in chosen.items() if value.kernel is Kernel.SCALED}
    assert scaled == {(name, m, True) for name in ("sm_100", "sm_120") for m in (1, 4096)}
    swapped = {key for key, value in chosen.items() if value.swap}
    assert swapped == {
        ("sm_100", 1, True),
        ("sm_120", 4096, False),
        *((name, 4096, quantized) for name in ("sm_80", "sm_89") for quantized in (False, True)),
    }
    assert "no matrix units for NVFP4" in chosen["sm_90", 1, True].reason
    assert "not quantised" in chosen["sm_100", 1, False].reason


@triton.jit
def _raw_kernel(packed_ptr, even_ptr, odd_ptr, FLOAT16: tl.constexpr, ASSEMBLY: tl.constexpr):
    places = tl.arange(0, 256)
    packed = tl.load(packed_ptr + places)
    even, odd = jit.raw_elements(packed, FLOAT16, ASSEMBLY)
    tl.store(even_ptr + places, even)
    tl.store(odd_ptr + places, odd)


@pytest.mark.parametrize("assembly", [False, True], ids=["integers", "assembly"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_byte_becomes_two_numbers(dtype, assembly, device, assert_same_bits):
    if assembly:
        _need("sm_80", device)
    packed = torch.arange(256, dtype=torch.uint8, device=device)
    even, odd = (torch.empty(256, dtype=dtype, device=device) for _ in range(2))
    _raw_kernel[(1,)](packed, even, odd, FLOAT16=dtype == torch.float16, ASSEMBLY=assembly)
    factor = 2.0**126 if dtype == torch.bfloat16 else 2.0**14
    for actual, codes in ((even, packed & 0xF), (odd, packed >> 4)):
        assert_same_bits(actual.cpu().float() * factor, reference.decode(codes.cpu()))
