"""Products with INT4 weights: exact numbers in, sums in float32, whatever the sizes."""

from dataclasses import replace

import pytest
import torch
import triton

from autoq.kernels import fp8, int4, w4a8
from autoq.kernels._launch import int4 as element_wise
from autoq.kernels._launch import int4_matmul as launch
from autoq.kernels._launch import int4_variant
from autoq.kernels._launch.int4_tiles import listed
from autoq.kernels._launch.int4_variant import DECODE_ROWS, Kernel, Product, variant
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._torch import int4 as body
from autoq.kernels._torch import w4a8 as two_level_body
from autoq.kernels.targets import TARGETS, target_of

if triton.knobs.runtime.interpret:
    import ptx

    ptx.install()

FEW = Tile(16, 64, 128, warps=4, stages=2)
WHOLE = Tile(128, 128, 128, warps=8, stages=2)
# Sums of exact products in float32, in an order of the matrix unit's own: far below a millionth of
# the sum of their magnitudes, which the error is held against. FP8 units of Hopper and Ada keep
# about 14 bits of a sum; there the tests take the second.
FLOAT32_SUM = 1e-6
FP8_SUM = 2e-3
# Of the result: a rounding to nearest.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Inline PTX on matrix units of every kind, and the operations that stand for it elsewhere.
targets = pytest.mark.parametrize(
    "target",
    [
        pytest.param("sm_90", marks=pytest.mark.needs("fp8_type")),
        "sm_80",
        pytest.param("gfx950", marks=pytest.mark.needs("fp8_type")),
        "gfx942",
    ],
)
products = pytest.mark.parametrize(
    ("product", "dtype"),
    [
        (Product.W4A16, torch.bfloat16),
        (Product.W4A16, torch.float16),
        (Product.W4A8, torch.float8_e4m3fn),
        (Product.TWO_LEVEL, torch.float8_e4m3fn),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


def _weight(n, k, group_size, device):
    """All bytes of codes, and scales."""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator).to(torch.uint8)
    scale = (torch.rand(n, k // group_size, generator=generator) + 0.1) * 0.01
    return codes.to(device), scale.to(device)


@targets
@products
@pytest.mark.parametrize("group_size", [32, 128])
def test_every_code_is_the_number_it_stands_for(
    group_size, product, dtype, target, device, assert_same_bits
):
    """A product with the unit matrix is the weight: no code, rate or rounding is off by a bit."""
    k, n = 128, 128
    codes = torch.arange(256, device=device).to(torch.uint8).reshape(4, 64).repeat(n // 4, 1)
    scale = torch.logspace(-9, 4, n * k // group_size, device=device).reshape(n, -1)
    unit = torch.eye(k, device=device).to(dtype)
    tensor_scale = None
    values = body.dequantize(codes, scale, torch.float32)
    if product is Product.TWO_LEVEL:
        # Rates from those that vanish to those that saturate; 136.05 is above a tie of E4M3.
        tensor_scale = torch.tensor(0.0625, device=device)
        scale[::7] = 0.0625 * 136.05
        scale[1::7] = 1e6
        values = two_level_body.dequantize(codes, scale, tensor_scale, torch.float32)
    out = launch.matmul(
        unit,
        codes,
        scale,
        None,
        torch.float32,
        tensor_scale=tensor_scale,
        target=TARGETS[target],
        tile=WHOLE,
    )
    assert_same_bits(out, values.T.contiguous() + 0.0)


# The tiles that are shipped: on a GPU those of its own target.
TARGET = (torch.cuda.is_available() and target_of(torch.device("cuda"))) or TARGETS["sm_90"]
SIZES = [
    (1, 1, 128, 128, torch.float32),
    (5, 70, 1152, 128, torch.bfloat16),
    (33, 129, 192, 64, torch.float16),
    (70, 140, 256, 256, torch.float32),
]
SHIPPED = [
    pytest.param(*sizes, product, tile, id=f"{product}-{sizes[0]}_rows-{number}")
    for sizes in SIZES
    for product in Product
    for number, tile in enumerate(listed(TARGET, product, sizes[0]))
]


@pytest.mark.parametrize(("m", "n", "k", "group_size", "out_dtype", "product", "tile"), SHIPPED)
def test_sums_scales_and_bias(m, n, k, group_size, out_dtype, product, tile, device, guard):
    dtype = torch.bfloat16 if product is Product.W4A16 else torch.float8_e4m3fn
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    codes, scale = _weight(n, k, group_size, device)
    bias = torch.randn(n, generator=generator).to(device)
    row_scale, tensor_scale, rows = None, None, torch.ones(m, 1, device=device)
    values = body.dequantize(codes, scale, torch.float32)
    if product is not Product.W4A16:
        row_scale = rows = torch.rand(m, 1, generator=generator).to(device) + 0.5
    if product is Product.TWO_LEVEL:
        tensor_scale = torch.tensor(0.0123, device=device)
        values = two_level_body.dequantize(codes, scale, tensor_scale, torch.float32)
    out = launch.matmul(
        guard.copy(x.view(torch.uint8) if product is not Product.W4A16 else x).view(dtype),
        guard.copy(codes),
        guard.copy(scale),
        guard.copy(bias),
        out_dtype,
        row_scale=row_scale,
        tensor_scale=tensor_scale,
        target=TARGET,
        tile=replace(tile, split_k=3 if m <= DECODE_ROWS else 1),
    )
    _assert_close(out, x.double() * rows, values, bias, _sum_error(product, device))


def _sum_error(product: Product, device: torch.device) -> float:
    limited = device.type == "cuda" and torch.cuda.get_device_capability() in ((8, 9), (9, 0))
    return FP8_SUM if limited and product is not Product.W4A16 else FLOAT32_SUM


def _assert_close(out, x, weight, bias, sum_error) -> None:
    """`out` beside x @ weight.T + bias in float64."""
    weight, bias = weight.double(), bias.double()
    expected = x @ weight.T + bias
    magnitude = x.abs() @ weight.abs().T + bias.abs()
    allowed = sum_error * magnitude + ROUNDING[out.dtype] * expected.abs()
    excess = ((out.double() - expected).abs() / allowed).max().item()
    assert excess <= 1, f"{excess:.2f} times the error that is allowed"


@pytest.mark.parametrize("shape", [(), (2, 0, 5), (2, 5)], ids=str)
def test_leading_dimensions(shape, device):
    x = torch.randn(*shape, 128, device=device).bfloat16()
    codes, scale = _weight(9, 128, 64, device)
    out = launch.matmul(x, codes, scale, None, torch.float32, target=TARGETS["sm_80"], tile=FEW)
    assert out.shape == (*shape, 9)
    values = body.dequantize(codes, scale, torch.float32)
    torch.testing.assert_close(out, x.float() @ values.T, rtol=1e-5, atol=1e-5)


def test_one_scale_for_all_rows_and_strided_operands(device, assert_same_bits):
    x = torch.randn(256, 6, device=device).to(torch.float16).t()
    codes, scale = _weight(9, 256, 128, device)

    def product(x, codes, scale, row_scale):
        return launch.matmul(
            x,
            codes,
            scale,
            None,
            torch.float32,
            row_scale=row_scale,
            target=TARGETS["sm_80"],
            tile=FEW,
        )

    expected = product(x.contiguous(), codes, scale, torch.full((6, 1), 0.3, device=device))
    turned = codes.t().contiguous().t(), scale.t().contiguous().t()
    assert_same_bits(product(x, *turned, torch.tensor(0.3, device=device)), expected)


def test_operands_that_are_not_aligned(device, monkeypatch, assert_same_bits):
    codes, scale = _weight(9, 128, 128, device)
    x = torch.randn(3, 128, device=device).half()
    started = []
    monkeypatch.setattr(
        launch,
        "_launch",
        lambda operands, *rest, stock=launch._launch: (
            started.append(operands) or stock(operands, *rest)
        ),
    )
    results = []
    for offset in (0, 1):
        shifted = [torch.cat((part.view(-1)[:offset], part.view(-1))) for part in (x, codes)]
        views = [
            part[offset:].view(like.shape) for part, like in zip(shifted, (x, codes), strict=True)
        ]
        results.append(
            launch.matmul(
                views[0], views[1], scale, None, torch.float32, target=TARGETS["sm_80"], tile=FEW
            )
        )
        for part in (started[-1].x, started[-1].codes):
            assert part.data_ptr() % 16 == 0
    assert_same_bits(*results)


@products
@pytest.mark.parametrize("rows", [1, 65])
def test_contracts_launch_what_they_say(rows, product, dtype, device, monkeypatch):
    generator = torch.Generator().manual_seed(rows)
    x_dtype = torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype
    x = torch.randn(rows, 128, generator=generator).to(device, x_dtype)
    bias = torch.randn(70, generator=generator).to(device)
    two_level = w4a8.quantize(torch.randn(70, 128, generator=generator).to(device))
    packed = two_level if product is Product.TWO_LEVEL else two_level.int4
    target = TARGETS["sm_80"] if device.type == "cpu" else fp8.triton_target(device)
    for module in (int4, w4a8):
        monkeypatch.setattr(module, "triton_target", lambda device: target)
    if product is Product.W4A16:
        values, dequantized = x.double(), int4.dequantize(packed)
        results = [int4.linear(x, packed, bias, out_dtype=torch.float32)]
        inputs = [values]
    else:
        dequantize = w4a8.dequantize if product is Product.TWO_LEVEL else int4.dequantize
        dequantized, scale = dequantize(packed), torch.tensor(0.01, device=device)
        results = [
            w4a8.linear(x, packed, bias, input_scale=given, out_dtype=torch.float32)
            for given in (None, scale)
        ]
        kept = fp8.quantize(x, scaling=fp8.Scaling.ROW), fp8.quantize(x, scale)
        inputs = [fp8.dequantize(codes).double() for codes in kept]
    for out, values in zip(results, inputs, strict=True):
        _assert_close(out, values, dequantized, bias, _sum_error(product, device))


def test_many_rows_of_two_levels_unpack_the_weight(device, monkeypatch):
    monkeypatch.setattr(int4_variant, "MOST_FUSED_ROWS", 64)
    unpacked = []
    monkeypatch.setattr(
        element_wise,
        "to_e4m3",
        lambda *operands, stock=element_wise.to_e4m3, **named: (
            unpacked.append(stock(*operands, **named)) or unpacked[-1]
        ),
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(65, 256, generator=generator).to(device)
    packed = w4a8.quantize(torch.randn(70, 256, generator=generator).to(device))
    bias = torch.randn(70, generator=generator).to(device)
    target = TARGETS["sm_90"] if device.type == "cpu" else fp8.triton_target(device)
    if not target.fp8_matmul:
        pytest.skip(f"{target.name} multiplies no E4M3")
    for module in (int4, w4a8):
        monkeypatch.setattr(module, "triton_target", lambda device: target)
    out = w4a8.linear(x, packed, bias)
    values = fp8.dequantize(fp8.quantize(x, scaling=fp8.Scaling.ROW)).double()
    error = _sum_error(Product.TWO_LEVEL, device)
    _assert_close(out, values, w4a8.dequantize(packed), bias, error)
    assert len(unpacked) == 1


@targets
@pytest.mark.parametrize(("shape", "group_size"), [((3, 36), 12), ((7, 384), 128)], ids=str)
def test_weight_in_e4m3(shape, group_size, target, device, assert_same_bits):
    codes, scale = _weight(*shape, group_size, device)
    tensor_scale = torch.tensor(2.0**-10, device=device)
    actual = element_wise.to_e4m3(codes, scale, tensor_scale, target=TARGETS[target])
    expected = two_level_body.dequantize(codes, scale, tensor_scale, torch.float32)
    assert_same_bits(actual.float() * tensor_scale, expected)


@pytest.mark.parametrize(
    ("target", "m", "product", "kernel", "reason"),
    [
        ("sm_90", 64, Product.TWO_LEVEL, Kernel.DECODE, "64 rows are bound by reading"),
        ("sm_90", 65, Product.TWO_LEVEL, Kernel.TILED, "do not pay for unpacking"),
        ("sm_90", 1025, Product.TWO_LEVEL, Kernel.UNPACKED, "1025 rows pay for unpacking"),
        ("sm_80", 1025, Product.TWO_LEVEL, Kernel.TILED, "no matrix units for E4M3"),
        ("sm_90", 1025, Product.W4A8, Kernel.TILED, "codes stay packed"),
        ("gfx942", 4096, Product.W4A16, Kernel.TILED, "codes stay packed"),
    ],
)
def test_variant_says_why(target, m, product, kernel, reason):
    chosen = variant(TARGETS[target], m, 4096, 4096, product)
    assert chosen.kernel is kernel and reason in chosen.reason


def test_groups_without_a_product_take_the_torch_body(device, monkeypatch, assert_same_bits):
    monkeypatch.setattr(int4, "triton_target", lambda device: TARGETS["sm_80"])
    x = torch.randn(2, 96, device=device).half()
    packed = int4.quantize(torch.randn(8, 96, device=device), group_size=48)
    expected = torch.nn.functional.linear(x, int4.dequantize(packed, x.dtype))
    assert_same_bits(int4.linear(x, packed), expected)
