"""Bit equality, which torch.equal does not give: it takes -0.0 for 0.0 and NaN for unequal."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    integer = _INTEGERS[actual.element_size()]
    different = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    first = different.nonzero()[:1].flatten().tolist()
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} differ, the first at {first}: "
        f"{actual[tuple(first)].item()} for {expected[tuple(first)].item()}"
    )


@pytest.fixture
def assert_same_bits() -> Callable[[Tensor, Tensor], None]:
    return _assert_same_bits
