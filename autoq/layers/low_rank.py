"""A branch of low rank beside quantised codes: two thin factors in 16 bits.

Source: Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models"
(2024). The layer computes x @ (up @ down).T with the input as it is, and adds the product of
quantised codes, which stand for what the branch leaves of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from autoq.errors import InputError

DOWN, UP = "low_rank_down", "low_rank_up"
"""Names of the factors among a weight's tensors."""

_VALUES_AT_ONCE = 1 << 20
"""Values of the branch that are computed together, in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The weight up @ down of a branch, [out_features, in_features]."""

    down: Tensor  # bfloat16 or float16 [rank, in_features]
    up: Tensor  # of the same dtype [out_features, rank]

    def __post_init__(self) -> None:
        fits = self.down.ndim == self.up.ndim == 2 and self.down.shape[0] == self.up.shape[1]
        if not fits:
            raise InputError(
                "the factors of a branch must be [rank, in_features] and [out_features, rank], got "
                f"{tuple(self.down.shape)} and {tuple(self.up.shape)}; take both from one layer"
            )

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    def values(self) -> Tensor:
        """up @ down, float32 [out_features, in_features].

        Summed in float64, whose order of adding up does not reach float32: what is left of a weight
        has to be the same bits in search, simulation and export, on any device.
        """
        down = self.down.double()
        found = torch.empty(len(self.up), down.shape[1], device=down.device)
        for rows in torch.split(
            torch.arange(len(found)), max(1, _VALUES_AT_ONCE // max(1, down.shape[1]))
        ):
            piece = slice(int(rows[0]), int(rows[-1]) + 1)
            found[piece] = self.up[piece].double() @ down
        return found

    def product(self, x: Tensor) -> Tensor:
        """x @ (up @ down).T by way of the rank, in the dtype of x [..., in_features].

        Returns:
            [..., out_features]; no gradient flows through it.
        """
        with torch.no_grad():
            inner = functional.linear(x.detach(), self.down.to(x.device, x.dtype))
            return functional.linear(inner, self.up.to(x.device, x.dtype))

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        """The branch of a quantised weight's tensors; None where it has none."""
        return cls(tensors[DOWN], tensors[UP]) if DOWN in tensors else None

    def tensors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {DOWN: self.down, UP: self.up}


def no_branch(out_features: int, in_features: int, rank: int, device: torch.device) -> LowRank:
    """A branch of zeros: what a layer has whose calibration found none."""
    return LowRank(
        torch.zeros(rank, in_features, dtype=torch.bfloat16, device=device),
        torch.zeros(out_features, rank, dtype=torch.bfloat16, device=device),
    )
