"""FP8 kernels: the bits of the torch body, which tests/kernels/test_fp8.py proves."""

import pytest
import torch

from autoq.kernels._launch import fp8 as launch
from autoq.kernels._scaling import Scaling
from autoq.kernels._torch import fp8 as body
from autoq.kernels.targets import TARGETS

SHAPES = [(1, 1), (7, 129), (300, 517)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [0.0123, 3.3e-30, 7e20])
def test_codes_are_those_of_the_torch_body(shape, scale, target, device, assert_same_bits):
    x = torch.randn(shape, device=device) * torch.logspace(-8, 8, shape[1], device=device)
    scale = torch.tensor(scale, device=device)
    codes = launch.quantize(x, scale, target=TARGETS[target])
    assert_same_bits(
        codes.view(torch.uint8), body.quantize(x, scale, Scaling.TENSOR).view(torch.uint8)
    )
