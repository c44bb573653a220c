"""KL divergence from the original model by sequence, measured for both tools alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

Forward: TypeAlias = Callable[[Tensor], Tensor]
"""Token ids [sequences, tokens] -> logits [sequences, tokens, vocabulary]."""


def token_batches(path: Path, batch: int) -> list[Tensor]:
    """Batches of token ids, int64, from a .npy file of shape [sequences, tokens]."""
    import numpy as np

    return list(torch.from_numpy(np.load(path).astype(np.int64)).split(batch))


class Reference:
    """The original model's distributions on some tokens, to compare quantised models with.

    They are kept in memory: tokens x vocabulary x 4 bytes.
    """

    def __init__(self, forward: Forward, batches: Iterable[Tensor]) -> None:
        """
        Args:
            forward: the original model.
        """
        self._batches = list(batches)
        with torch.no_grad():
            self._expected = [_log_distribution(forward(ids)) for ids in self._batches]

    def divergences(self, forward: Forward) -> list[float]:
        """KL(original || quantised) of every sequence, in nats per token."""
        found: list[float] = []
        with torch.no_grad():
            for ids, expected in zip(self._batches, self._expected, strict=True):
                difference = expected - _log_distribution(forward(ids))
                per_token = (expected.exp() * difference).sum(-1).double()
                found += per_token.mean(-1).tolist()
        return found


def logits_of(model: Any) -> Forward:
    """Forward of a model of transformers, without a cache."""

    def forward(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return forward


def _log_distribution(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
