"""Rounding weights one column at a time, each column's error made up for by those that follow.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), with scales that are chosen before, so that columns may be rounded in any order
(by default that of falling input power) and no order has to be stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.formats import FeedbackOptions

_BLOCK_COLUMNS = 128
"""Columns that are corrected one by one; those behind them are corrected once for all of these."""


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What rounding the weights of layers that read one input needs of that input."""

    second_moment: Tensor  # float32 [K, K], mean of x xᵀ of the inputs
    order: Tensor  # int64 [K]: columns as they are rounded
    factor: (
        Tensor | None
    )  # float32 [K, K], upper triangular, in that order; None where there is none

    @classmethod
    def of(cls, second_moment: Tensor, options: FeedbackOptions | None = None) -> ErrorFeedback:
        """
        Args:
            second_moment: float32 [K, K], mean of x xᵀ of the layers' inputs.
            options: damping and order; the defaults if left out.
        """
        options = options or FeedbackOptions()
        if options.by_power:
            order = torch.argsort(second_moment.diagonal(), descending=True, stable=True)
        else:
            order = torch.arange(len(second_moment), device=second_moment.device)
        factor = _inverse_factor(second_moment[order][:, order], options.damping)
        return cls(second_moment, order, factor)

    def round(self, weight: Tensor, step: Tensor, levels: Tensor) -> Tensor:
        """Indices of levels whose values lose less of the outputs than the nearest ones do.

        The loss is the mean over inputs of the squared error of the outputs, the trace of
        (Q - W) M (Q - W)ᵀ with the second moment M. Columns are rounded in turn; what a column's
        rounding does to the outputs is undone as far as the columns that are left can, by the
        solution of least squares.

        Args:
            weight: float32 [N, K].
            step: float32 [N, K], positive: what one unit of a level stands for in each place.
            levels: float32 [L], ascending: the values that codes stand for.

        Returns:
            uint8 [N, K]. In rows where the loss comes out no smaller, the nearest levels.
        """
        nearest = _nearest(weight / step, levels)
        if self.factor is None:
            return nearest
        columns, steps = weight[:, self.order], step[:, self.order]
        found = torch.empty_like(nearest)
        found[:, self.order] = _rounded(columns, steps, levels, self.factor)
        losses = [self._loss(levels[index.int()] * step - weight) for index in (found, nearest)]
        return torch.where((losses[0] < losses[1])[:, None], found, nearest)

    def _loss(self, error: Tensor) -> Tensor:
        return ((error @ self.second_moment) * error).sum(-1)


def _rounded(weight: Tensor, step: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """Codes, columns in the order in which they are rounded."""
    left = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    middles = _middles(levels)
    for start in range(0, weight.shape[1], _BLOCK_COLUMNS):
        block = slice(start, min(start + _BLOCK_COLUMNS, weight.shape[1]))
        # Columns as rows, so that each lies together in memory.
        columns, steps = left[:, block].t().contiguous(), step[:, block].t().contiguous()
        own = factor[block, block]
        pivots = own.diagonal().tolist()
        errors = torch.empty_like(columns)
        found = torch.empty(columns.shape, dtype=torch.int32, device=columns.device)
        # Operations on one column take as long as calling them does: there are as few as possible.
        for index, (column, unit, code, error) in enumerate(
            zip(columns, steps, found, errors, strict=True)
        ):
            torch.bucketize(column / unit, middles, out_int32=True, out=code)
            torch.mul(levels.index_select(0, code), unit, out=error)
            torch.sub(column, error, out=error).div_(pivots[index])
            columns[index + 1 :].addr_(own[index, index + 1 :], error, alpha=-1)
        codes[:, block] = found.t()
        left[:, block.stop :] -= errors.t() @ factor[block, block.stop :]
    return codes


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(values, _middles(levels), out_int32=True).to(torch.uint8)


def _middles(levels: Tensor) -> Tensor:
    """Where the nearest level changes; a value in the middle goes to the lower one."""
    return (levels[1:] + levels[:-1]) / 2


def _inverse_factor(second_moment: Tensor, damping: float) -> Tensor | None:
    """Upper triangular U with UᵀU the inverse of the damped moment; None where there is none.

    Args:
        damping: share of the mean input power that is added to every channel's; it keeps the moment
            invertible, and the corrections small where the data say little.
    """
    damped = second_moment.double()
    power = damped.diagonal().mean()
    if not power > 0:
        return None  # no input came
    damped.diagonal().add_(damping * power)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else factor.float()
