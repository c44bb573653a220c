"""FP8 products: every kernel against a float64 product of the dequantised operands."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from autoq.kernels import fp8
from autoq.kernels._launch import fp8_matmul as launch
from autoq.kernels._launch import fp8_tiles, tiles
from autoq.kernels._launch.fp8_matmul import Kernel, Variant
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._scaling import FP8Tensor, Scaling
from autoq.kernels._torch import fp8 as body
from autoq.kernels.targets import TARGETS

# Of the sum of the products' magnitudes: float32 sums of at most 1000 products, in any order.
SUM_TOLERANCE = 1e-5

# Hopper's matrix units keep about 13 bits of a sum of E4M3 products.
E4M3_UNIT_TOLERANCE = 2e-3

TENSOR, ROW, BLOCK_1X128, BLOCK_128X128 = Scaling
SCALINGS = [
    (ROW, ROW),
    (TENSOR, TENSOR),
    (TENSOR, ROW),
    (BLOCK_1X128, BLOCK_128X128),
    (BLOCK_1X128, BLOCK_1X128),
]
BY_ROW, BY_BLOCK = SCALINGS[0], SCALINGS[3]
PRODUCTS = [
    *((shape, BY_ROW) for shape in [(1, 1, 16), (17, 130, 300), (64, 48, 700), (65, 33, 129)]),
    *((shape, BY_BLOCK) for shape in [(1, 200, 300), (130, 136, 272)]),
    *(((20, 70, 144), scalings) for scalings in SCALINGS),
]

NATIVE, UPCAST = TARGETS["sm_90"], TARGETS["sm_80"]
every_target = pytest.mark.parametrize(
    "target",
    [UPCAST, pytest.param(NATIVE, marks=pytest.mark.needs("fp8_matmul"))],
    ids=lambda target: target.name,
)
both_kernels = pytest.mark.parametrize("scalings", [BY_ROW, BY_BLOCK], ids=["scaled", "in_blocks"])


def _packed(rows: int, columns: int, scaling: Scaling, device: torch.device) -> FP8Tensor:
    """Numbers whose magnitudes differ by row and by column, so that every scale counts."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    x *= torch.logspace(-2, 1, rows)[:, None] * torch.logspace(1, -1, columns)
    x = x.to(device)
    scale = body.scales(x, scaling)
    return FP8Tensor(body.quantize(x, scale, scaling), scale, scaling)


def _values(packed: FP8Tensor) -> Tensor:
    return body.dequantize(packed.codes, packed.scale, packed.scaling, torch.float32).double()


def _check(out: Tensor, a: FP8Tensor, b: FP8Tensor, bias: Tensor | None, native: bool) -> None:
    left, right = _values(a), _values(b)
    expected = left @ right.T
    magnitude = left.abs() @ right.abs().T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    by_units = native and out.is_cuda
    tolerance = (E4M3_UNIT_TOLERANCE if by_units else SUM_TOLERANCE) * magnitude
    rounding = torch.finfo(out.dtype).eps / 2 * expected.abs()
    error = (out.double() - expected).abs()
    assert (error <= tolerance + 1.01 * rounding).all(), (error / magnitude).max()


def _bias(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(device, dtype)


@every_target
@pytest.mark.parametrize(("shape", "scalings"), PRODUCTS, ids=lambda case: "*".join(map(str, case)))
def test_products(shape, scalings, target, device):
    """By the variant that the sizes ask for: few rows and many, all tails, scales of each kind."""
    m, n, k = shape
    a, b = _packed(m, k, scalings[0], device), _packed(n, k, scalings[1], device)
    bias = _bias(n, torch.float32, device)
    out = launch.matmul(a, b, bias, torch.float32, target=target)
    assert (out.shape, out.dtype) == ((m, n), torch.float32)
    _check(out, a, b, bias, target.fp8_matmul)


@every_target
@both_kernels
@pytest.mark.parametrize(
    ("split_k", "dtype"), [(2, torch.float32), (8, torch.bfloat16), (8, torch.float16)], ids=str
)
def test_parts_of_k(split_k, dtype, scalings, target, device):
    """Eight parts of seven blocks: the last is empty."""
    m, n, k = 5, 72, 880
    a, b = _packed(m, k, scalings[0], device), _packed(n, k, scalings[1], device)
    tile = replace(fp8_tiles.SCALED.decode["sm_90"][0], split_k=split_k)
    chosen = Variant(Kernel.DECODE, (tile,), "to be tested")
    for bias in (None, _bias(n, dtype, device)):
        out = launch.matmul(a, b, bias, dtype, target=target, chosen=chosen)
        assert out.dtype == dtype
        _check(out, a, b, bias, target.fp8_matmul)


@pytest.mark.needs("bulk_copy")
@pytest.mark.parametrize(
    ("scalings", "dtype"),
    [(BY_ROW, torch.bfloat16), ((TENSOR, ROW), torch.float32), (BY_BLOCK, torch.bfloat16)],
    ids=["row", "tensor", "in_blocks"],
)
def test_persistent_programs(scalings, dtype, monkeypatch, device):
    """Two programs, six tiles, the last of each direction and of k filled in part."""
    monkeypatch.setattr(launch, "multiprocessors_of", lambda _: 2)
    m, n, k = 264, 136, 144
    a, b = _packed(m, k, scalings[0], device), _packed(n, k, scalings[1], device)
    chosen = Variant(Kernel.PERSISTENT, (Tile(128, 128, 128, 8, 3),), "to be tested")
    bias = _bias(n, dtype, device)
    out = launch.matmul(a, b, bias, dtype, target=NATIVE, chosen=chosen)
    _check(out, a, b, bias, native=True)


@pytest.mark.needs("bulk_copy")
def test_two_persistent_programs_a_multiprocessor(monkeypatch, device):
    monkeypatch.setattr(launch, "multiprocessors_of", lambda _: 1)
    a, b = _packed(200, 32, ROW, device), _packed(16, 32, ROW, device)
    chosen = Variant(Kernel.PERSISTENT, (Tile(64, 128, 128, 4, 3),), "to be tested")
    out = launch.matmul(a, b, None, torch.bfloat16, target=NATIVE, chosen=chosen)
    _check(out, a, b, None, native=True)


@pytest.mark.parametrize("scalings", [BY_ROW, BY_BLOCK], ids=["scaled", "in_blocks"])
@pytest.mark.parametrize("kernel", list(Kernel))
def test_the_autotuner_takes_each_tile(kernel, scalings, monkeypatch, device):
    """The second tile too, for which descriptors need other blocks than they were made with."""
    if device.type == "cuda":
        pytest.skip("there all tests go by the autotuner, and times that are made up may be kept")

    def autotuned(stock, choices, operand, *, before_launch=None, apart=None):
        return tiles._autotuned(stock, tuple(choices), before_launch, apart), {}

    monkeypatch.setattr(launch, "tuned", autotuned)
    by_width = lambda _, *__, config, **___: [config.kwargs["BLOCK_N"]] * 3
    monkeypatch.setattr(Autotuner, "_bench", by_width)
    a, b = _packed(70, 128, scalings[0], device), _packed(136, 128, scalings[1], device)
    wide, narrow = Tile(128, 128, 128, 4, 3), Tile(64, 64, 128, 4, 3)
    for both in ((wide, narrow), (narrow, wide)):
        chosen = Variant(kernel, both, "to be tested")
        out = launch.matmul(a, b, None, torch.float32, target=NATIVE, chosen=chosen)
        _check(out, a, b, None, native=True)


@every_target
def test_nan_codes_give_nan(target, device):
    a, b = _packed(3, 32, ROW, device), _packed(20, 32, ROW, device)
    codes = a.codes.view(torch.uint8).clone()
    codes[1, 5] = 0xFF
    out = launch.matmul(
        replace(a, codes=codes.view(torch.float8_e4m3fn)), b, None, torch.float32, target=target
    )
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert out[[0, 2]].isfinite().all()


@pytest.mark.needs("mx_matmul")
@both_kernels
@pytest.mark.parametrize("kernel", list(Kernel))
def test_products_with_unit_scales(kernel, scalings, device):
    """sm_120 takes its instruction with block scales, all of them 1."""
    a, b = _packed(70, 144, scalings[0], device), _packed(136, 144, scalings[1], device)
    tile = Tile(64, 128, 128, 4, 3, split_k=2 if kernel is Kernel.DECODE else 1)
    chosen = Variant(kernel, (tile,), "to be tested")
    out = launch.matmul(a, b, None, torch.float32, target=TARGETS["sm_120"], chosen=chosen)
    _check(out, a, b, None, native=True)


@every_target
def test_every_code_is_multiplied_as_it_decodes(target, device):
    """A product with an identity matrix, subnormal codes too."""
    codes = torch.arange(256, device=device).to(torch.uint8)
    codes = codes.masked_fill(codes & 0x7F == 0x7F, 0).view(16, 16).view(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    a = FP8Tensor(codes, one, TENSOR)
    identity = FP8Tensor(torch.eye(16, device=device).to(torch.float8_e4m3fn), one, TENSOR)
    out = launch.matmul(a, identity, None, torch.float32, target=target)
    assert torch.equal(out, codes.float())


@every_target
def test_strided_misaligned_and_batched_operands(target, device):
    a, b = _packed(40, 48, ROW, device), _packed(24, 48, ROW, device)
    expected = launch.matmul(a, b, None, torch.float32, target=target)
    shifted = torch.zeros(40 * 48 + 1, dtype=torch.uint8, device=device)
    shifted[1:] = a.codes.view(torch.uint8).flatten()
    misaligned = shifted[1:].view(40, 48).view(torch.float8_e4m3fn)
    strided = b.codes.view(torch.uint8).t().contiguous().t().view(torch.float8_e4m3fn)
    out = launch.matmul(
        replace(a, codes=misaligned), replace(b, codes=strided), None, torch.float32, target=target
    )
    assert torch.equal(out, expected)
    batched = replace(a, codes=a.codes.view(2, 20, 48), scale=a.scale.view(2, 20, 1))
    out = launch.matmul(batched, b, None, torch.float32, target=target)
    assert torch.equal(out, expected.view(2, 20, 24))


@every_target
@both_kernels
def test_empty_products(scalings, target, device):
    def packed(rows: int, columns: int, scaling: Scaling) -> FP8Tensor:
        codes = torch.zeros(rows, columns, device=device).to(torch.float8_e4m3fn)
        scale = torch.ones(scaling.scale_shape(codes.shape), device=device)
        return FP8Tensor(codes, scale, scaling)

    bias = _bias(20, torch.float32, device)
    for m, n, k in ((0, 20, 32), (3, 0, 32), (3, 20, 0)):
        a, b = packed(m, k, scalings[0]), packed(n, k, scalings[1])
        out = launch.matmul(a, b, bias[:n], torch.float32, target=target)
        assert torch.equal(out, bias[:n].expand(m, n))


@pytest.mark.parametrize("weight_scaling", list(Scaling), ids=str)
def test_the_contract_launches_them(weight_scaling, monkeypatch, device):
    """autoq.kernels.fp8.linear and matmul as on a GPU, beside functional.linear of the values."""
    monkeypatch.setattr(fp8, "triton_target", lambda _: UPCAST)
    x = torch.randn(2, 3, 200, device=device, dtype=torch.bfloat16)
    weight = fp8.quantize(torch.randn(40, 200, device=device), scaling=weight_scaling)
    bias = _bias(40, torch.bfloat16, device)
    scaling = BLOCK_1X128 if weight_scaling.in_blocks else ROW
    packed = fp8.quantize(x, scaling=scaling)
    _check_contract(fp8.linear(x, weight, bias), packed, weight, bias)
    out = fp8.matmul(packed, weight, bias, out_dtype=torch.float16)
    assert out.dtype == torch.float16
    _check_contract(out, packed, weight, bias)
    if not weight_scaling.in_blocks:
        scale = fp8.tensor_scale(3.0).to(device)
        out = fp8.linear(x, weight, input_scale=scale, out_dtype=torch.float32)
        assert out.dtype == torch.float32
        _check_contract(out, fp8.quantize(x, scale), weight, None)


def _check_contract(out: Tensor, a: FP8Tensor, weight: FP8Tensor, bias: Tensor | None) -> None:
    rows = math.prod(out.shape[:-1])
    flat = replace(a, codes=a.codes.view(rows, -1))
    if a.scale.ndim:
        flat = replace(flat, scale=a.scale.view(rows, -1))
    _check(out.view(rows, -1), flat, weight, bias, native=False)


def _variant(target: str, m: int, n: int = 4096, k: int = 4096, **changes: object) -> Variant:
    options = {"scaling": ROW, "out_dtype": torch.bfloat16, **changes}
    return launch.variant(TARGETS[target], m, n, k, **options)


def test_which_kernel_takes_which_product():
    assert _variant("sm_90", 1).kernel is Kernel.DECODE
    assert {tile.block_m for tile in _variant("sm_90", 33).tiles} == {64}
    assert {tile.split_k for tile in _variant("sm_90", 8).tiles} == {4}
    assert _variant("sm_90", 65).kernel is Kernel.TILED
    assert _variant("sm_90", 8192).kernel is Kernel.PERSISTENT
    assert _variant("sm_90", 8192, scaling=BLOCK_128X128).kernel is Kernel.PERSISTENT
    for target, changes, reason in (
        ("sm_90", {"n": 4097}, "rows of 4097 results cannot be stored in bulk"),
        ("sm_90", {"scaling": BLOCK_1X128}, "each row of the right operand has its own scales"),
        ("sm_90", {"n": 128}, "64 tiles do not occupy a GPU twice"),
        ("sm_89", {}, "sm_89 has no tensor descriptors"),
        ("gfx950", {}, "gfx950 has no tensor descriptors"),
    ):
        found = _variant(target, 8192, **changes)
        assert (found.kernel, found.reason) == (Kernel.TILED, reason)


@pytest.mark.parametrize("lists", [fp8_tiles.SCALED, fp8_tiles.IN_BLOCKS], ids=["scaled", "blocks"])
def test_every_target_has_tiles(lists):
    for name, target in TARGETS.items():
        assert lists.decode[name] and lists.tiled[name]
        assert (name in lists.persistent) == target.bulk_copy
