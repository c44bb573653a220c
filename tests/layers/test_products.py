"""Products without a graph: torch's own, whatever library computes them."""

import pytest
import torch
from torch.nn import functional

from autoq.layers import products

ORDER_OF_SUMS = 1e-5
"""Of 96 float32 products of either sign, beside a result of the size of their root mean square."""


@pytest.fixture(params=[False, True], ids=["mkl", "onednn"])
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(96,), (7, 96), (2, 5, 96)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_torch(shape, has_bias):
    torch.manual_seed(0)
    inputs = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(33, 96) / 96**0.5, torch.randn(33) if has_bias else None
    expected = functional.linear(
        inputs.double(), weight.double(), None if bias is None else bias.double()
    )
    found = products.linear(inputs, weight, bias)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ORDER_OF_SUMS)
    assert torch.equal(found, products.linear(inputs, weight, bias))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("inputs", "weight"),
    [
        (torch.ones(3, 8), torch.arange(32.0).reshape(8, 4).t()),
        (torch.arange(24.0).reshape(8, 3).t(), torch.ones(4, 8)),
        (torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)),
        (torch.ones(0, 8), torch.ones(4, 8)),
    ],
    ids=["weight in columns", "inputs in columns", "bfloat16", "no rows"],
)
def test_operands_that_onednn_would_have_to_copy_first_are_left_to_torch(inputs, weight):
    found = products.linear(inputs, weight, None)
    assert torch.equal(found, functional.linear(inputs, weight))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_onednn_is_for_wide_units_that_mkl_leaves_unused(capabilities, expected, monkeypatch):
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has one of the libraries only")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert products._onednn_is_faster.__wrapped__() is expected
