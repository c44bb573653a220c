"""Products of MXFP8 and MXFP4: every kernel against a float64 product of the values."""

import math
from types import SimpleNamespace

import pytest
import torch

from autoq.kernels import _mx_bodies, mxfp4, mxfp8
from autoq.kernels._launch import mx_matmul as launch
from autoq.kernels._launch.mx_variant import Kernel, variant
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._mx import E2M1, E4M3, MXTensor, ScaleRule
from autoq.kernels._torch import mx as body
from autoq.kernels.targets import TARGETS, target_of

# Products are exact and summed in float32 in an order of the hardware's choice: each addition
# rounds by 2**-24 of a partial sum, which is at most the sum of magnitudes, and few go one way.
ACCUMULATION = 2.0**-20
# Matrix units of Hopper keep 13 bits behind the point of the largest product while they add.
HOPPER_FP8_ACCUMULATION = 2.0**-12

PAIRS = pytest.mark.parametrize(
    ("a_element", "b_element"),
    [(E4M3, E4M3), (E4M3, E2M1), (E2M1, E2M1)],
    ids=["8x8", "8x4", "4x4"],
)
# One target for each way a product can go: see `variant` and its test below.
WAYS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx950"]
WEIGHTS = pytest.mark.parametrize("element", [E4M3, E2M1], ids=["mxfp8", "mxfp4"])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def _values(rows: int, k: int, seed: int, device) -> torch.Tensor:
    """Numbers of magnitudes that differ from block to block."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-6, 6, (rows, k // 32, 1), generator=generator).float()
    x = torch.randn(rows, k // 32, 32, generator=generator) * torch.exp2(powers)
    return x.reshape(rows, k).to(device)


def _pack(x: torch.Tensor, element) -> MXTensor:
    return MXTensor(*body.quantize(x, element, ScaleRule.OCP))


def _unpack(packed: MXTensor, dtype=torch.float32) -> torch.Tensor:
    return body.dequantize(packed.codes, packed.block_scale, packed.element, dtype)


def _assert_product(actual, left, right, bias=None, accumulation=ACCUMULATION):
    left, right = left.double(), right.double()
    expected, magnitudes = left @ right.T, left.abs() @ right.abs().T
    if bias is not None:
        expected, magnitudes = expected + bias.double(), magnitudes + bias.double().abs()
    bound = accumulation * magnitudes
    if actual.dtype != torch.float32:
        bound += torch.finfo(actual.dtype).eps * expected.abs()
    excess = ((actual.double() - expected).abs() - bound).max().item()
    assert excess <= 0, f"{excess} beyond the bound"


def _own(device, name: str):
    """On a GPU its own target, in the interpreter the named one."""
    own = target_of(device)
    if own is not None and own.name != name:
        pytest.skip(f"this GPU is {own.name}")
    return TARGETS[name] if own is None else own


def _accumulation(target, device, *product) -> float:
    grouped = variant(target, *product).kernel is Kernel.GROUPED
    return HOPPER_FP8_ACCUMULATION if grouped and device.type == "cuda" else ACCUMULATION


@PAIRS
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    # With tails of K, and tiles that divide it.
    [(3, 70, 544), (37, 33, 96), (131, 70, 224), (5, 40, 512), (70, 40, 256)],
    ids=str,
)
def test_packed_operands(m, n, k, name, a_element, b_element, device):
    target = _own(device, name)
    a, b = _pack(_values(m, k, 1, device), a_element), _pack(_values(n, k, 2, device), b_element)
    bias = _values(1, 32 * math.ceil(n / 32), 3, device)[0, :n]
    out = launch.matmul(a, b, bias, torch.float32, target=target)
    accumulation = _accumulation(target, device, m, n, k, a_element, b_element)
    _assert_product(out, _unpack(a), _unpack(b), bias, accumulation)


# K cut in more parts than there are blocks, tiles longer than K, more rows than there are.
TILES = [
    Tile(32, 64, 64, warps=4, stages=2, split_k=4),
    Tile(64, 32, 256, warps=4, stages=2),
    Tile(64, 16, 32, warps=4, stages=2, split_k=2, group_m=1),
]


@PAIRS
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_any_tile_gives_the_product(tile, name, a_element, b_element, device):
    target, m, n, k = _own(device, name), 70 if name == "sm_90" else 19, 33, 160
    if device.type == "cuda":
        pytest.skip("matrix units do not take all of these")
    a, b = _pack(_values(m, k, 4, device), a_element), _pack(_values(n, k, 5, device), b_element)
    out = launch.matmul(a, b, None, torch.float32, target=target, tile=tile)
    _assert_product(out, _unpack(a), _unpack(b))


@WEIGHTS
@HALVES
@pytest.mark.parametrize("name", ["sm_80", "sm_90"])  # E4M3 by integers, and by the hardware
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 512), (20, 33, 96), (130, 70, 64)], ids=str)
def test_inputs_as_they_are(m, n, k, name, dtype, element, device):
    target = _own(device, name) if device.type == "cpu" else target_of(device)
    x = _values(m, k, 6, device).to(dtype)
    weight = _pack(_values(n, k, 7, device), element)
    bias = torch.linspace(-3, 3, n, device=device).to(dtype)
    out = launch.linear(x, weight, bias, None, ScaleRule.OCP, dtype, target=target)
    assert out.dtype == dtype
    _assert_product(out, x, _unpack(weight, dtype), bias)


@PAIRS
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("rule", ScaleRule)
def test_quantised_inputs(rule, name, a_element, b_element, device):
    target = _own(device, name)
    x = _values(66, 96, 8, device).bfloat16().reshape(2, 33, 96)
    weight = _pack(_values(40, 96, 9, device), b_element)
    out = launch.linear(x, weight, None, a_element, rule, torch.float16, target=target)
    assert out.shape == (2, 33, 40)
    seen = body.fake_quantize(x.float(), a_element, rule)
    accumulation = _accumulation(target, device, 66, 40, 96, a_element, b_element)
    _assert_product(
        out.reshape(66, 40), seen.reshape(66, 96), _unpack(weight), accumulation=accumulation
    )


@PAIRS
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("m", [2, 66])
def test_scales_at_the_ends_of_their_range(m, name, a_element, b_element, device):
    target = _own(device, name)
    a, b = (
        _pack(_values(m, 64, 10, device), a_element),
        _pack(_values(8, 64, 11, device), b_element),
    )
    # 2**-127 and 2**120, 2**100 and 2**-100: the products are of common size.
    for a_byte, b_byte in [(246, 0), (227, 27), (30, 220)]:
        a.block_scale.fill_(a_byte)
        b.block_scale.fill_(b_byte)
        out = launch.matmul(a, b, None, torch.float32, target=target)
        accumulation = _accumulation(target, device, m, 8, 64, a_element, b_element)
        _assert_product(out, _unpack(a), _unpack(b), accumulation=accumulation)


@PAIRS
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("m", [2, 66])
def test_nan_reaches_its_row_and_column(m, name, a_element, b_element, device):
    target = _own(device, name)
    x, w = _values(m, 64, 12, device), _values(8, 64, 13, device)
    x[1, 40], w[3, 5] = math.inf, math.nan
    out = launch.matmul(
        _pack(x, a_element), _pack(w, b_element), None, torch.float32, target=target
    )
    expected = torch.zeros(m, 8, dtype=torch.bool, device=device)
    expected[1], expected[:, 3] = True, True
    assert torch.equal(out.isnan(), expected)


@HALVES
@WEIGHTS
def test_every_code_of_a_weight_under_every_scale(dtype, element, device, assert_same_bits):
    """The identity times a weight is the weight, in the type of the input."""
    target = TARGETS["sm_90"] if device.type == "cpu" else target_of(device)
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    if element is E4M3:
        codes = codes[(codes & 0x7F) != 0x7F]  # NaN times 0 is no 0
        codes = torch.cat((codes, codes[:2]))
    columns = 32 // element.codes_per_byte
    blocks = codes.reshape(-1, columns)
    weight = MXTensor(
        blocks.repeat(255, 1).view(element.dtype),
        torch.arange(255, dtype=torch.uint8, device=device).repeat_interleave(len(blocks))[:, None],
    )
    expected = _unpack(weight, dtype)
    finite = expected.isfinite().all(dim=1)
    weight = MXTensor(
        weight.codes.view(torch.uint8)[finite].view(element.dtype), weight.block_scale[finite]
    )
    # The interpreter takes long for many programs.
    tile = Tile(32, 2048, 32, warps=4, stages=1) if device.type == "cpu" else None
    unit = torch.eye(32, dtype=dtype, device=device)
    out = launch.linear(unit, weight, None, None, ScaleRule.OCP, dtype, target=target, tile=tile)
    # A product has one zero, the sum of many.
    assert_same_bits(out.T.contiguous() + 0.0, expected[finite] + 0.0)


@WEIGHTS
def test_nothing_to_multiply(element, device):
    target = TARGETS["sm_90"] if device.type == "cpu" else target_of(device)
    bias = torch.arange(6.0, device=device)
    for m, n, k in [(0, 6, 64), (3, 0, 64), (3, 6, 0)]:
        x = torch.ones(m, k, dtype=torch.bfloat16, device=device)
        weight = _pack(torch.ones(n, k, device=device), element)
        for inputs in (None, E4M3, E2M1):
            out = launch.linear(
                x, weight, bias[:n], inputs, ScaleRule.OCP, torch.float32, target=target
            )
            assert torch.equal(out, bias[:n].expand(m, n))


def test_operands_that_are_not_contiguous(device):
    target = TARGETS["sm_90"] if device.type == "cpu" else target_of(device)
    x = _values(5, 128, 14, device).bfloat16()[:, 1:97]  # not on addresses of whole words
    weight = _pack(_values(64, 64, 15, device), E2M1)
    weight = MXTensor(weight.codes[::2, :], weight.block_scale[::2, :])
    for operand in (x[:, :64], x.t()[:64].t(), x[:, 31:95]):
        out = launch.linear(
            operand, weight, None, None, ScaleRule.OCP, torch.float32, target=target
        )
        _assert_product(out, operand, _unpack(weight, torch.bfloat16))


@pytest.mark.parametrize("family", [mxfp8, mxfp4], ids=["mxfp8", "mxfp4"])
def test_contracts_reach_the_kernels(family, device, monkeypatch, assert_same_bits):
    """What a GPU's user calls, with the interpreter in the place of the GPU."""
    target = target_of(device) or TARGETS["sm_80"]
    x, w = _values(3, 64, 16, device).bfloat16(), _values(10, 64, 17, device)
    body_weight = family.quantize(w.cpu())
    monkeypatch.setattr(_mx_bodies, "triton_target", lambda _: target)
    weight = family.quantize(w)
    assert torch.equal(weight.codes.cpu().view(torch.uint8), body_weight.codes.view(torch.uint8))
    values = family.dequantize(weight)
    assert_same_bits(values.cpu(), _unpack(body_weight))
    assert_same_bits(family.fake_quantize(w), values)
    accumulation = HOPPER_FP8_ACCUMULATION  # whatever the GPU is
    for case in [
        SimpleNamespace(left=x, quantized=True, out=torch.bfloat16),
        SimpleNamespace(left=x, quantized=False, out=torch.bfloat16),
        SimpleNamespace(left=x.float(), quantized=False, out=torch.float32),  # torch's product
    ]:
        left = body.fake_quantize(case.left, E4M3, ScaleRule.OCP) if case.quantized else case.left
        out = family.linear(case.left, weight, quantize_input=case.quantized)
        assert out.dtype == case.out
        _assert_product(out, left, values, accumulation=accumulation)
    a = mxfp8.quantize(x)
    out = family.matmul(a, weight, out_dtype=torch.float32)
    _assert_product(out, mxfp8.dequantize(a), values, accumulation=accumulation)


def test_the_variant_says_why():
    def ways(a, b):
        return {
            (name, m): variant(target, m, 4096, 4096, a, b)
            for name, target in TARGETS.items()
            for m in (1, 4096)
        }

    for a, b in [(E4M3, E4M3), (E4M3, E2M1), (E2M1, E2M1)]:
        chosen = ways(a, b)
        scaled = {key for key, value in chosen.items() if value.kernel is Kernel.SCALED}
        assert scaled == {(name, m) for name in ("sm_100", "sm_120", "gfx950") for m in (1, 4096)}
        assert {key for key, value in chosen.items() if value.swap} == {("sm_100", 1)}
        grouped = {key for key, value in chosen.items() if value.kernel is Kernel.GROUPED}
        assert grouped == ({("sm_89", 4096), ("sm_90", 4096)} if a is E4M3 else set())
        assert "no matrix units for E4M3" in chosen["sm_80", 4096].reason
    mixed = ways(E4M3, E2M1)
    assert {name for (name, _), value in mixed.items() if value.widen} == {
        "sm_120",
        "sm_89",
        "sm_90",
    }
    assert "but not for E4M3 with E2M1" in mixed["sm_120", 1].reason
    assert "reading the weight" in mixed["sm_90", 1].reason
    assert "no matrix units for E2M1" in ways(E2M1, E2M1)["sm_90", 4096].reason
    as_they_are = ways(None, E2M1).values()
    assert {value.kernel for value in as_they_are} == {Kernel.UPCAST}
    assert {value.reason for value in as_they_are} == {"the input is not quantised"}
