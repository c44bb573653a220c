"""Projections of every token's output error on noise with the covariance of the Fisher matrix."""

from __future__ import annotations

from typing import ClassVar

from autoq.search._batch_loss import LabelSource
from autoq.search.estimators.token_projection import TokenProjection


class FisherProjection(TokenProjection):
    """`TokenProjection` with noise in the place of labels: the same expectation, less variance.

    The loss is `fisher_noise_loss`: its gradient at the logits has the covariance that the
    gradient under labels drawn from the model has, the second derivative of the KL divergence.
    But it does not vanish where the model is sure of the next token, to be huge once in a while.
    """

    name: ClassVar[str] = "fisher_projection"
    labels: ClassVar[LabelSource] = "noise"
