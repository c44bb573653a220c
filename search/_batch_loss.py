"""The loss of one batch, as estimators take it, and how one can be unusable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from autoq.errors import InputError, ModelError
from autoq.models import SlotName

LabelSource: TypeAlias = Literal["model", "noise", "data"]
"""Whether labels are drawn from the model's own distribution, stand for it as noise (see
`fisher_noise_loss`), or are taken from the data."""


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The loss of one batch, and over how much it is summed."""

    total: Tensor  # scalar, summed over the tokens of the batch
    sequences: int
    tokens_per_sequence: int  # positions with a loss term
    output: Tensor | None = None  # [sequences, tokens, ...] that the loss is made of
    redraw: Callable[[int], Tensor] | None = None  # draw >= 1 -> total under other labels


class NoGradientError(ModelError):
    """Backward does not reach a layer, so estimators with gradients cannot score the model."""

    def __init__(self, slot: SlotName, cause: str = "") -> None:
        super().__init__(slot, cause)
        self.slot = slot
        self.cause = cause

    def __str__(self) -> str:
        return self.text("--exclude")

    def text(self, exclusion: str) -> str:
        """The message for callers that leave layers out with another option.

        Args:
            exclusion: what that option is called.
        """
        because = f" ({self.cause})" if self.cause else ""
        return (
            f"no gradient reaches {self.slot}{because}, so its sensitivity is unknown; exclude it "
            f"with {exclusion} '{self.slot}'"
        )


def check_loss(batch: BatchLoss) -> None:
    """Refuse a loss that is NaN or infinite.

    Raises:
        ModelError: it is.
    """
    if not bool(torch.isfinite(batch.total)):
        raise ModelError(
            "the loss is NaN or Inf on calibration data; run the model in a wider dtype "
            "(--dtype float32) or mend its weights"
        )


def check_not_constant(has_gradient: bool) -> None:
    """Refuse a loss that says nothing of any layer.

    Args:
        has_gradient: whether a gradient that is not zero reached any layer that is searched.
    Raises:
        ModelError: none did.
    """
    if not has_gradient:
        raise ModelError(
            "the loss is constant on calibration data: its gradient is zero at every layer that is "
            "searched, so no plan is better than another; see that the output head is not all "
            "zeros, and that a loss function of your own uses the output"
        )


def total_of_draw(batch: BatchLoss, draw: int) -> Tensor:
    """The summed loss under draw number `draw` of the labels.

    Raises:
        InputError: there is one draw only.
    """
    if draw == 0:
        return batch.total
    if batch.redraw is None:
        raise InputError(
            "a loss of your own has no labels to draw, so draws must be 1; leave the loss out"
        )
    return batch.redraw(draw)
