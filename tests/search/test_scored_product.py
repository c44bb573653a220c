"""What a scored product gives the model to go on with."""

import pytest
import torch
from torch import nn

from autoq.models import discover
from autoq.search._scored_product import ScoredProduct, scoring_mode


class AddsInPlace(nn.Module):
    """A block that adds one layer's output to another's in place, as Falcon's do."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32, bias=bias), nn.Linear(32, 32, bias=bias)

    def forward(self, x):
        output = self.first(x)
        output += self.second(x)
        return output


@pytest.mark.parametrize("bias", [False, True])
def test_models_may_add_to_an_output_in_place(bias):
    torch.manual_seed(0)
    model = AddsInPlace(bias)
    inputs = torch.randn(2, 5, 32, requires_grad=True)
    expected = torch.autograd.grad(model(inputs).square().sum(), inputs)[0]
    seen = []

    def handler(call, rows):
        return ScoredProduct.apply(rows, call, lambda *shown: seen.append(shown), torch.float32)

    with scoring_mode(model, discover(model), handler):
        found = torch.autograd.grad(model(inputs).square().sum(), inputs)[0]

    assert len(seen) == 2
    torch.testing.assert_close(found, expected)
