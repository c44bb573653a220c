"""From codes and scales to the tensors of a container.

`_unpacking` is the inverse. A GPT-2 `Conv1D` keeps its weight as
[in, out] in its checkpoints and engines transpose whatever is called "weight" while loading, so
its codes are written transposed as well; scales never are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.export._layouts import LAYOUTS
from autoq.formats import FORMATS
from autoq.layers import LayerCalibration, QuantizedWeight
from autoq.layers.low_rank import DOWN
from autoq.layers.quantize import Container
from autoq.models import SlotKind


def packed_tensors(
    weight: QuantizedWeight,
    calibration: LayerCalibration,
    *,
    first_row: int,
    rows: int,
    container: Container,
    kind: SlotKind,
    storage_dtype: torch.dtype,
    pre_quant_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of one module, by the part of their name after the module's.

    Args:
        weight: of the whole slot; rows `first_row` to `first_row + rows` go into this module.
        storage_dtype: the model's, for the scales that are stored in it.
        pre_quant_scale: float32 [in_features], to be written beside the others.
    """
    part = {
        name: _rows(tensor, weight, first_row, rows)
        if tensor.ndim == 2 and name != DOWN
        else tensor
        for name, tensor in weight.tensors.items()
    }
    tensors = LAYOUTS[container, weight.format].pack(part, calibration, storage_dtype)
    if pre_quant_scale is not None:
        tensors["pre_quant_scale"] = pre_quant_scale.to(storage_dtype)
    if kind is SlotKind.CONV1D:
        tensors["weight"] = tensors["weight"].T.contiguous()
    return tensors


def _rows(tensor: Tensor, weight: QuantizedWeight, first_row: int, rows: int) -> Tensor:
    """What belongs to some rows of the matrix: rows of codes and scales, or of blocks of rows."""
    if len(tensor) == weight.shape[0]:
        return tensor[first_row : first_row + rows]
    side = FORMATS[weight.format].weight_block_size
    assert side is not None and first_row % side == 0
    return tensor[first_row // side : -(-(first_row + rows) // side)]
