"""Projections summed over a whole sequence before they are squared."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from autoq.errors import InputError
from autoq.search.estimators.token_projection import TokenProjection


class SequenceProjection(TokenProjection):
    """Half (the sum over the tokens of a sequence of g_t . dy_t)^2, labels drawn from the model.

    Unlike `TokenProjection` it keeps what errors at one token do to the loss together with errors
    at another: its expectation is the whole second-order term of the KL divergence of a sequence.
    The price is variance: one squared number says what there a whole row of them says. So labels
    are drawn several times for every sequence, a backward each.
    """

    name: ClassVar[str] = "sequence_projection"
    default_draws: ClassVar[int] = 4
    samples_tokens: ClassVar[bool] = False
    keeps_interactions: ClassVar[bool] = False  # one number per sequence: they would be noise

    def __init__(self, *args: Any, row_fraction: float = 1.0, **options: Any) -> None:
        """
        Raises:
            InputError: `row_fraction` is not 1: a sum over some tokens is no estimate of the sum
                over all once it is squared.
        """
        if row_fraction != 1.0:
            raise InputError(
                f"{self.name} needs all tokens, so row_fraction must be 1, got {row_fraction}; "
                "leave it out, or take token_projection"
            )
        super().__init__(*args, row_fraction=row_fraction, **options)

    def _per_token(self, sums: Tensor) -> Tensor:
        return sums.sum(dim=2).square_() / sums.shape[2]
