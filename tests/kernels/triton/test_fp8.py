"""FP8 kernels: the bits of the torch body, which tests/kernels/test_fp8.py proves.

Targets: sm_80 rounds by integers, sm_90 by its conversion.
"""

import math

import pytest
import torch
from torch import Tensor

from autoq.kernels import fp8
from autoq.kernels._launch import fp8 as launch
from autoq.kernels._launch.device import rounds_to_e4m3
from autoq.kernels._scaling import Scaling
from autoq.kernels._torch import fp8 as body
from autoq.kernels.targets import TARGETS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG_ROWS = (2, 16400)  # longer than one program holds
CASES = [
    ((1, 1), torch.float32),
    ((7, 129), torch.bfloat16),
    ((7, 129), torch.float16),
    ((3, 4224), torch.float32),
    ((130, 140), torch.bfloat16),
]
every_rounding = pytest.mark.parametrize(
    "target",
    [
        TARGETS["sm_80"],
        pytest.param(TARGETS["sm_90"], marks=pytest.mark.needs("fp8_type")),
    ],
    ids=lambda target: target.name,
)
every_scaling = pytest.mark.parametrize("scaling", list(Scaling), ids=str)


def _hostile(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Magnitudes over 16 decades, zeros of both signs, a row of zeros."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x = x * torch.logspace(-8, 4, shape[-1])
    x[..., ::7] = 0.0
    x[..., 1::9] = -0.0
    x[shape[0] // 2] = 0.0
    return x.to(device, dtype)


def _one_nan(codes: Tensor) -> Tensor:
    """Codes as bytes; the sign of a NaN is not specified."""
    codes = codes.view(torch.uint8)
    return torch.where((codes & 0x7F) == 0x7F, 0x7F, codes)


def _given_scales(shape: tuple[int, ...], scaling: Scaling, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    exponents = torch.randint(-100, 20, scaling.scale_shape(shape), generator=generator)
    mantissas = 1 + torch.rand(scaling.scale_shape(shape), generator=generator)
    return torch.ldexp(mantissas, exponents).to(device)


@every_rounding
@every_scaling
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_own_scales(shape, scaling, dtype, target, device, assert_same_bits):
    x = _hostile(shape, dtype, device)
    scale = body.scales(x, scaling)
    assert_same_bits(launch.scales(x, scaling, target=target), scale)
    codes, own = launch.quantize(x, None, scaling, target=target)
    assert_same_bits(own, scale)
    assert_same_bits(codes, body.quantize(x, scale, scaling))
    values = launch.fake_quantize(x, None, scaling, target=target)
    assert_same_bits(values, body.fake_quantize(x, None, scaling))


@every_rounding
def test_own_scales_of_long_rows(target, device, assert_same_bits):
    x = _hostile(LONG_ROWS, torch.bfloat16, device)
    scale = body.scales(x, Scaling.ROW)
    assert_same_bits(launch.scales(x, Scaling.ROW, target=target), scale)
    codes, own = launch.quantize(x, None, Scaling.ROW, target=target)
    assert_same_bits(own, scale)
    assert_same_bits(codes, body.quantize(x, scale, Scaling.ROW))
    values = launch.fake_quantize(x, None, Scaling.ROW, target=target)
    assert_same_bits(values, body.fake_quantize(x, None, Scaling.ROW))


@every_rounding
@every_scaling
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_given_scales(shape, scaling, dtype, target, device, assert_same_bits):
    x, scale = _hostile(shape, dtype, device), _given_scales(shape, scaling, device)
    codes, same = launch.quantize(x, scale, scaling, target=target)
    assert same is scale
    assert_same_bits(codes, body.quantize(x, scale, scaling))
    values = launch.fake_quantize(x, scale, scaling, target=target)
    assert_same_bits(values, body.fake_quantize(x, scale, scaling))


@pytest.mark.parametrize("target", [TARGETS["sm_80"], TARGETS["sm_90"]], ids=lambda t: t.name)
@every_scaling
@pytest.mark.parametrize(
    ("shape", "dtype"), [((16, 16), d) for d in DTYPES] + [((130, 140), DTYPES[1])], ids=str
)
def test_dequantised_values(shape, scaling, dtype, target, device, assert_same_bits):
    codes = torch.arange(math.prod(shape), device=device).remainder(256).to(torch.uint8)
    codes = codes.masked_fill(codes & 0x7F == 0x7F, 0).view(shape).view(torch.float8_e4m3fn)
    scale = _given_scales(shape, scaling, device)
    values = launch.dequantize(codes, scale, scaling, dtype, target=target)
    assert_same_bits(values, body.dequantize(codes, scale, scaling, dtype))


@every_rounding
def test_nan_codes_dequantise_to_nan(target, device):
    codes = torch.tensor([[0x7F, 0xFF, 0x7E]], dtype=torch.uint8, device=device)
    values = launch.dequantize(
        codes.view(torch.float8_e4m3fn),
        torch.ones((), device=device),
        Scaling.TENSOR,
        torch.float32,
        target=target,
    )
    assert values.isnan().tolist() == [[True, True, False]]


@every_rounding
@every_scaling
@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=str)
def test_nan_and_infinity_spoil_what_shares_their_scale(bad, scaling, target, device):
    x = torch.rand(130, 140, device=device) - 0.5
    x[1, 3] = bad
    codes, scale = launch.quantize(x, None, scaling, target=target)
    torch.testing.assert_close(scale, body.scales(x, scaling), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(_one_nan(codes), _one_nan(body.quantize(x, scale, scaling)))
    values = launch.fake_quantize(x, None, scaling, target=target)
    expected = body.fake_quantize(x, None, scaling)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert expected.isnan().any()


@every_rounding
def test_under_a_given_scale_infinity_saturates_and_nan_stays(target, device):
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]], device=device)
    codes, scale = launch.quantize(x, torch.ones((), device=device), Scaling.TENSOR, target=target)
    assert _one_nan(codes).tolist() == [[0x7E, 0xFE, 0x7F, 0x38]]
    values = launch.fake_quantize(x, scale, Scaling.TENSOR, target=target)
    assert values[0, [0, 1, 3]].tolist() == [448.0, -448.0, 1.0] and values[0, 2].isnan()


@every_scaling
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)], ids=str)
def test_empty_tensors(shape, scaling, device):
    target, x = TARGETS["sm_90"], torch.empty(shape, device=device)
    codes, scale = launch.quantize(x, None, scaling, target=target)
    assert (codes.shape, scale.shape) == (shape, scaling.scale_shape(shape))
    assert (scale == 1).all()
    assert launch.scales(x, scaling, target=target).shape == scale.shape
    assert launch.fake_quantize(x, None, scaling, target=target).shape == shape
    assert launch.dequantize(codes, scale, scaling, x.dtype, target=target).shape == shape


@every_scaling
def test_strided_operands_and_leading_dimensions(scaling, device, assert_same_bits):
    target = TARGETS["sm_90"]
    x = _hostile((150, 140), torch.bfloat16, device).t()
    if scaling is not Scaling.BLOCK_128X128:
        x = x.unflatten(0, (7, 20))
    codes, scale = launch.quantize(x, None, scaling, target=target)
    assert_same_bits(scale, body.scales(x, scaling))
    assert_same_bits(codes, body.quantize(x, scale, scaling))
    strided = codes.transpose(0, -1).contiguous().transpose(0, -1)
    values = launch.dequantize(strided, scale, scaling, x.dtype, target=target)
    assert_same_bits(values, body.fake_quantize(x, None, scaling))


def test_all_partial_maxima_count(monkeypatch, device, assert_same_bits):
    """More blocks than programs that look for the largest; it sits in the last element."""
    monkeypatch.setattr(launch, "_MOST_PARTIAL_MAXIMA", 16)
    x = torch.zeros(4096 * 20 + 3, device=device)
    x[-1] = -3.0
    scale = launch.scales(x[None], Scaling.TENSOR, target=TARGETS["sm_90"])
    assert_same_bits(scale, body.scales(x, Scaling.TENSOR))


def test_which_targets_convert_by_hardware(monkeypatch):
    import triton

    def by_hardware() -> set[str]:
        return {name for name, target in TARGETS.items() if rounds_to_e4m3(target)}

    monkeypatch.setattr(triton, "__version__", "3.8.1")
    assert by_hardware() == {"sm_90", "sm_100", "sm_120"}
    monkeypatch.setattr(triton, "__version__", "3.10.0+git1")
    assert by_hardware() == {"sm_89", "sm_90", "sm_100", "sm_120"}


@every_scaling
def test_the_contract_launches_them(scaling, monkeypatch, device, assert_same_bits):
    """Everything through autoq.kernels.fp8, as on a GPU."""
    x = _hostile((3, 140), torch.bfloat16, device).requires_grad_()
    expected = fp8.quantize(x.cpu(), scaling=scaling)
    monkeypatch.setattr(fp8, "triton_target", lambda _: TARGETS["sm_80"])
    for packed in (
        fp8.quantize(x, scaling=scaling),
        fp8.quantize(x, fp8.scales(x, scaling), scaling=scaling),
    ):
        assert_same_bits(packed.codes.cpu(), expected.codes)
        assert_same_bits(packed.scale.cpu(), expected.scale)
    values = fp8.dequantize(packed, x.dtype)
    assert_same_bits(fp8.fake_quantize(x, scaling=scaling), values)
    assert_same_bits(fp8.fake_quantize(x, packed.scale, scaling=scaling), values)
