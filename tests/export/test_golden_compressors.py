"""What compressed-tensors' own compressors make of our tensors, and of our scales: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autoq.export._layouts import LAYOUTS
from autoq.export._packing import packed_tensors
from autoq.formats import FORMATS
from autoq.layers import Container, LayerCalibration, dequantize_weight, quantize_weight
from autoq.models import SlotKind

ROWS, COLUMNS = 256, 384
FORMATS_THERE = sorted(fmt for where, fmt in LAYOUTS if where is Container.COMPRESSED_TENSORS)


def weight() -> Tensor:
    """bfloat16, with a row and a block of zeros, and a row of outliers."""
    values = 0.03 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    values[3] = 0.0
    values[7, :128] = 0.0
    values[5] *= 100.0
    return values.bfloat16()


def written(fmt: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The values that we say the weight has, and its tensors in the checkpoint."""
    matrix = weight()
    calibration = LayerCalibration(weight_amax=float(matrix.abs().max()), input_amax=3.0)
    quantized = quantize_weight(matrix, FORMATS[fmt], calibration, scale_dtype=torch.bfloat16)
    tensors = packed_tensors(
        quantized,
        calibration,
        first_row=0,
        rows=ROWS,
        container=Container.COMPRESSED_TENSORS,
        kind=SlotKind.LINEAR,
        storage_dtype=torch.bfloat16,
    )
    return dequantize_weight(quantized, container=Container.COMPRESSED_TENSORS), tensors


def compressor_of(fmt: str) -> tuple[Any, Any]:
    """Theirs for the group that the manifest has, and the group as they parse it."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    manifest = LAYOUTS[Container.COMPRESSED_TENSORS, fmt].manifest
    scheme = QuantizationScheme(targets=["Linear"], **manifest)
    return BaseCompressor.load_from_registry(manifest["format"]), scheme


@pytest.mark.parametrize("fmt", FORMATS_THERE)
def test_they_unpack_what_we_wrote_to_the_same_values(fmt: str) -> None:
    ours, tensors = written(fmt)
    compressor, scheme = compressor_of(fmt)
    theirs = compressor.decompress(dict(tensors), scheme)["weight"]
    # Where they unpack to bfloat16 they round once, as we do for a model of that dtype.
    assert torch.equal(theirs, ours.to(theirs.dtype))


@pytest.mark.parametrize("fmt", FORMATS_THERE)
def test_under_our_scales_they_choose_the_same_codes(fmt: str) -> None:
    _, tensors = written(fmt)
    compressor, scheme = compressor_of(fmt)
    scale = tensors["weight_scale"]
    is_exponent = scale.dtype is torch.uint8
    state = {
        "weight": weight().float(),
        "weight_scale": torch.exp2(scale.float() - 127) if is_exponent else scale.float(),
    }
    if "weight_global_scale" in tensors:
        state["weight_global_scale"] = tensors["weight_global_scale"]
    codes = "weight" if "weight" in tensors else "weight_packed"
    theirs = compressor.compress(state, scheme)
    assert torch.equal(theirs[codes].view(torch.uint8), tensors[codes].view(torch.uint8))
    assert torch.equal(theirs["weight_scale"].float(), scale.float())
