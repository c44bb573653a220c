"""Packed layers on kernels: from a module's buffers through the contract to the launch.

The kernels' own tests prove their arithmetic; this one that layers reach them with operands that
they take: inputs of three dimensions, not contiguous, of one row, of none; biases; experts.
"""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from autoq.formats import FORMATS
from autoq.kernels import dispatch
from autoq.kernels.targets import TARGETS
from autoq.layers import Container, LayerCalibration, quantize_weight
from autoq.layers._codecs import LINEARS
from autoq.layers.packed import PackedExperts, PackedLinear

ROWS, COLUMNS = 48, 256
CASES = [
    ("fp8", Container.MODELOPT),
    ("nvfp4", Container.MODELOPT),
    ("w4a8_awq", Container.MODELOPT),
    ("w4a8_awq", Container.COMPRESSED_TENSORS),
    ("fp8_pc_pt", Container.MODELOPT),
    ("fp8_block", Container.MODELOPT),
    ("mxfp8", Container.MODELOPT),
    ("mxfp8", Container.COMPRESSED_TENSORS),
    ("mxfp4", Container.COMPRESSED_TENSORS),
    ("int4_awq", Container.MODELOPT),
    ("int8_sq", Container.COMPRESSED_TENSORS),
    ("int8_wo", Container.COMPRESSED_TENSORS),
    ("nvfp4_wo", Container.MODELOPT),
    ("int4_dq", Container.MODELOPT),
]


def test_every_product_is_among_the_cases():
    products = {
        (type(_layer(fmt, container).packed), FORMATS[fmt].activation_in(container))
        for fmt, container in CASES
    }
    assert products == set(LINEARS)


def _layer(fmt: str, container: Container, **options: object) -> PackedLinear:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    calibration = LayerCalibration(weight_amax=weight.abs().max().item(), input_amax=3.7)
    packed = quantize_weight(weight, FORMATS[fmt], calibration, scale_dtype=torch.float32)
    return PackedLinear(
        packed, calibration, container=container, dtype=torch.float32, **options
    ).requires_grad_(False)


@pytest.fixture
def on_kernels(device, monkeypatch):
    """A context in which contracts choose kernels; in the interpreter for a GPU that is not here."""

    @contextmanager
    def kernels():
        with monkeypatch.context() as patched:
            if device.type == "cpu":
                choice = dispatch.Choice(dispatch.Implementation.TRITON, "a test says so")
                patched.setattr(dispatch, "choose", lambda _: choice)
                # No NVIDIA one: what is written in PTX for them the interpreter cannot run.
                patched.setattr(dispatch, "target_of", lambda _: TARGETS["gfx950"])
            yield

    return kernels


def _inputs():
    generator = torch.Generator().manual_seed(1)
    yield torch.randn(2, 3, COLUMNS, generator=generator)
    yield torch.randn(COLUMNS, 5, generator=generator).t()
    yield torch.randn(1, COLUMNS, generator=generator)
    yield torch.empty(0, COLUMNS)


@pytest.mark.parametrize(("fmt", "container"), CASES)
def test_layer_on_kernels_is_the_layer_on_a_cpu(fmt, container, device, on_kernels):
    bias = nn.Parameter(torch.linspace(-1, 1, ROWS))
    for transposed in (False, True):
        layer = _layer(fmt, container, bias=bias, transposed=transposed)
        for x in _inputs():
            expected = layer.cpu()(x)
            with on_kernels():
                found = layer.to(device)(x.to(device))
            assert found.shape == expected.shape and found.dtype == expected.dtype
            # The same products of codes, summed in float32 in another order. At worst each of 256
            # additions is off by 2**-24 of at most 2**10; random signs leave an eighth of that.
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2**-9)


@pytest.mark.parametrize(("fmt", "container"), CASES)
def test_experts_reach_the_kernels_through_functional_linear(fmt, container, device, on_kernels):
    experts = PackedExperts([_layer(fmt, container).to(device) for _ in range(2)])
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1)).to(device)
    with on_kernels():
        product = nn.functional.linear(x, experts[torch.tensor(1, device=device)])
        assert torch.equal(product, experts[1](x))
