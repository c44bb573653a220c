"""Matrices of zeros, denormals, ties and largest codes, as every container stores them and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoq.export._layouts import LAYOUTS
from autoq.export._packing import packed_tensors
from autoq.export._unpacking import checked_tensors, unpacked_weight
from autoq.formats import FORMATS, FormatName
from autoq.layers import (
    Container,
    LayerCalibration,
    dequantize_weight,
    fake_quantize_weight,
    quantize_weight,
)
from autoq.models import SlotKind

ROWS, COLUMNS = 128, 256
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Halfway between two numbers of E2M1."""


def ordinary() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7)) / 8


def with_zeros() -> Tensor:
    weight = ordinary()
    weight[3] = 0.0
    weight[5, 128:] = 0.0
    weight[7, ::2] = -0.0
    return weight


def tiny() -> Tensor:
    """Denormals beside ordinary numbers, and blocks of nothing else."""
    weight = ordinary()
    weight[2, ::3] = 2.0**-140
    weight[4, :128] = -(2.0**-130)
    return weight


def largest() -> Tensor:
    """Codes 448 and 6, numbers in the middle of two codes, either sign."""
    weight = torch.tensor(TIES).repeat(ROWS * COLUMNS)[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)
    weight = weight * torch.tensor([1.0, -1.0]).repeat(COLUMNS // 2)
    weight[:, ::16] = 6.0
    weight[0, 0], weight[0, 16], weight[1, 0] = 448.0, -448.0, 464.0
    return weight


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "zeros inside": with_zeros,
    "denormals": tiny,
    "largest": largest,
    "zeros alone": lambda: torch.zeros(ROWS, COLUMNS),
}


@pytest.mark.parametrize(("container", "fmt"), sorted(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_is_stored_is_what_was_scored_bit_for_bit(
    container: Container, fmt: FormatName, dtype: torch.dtype, kind: str
) -> None:
    weight = WEIGHTS[kind]().to(dtype)
    calibration = LayerCalibration(weight_amax=float(weight.abs().max()), input_amax=2.5)
    quantized = quantize_weight(weight, FORMATS[fmt], calibration, scale_dtype=torch.bfloat16)
    stored = packed_tensors(
        quantized,
        calibration,
        first_row=0,
        rows=ROWS,
        container=container,
        kind=SlotKind.LINEAR,
        storage_dtype=torch.bfloat16,
    )
    shape = (ROWS, COLUMNS)
    checked = checked_tensors(
        "layer", stored, container=container, fmt=fmt, shape=shape, kind=SlotKind.LINEAR
    )
    read = unpacked_weight(checked, container=container, fmt=fmt, shape=shape)
    found = dequantize_weight(read, container=container)
    expected = fake_quantize_weight(
        weight.float(), FORMATS[fmt], calibration, scale_dtype=torch.bfloat16, container=container
    )
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
