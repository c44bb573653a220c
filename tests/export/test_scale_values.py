"""Which stored scales and codes a layout takes, byte by byte."""

import math

import pytest
import torch

from autoq.export._layouts._types import E4M3, E4M3_CODES, U8, TensorRule

E4M3_SCALE = TensorRule(E4M3, lambda n, k: (n, k))
E8M0_SCALE = TensorRule(U8, lambda n, k: (n, k))
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("byte", range(256))
def test_e4m3_scales_are_positive_and_finite_and_codes_are_no_nan(byte):
    stored = torch.tensor([[0x38, byte, 0x38]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    value = float(stored[0, 1].float())
    assert (E4M3_SCALE.wrong_values(stored) is None) == (0 < value < math.inf)
    assert (E4M3_CODES.wrong_values(stored) is None) == (not math.isnan(value))


def test_only_byte_255_is_no_power_of_two():
    wrong = [int(b) for b in EVERY_BYTE if E8M0_SCALE.wrong_values(b.reshape(1, 1)) is not None]
    assert wrong == [255]


def test_no_scales_have_no_fault():
    for rule, dtype in ((E4M3_SCALE, torch.float8_e4m3fn), (E8M0_SCALE, torch.uint8)):
        assert rule.wrong_values(torch.empty(0, 4, dtype=torch.uint8).view(dtype)) is None
    assert E4M3_CODES.wrong_values(torch.empty(0, 4, dtype=torch.float8_e4m3fn)) is None
