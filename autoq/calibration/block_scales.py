"""Block scales chosen one after the other by the error of the layer's outputs.

With the second moment M of a layer's inputs the error of its outputs is tr(E M Eᵀ), E what rounding
does to the weight. Channels' mean squares, M's diagonal, are enough to choose every block's scale by
itself; what clipping does to all columns of a block alike, and what other blocks' errors undo, is seen
in the rest of M alone.

Source: the search for clipping of Lin et al., "AWQ: Activation-aware Weight Quantization" (2023), which
weighs a block's error by inputs of that block; here it is coordinate descent over all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from autoq.calibration.scales import has_second_level
from autoq.formats import QuantFormat
from autoq.kernels import int4
from autoq.layers import LayerCalibration
from autoq.layers.quantize import ScaleChoices, coded_weight, scale_choices
from autoq.models import SlotName

SWEEPS = 2
"""Times that every block is looked at; a third changes the error by less than a per cent."""

_VALUES_AT_ONCE = 1 << 20
"""Rounded values, of all choices together, that are held in memory."""


def with_block_scales(
    weights: Mapping[SlotName, Tensor],
    fmt: QuantFormat,
    calibrations: Mapping[SlotName, LayerCalibration],
    second_moment: Tensor,
    scale_dtype: torch.dtype,
) -> dict[SlotName, LayerCalibration]:
    """The calibrations with block scales that lose less of the outputs, where the format has any.

    Args:
        weights: matrices [out_features, in_features] that share one input.
        calibrations: of the same slots.
        second_moment: float32 [in_features, in_features], mean of x xᵀ of the scaled inputs x * p.
        scale_dtype: dtype in which INT4 group scales are stored.
    """
    found = {}
    for name, weight in weights.items():
        entry = calibrations[name]
        choices = scale_choices(weight.float(), fmt, entry, scale_dtype=scale_dtype)
        if choices is None:
            return dict(calibrations)
        chosen = chosen_scales(coded_weight(weight.float(), entry), choices, second_moment)
        found[name] = replace(entry, block_scale=chosen.cpu())
    if not has_second_level(fmt):
        return found
    amax = max(_amax_after_rounding(weights[name], entry) for name, entry in found.items())
    return {name: replace(entry, weight_amax=amax) for name, entry in found.items()}


def chosen_scales(weight: Tensor, choices: ScaleChoices, second_moment: Tensor) -> Tensor:
    """The scales of every block under which the outputs lose least, the others' being what they are.

    Every weight takes the nearest value. The loss of a row, e M eᵀ, never exceeds that of the first
    choices.

    Args:
        weight: float32 [N, K].
        choices: R scales of each of its blocks.
        second_moment: float32 [K, K].

    Returns:
        [N, blocks], as `choices` stores them.
    """
    choice_count, _, blocks = choices.step.shape
    block_size = weight.shape[1] // blocks
    rows = max(1, _VALUES_AT_ONCE // (choice_count * block_size))
    moment = second_moment.to(weight.device)
    indices = [
        _of_rows(part, steps, choices.nearest, moment)
        for part, steps in zip(
            torch.split(weight, rows), torch.split(choices.step, rows, dim=1), strict=True
        )
    ]
    taken = torch.cat(indices)[None]
    # gather has no float8
    as_bytes = choices.stored.element_size() == 1
    stored = choices.stored.view(torch.uint8) if as_bytes else choices.stored
    return stored.gather(0, taken)[0].view(choices.stored.dtype)


def _of_rows(
    weight: Tensor, steps: Tensor, nearest: Callable[[Tensor], Tensor], moment: Tensor
) -> Tensor:
    """Numbers of the choices, int64 [rows, blocks]; rows do not depend on each other."""
    blocks = steps.shape[-1]
    columns = [slice(*bounds) for bounds in _bounds(weight.shape[1], blocks)]
    taken = torch.zeros(len(weight), blocks, dtype=torch.int64, device=weight.device)
    errors = torch.cat(
        [
            _errors(weight[:, block], steps[:1, :, number], nearest)[0]
            for number, block in enumerate(columns)
        ],
        dim=1,
    )
    row_numbers = torch.arange(len(weight), device=weight.device)
    for _ in range(SWEEPS):
        for number, block in enumerate(columns):
            own = moment[block, block]
            others = errors @ moment[:, block] - errors[:, block] @ own
            possible = _errors(weight[:, block], steps[:, :, number], nearest)
            loss = ((possible @ own + 2 * others) * possible).sum(-1)
            best = loss.argmin(0)
            taken[:, number] = best
            errors[:, block] = possible[best, row_numbers]
    return taken


def _bounds(width: int, blocks: int) -> list[tuple[int, int]]:
    size = width // blocks
    return [(number * size, (number + 1) * size) for number in range(blocks)]


def _errors(weight: Tensor, steps: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """What rounding does under each of R steps [R, rows] to a block [rows, B]: [R, rows, B]."""
    unit = steps[..., None]
    return nearest(weight / unit).mul_(unit).sub_(weight)


def _amax_after_rounding(weight: Tensor, entry: LayerCalibration) -> float:
    assert entry.block_scale is not None
    coded = coded_weight(weight.float(), entry)
    return float(int4.fake_quantize(coded, entry.block_scale.to(coded.device)).abs().max())
