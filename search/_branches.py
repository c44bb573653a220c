"""Formats with a branch of low rank: which part of their output error is none.

Such a layer computes x L^T + x' R'^T, with L the branch and R' the codes: the branch sees its input
as it is. Elsewhere a format's output error is taken to be that of x' W'^T; with W' = L + R' that has
(x' - x) L^T too much, and here is what to subtract.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from autoq.layers import LayerCalibration


def surplus_outputs(calibration: LayerCalibration, changed: Tensor, exact: Tensor) -> Tensor | None:
    """(x' - x) L^T, float32 [rows, out_features]; None without a branch.

    Args:
        calibration: of the layer in its format.
        changed: x', as the exact layer would have to see it, [rows, in_features].
        exact: x, [rows, in_features].
    """
    inner = _inner(calibration, changed, exact)
    if inner is None or calibration.low_rank is None:
        return None
    return inner @ calibration.low_rank.up.to(inner).t()


def surplus_projections(
    calibrations: Iterable[LayerCalibration],
    output_gradient: Tensor,
    changed: Tensor,
    exact: Tensor,
) -> Tensor | None:
    """The sum over layers that share an input of g . (x' - x) L^T, float32 [rows]; None without
    branches.

    Args:
        output_gradient: of the layers side by side, [rows, sum of out_features].
    """
    total: Tensor | None = None
    start = 0
    for calibration in calibrations:
        inner = _inner(calibration, changed, exact)
        if inner is None or calibration.low_rank is None:
            return None  # the layers are of one format, and one group: all have one, or none
        up = calibration.low_rank.up.to(inner)
        own = output_gradient[:, start : start + len(up)].float()
        start += len(up)
        projections = ((own @ up) * inner).sum(dim=1)
        total = projections if total is None else total + projections
    return total


@torch.no_grad()
def _inner(calibration: LayerCalibration, changed: Tensor, exact: Tensor) -> Tensor | None:
    """(x' - x) * p by way of the branch's first factor, float32 [rows, rank]."""
    if calibration.low_rank is None:
        return None
    difference = changed.float() - exact.float()
    if calibration.pre_quant_scale is not None:
        difference *= calibration.pre_quant_scale.to(difference)
    return difference @ calibration.low_rank.down.to(difference).t()
