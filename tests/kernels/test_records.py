"""What is no packed tensor of the family is refused in one sentence, by every operation."""

from __future__ import annotations

import pytest
import torch

from autoq.errors import InputError
from autoq.kernels import fp8, int4, int4_dq, int8, mxfp4, mxfp8, nvfp4, w4a8

FAMILIES = [fp8, nvfp4, mxfp8, mxfp4, int4, int4_dq, w4a8, int8]
WEIGHT = torch.randn(8, 128)


@pytest.fixture(params=FAMILIES, ids=lambda module: module.__name__.rpartition(".")[2])
def family(request: pytest.FixtureRequest):
    return request.param


@pytest.mark.parametrize("value", [WEIGHT, None, "weight"], ids=["plain", "none", "text"])
def test_a_weight_that_is_not_packed_is_refused(family, value) -> None:
    with pytest.raises(InputError, match=r"must be \w+Tensor.*take what quantize returned"):
        family.linear(WEIGHT, value)
    with pytest.raises(InputError, match=r"must be \w+Tensor.*take what quantize returned"):
        family.dequantize(value)


def test_the_record_of_another_family_is_refused(family) -> None:
    other = int8 if family is not int8 else fp8
    with pytest.raises(InputError, match="take what quantize returned"):
        family.dequantize(other.quantize(WEIGHT))


def test_int4_does_not_drop_the_second_level_of_w4a8() -> None:
    packed = w4a8.quantize(WEIGHT)
    with pytest.raises(InputError, match="must be INT4Tensor, got W4A8Tensor"):
        int4.dequantize(packed)
    with pytest.raises(InputError, match="must be INT4Tensor, got W4A8Tensor"):
        int4.linear(WEIGHT, packed)


@pytest.mark.parametrize("value", [[1.0, 2.0], 3.0, None], ids=["list", "number", "none"])
def test_what_is_no_tensor_is_refused(family, value) -> None:
    with pytest.raises(InputError, match="must be a tensor"):
        family.quantize(value)


@pytest.mark.parametrize("module", [int4, w4a8], ids=["int4", "w4a8"])
def test_a_weight_without_a_group_is_refused(module) -> None:
    with pytest.raises(InputError, match="at least one group"):
        module.quantize(torch.empty(4, 0))
