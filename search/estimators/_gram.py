"""Cross terms between every two cells, summed up from projections that are there anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.models import GroupName

LARGEST_GRAM_BYTES = 64 << 20
"""Models with more cells go without: it grows with their square, and is stored with the study."""


_TERM, _BATCH_TOKENS = "term/", "tokens"


class GramMatrix:
    """Mean over tokens of p_gf p_g'f' for the projections p of all cells, in nats per token.

    Half of it is the second-order estimate of what two cells do to the divergence together: with
    one format per group, the sum over all pairs is half the mean square of the summed
    projections. Its diagonal is twice the scores.
    """

    def __init__(self, groups: Mapping[GroupName, int], formats: int) -> None:
        self._index = groups
        self._formats = formats
        cells = len(groups) * formats
        self._sum = np.zeros((cells, cells))
        self._tokens = 0.0
        self._is_apart = False
        self._terms: list[NDArray[np.float64]] = []  # of the last batch, where batches are apart
        self._batch_tokens = 0.0

    @staticmethod
    def fits(groups: int, formats: int) -> bool:
        """Whether a matrix for so many cells is small enough to be kept."""
        return (groups * formats) ** 2 * 8 <= LARGEST_GRAM_BYTES

    def add(self, sums: Mapping[tuple[GroupName, int], Tensor], tokens: int) -> None:
        """Add the projections of one batch.

        Args:
            sums: (group, tokens of its rows) -> [formats, sampled tokens].
            tokens: with a loss term in the batch.
        """
        for total_rows in dict.fromkeys(rows for _, rows in sums):
            found = {group: values for (group, rows), values in sums.items() if rows == total_rows}
            first = next(iter(found.values()))
            stacked = torch.zeros(
                len(self._index), self._formats, first.shape[1], device=first.device
            )
            for group, values in found.items():
                stacked[self._index[group]] = values
            flat = stacked.flatten(0, 1).nan_to_num_(nan=0.0)
            product = (flat @ flat.t()).double().numpy(force=True)
            self._add_term(product * (total_rows / first.shape[1]))
        if self._is_apart:
            self._batch_tokens += tokens
        else:
            self._tokens += tokens

    def _add_term(self, term: NDArray[np.float64]) -> None:
        if self._is_apart:
            self._terms.append(term)
        else:
            # What `state` gave out stays as it was: the sum is replaced, not added to.
            self._sum = term + self._sum

    def keep_batches_apart(self) -> None:
        """From now on only `add_all` adds to the sum."""
        self._is_apart = True

    def begin_batch(self) -> None:
        """What comes belongs to another batch."""
        self._terms, self._batch_tokens = [], 0.0

    def addition(self) -> dict[str, NDArray[Any]]:
        """What the last batch adds: its terms [cells, cells] in their order, and its tokens.

        One by one, because floating-point sums depend on the order.
        """
        named = {f"{_TERM}{place}": term for place, term in enumerate(self._terms)}
        return {**named, _BATCH_TOKENS: np.asarray(self._batch_tokens)}

    def add_all(self, addition: Mapping[str, NDArray[Any]]) -> None:
        """Add what `addition` gave."""
        for place in range(len(addition) - 1):
            self._sum = addition[f"{_TERM}{place}"] + self._sum
        self._tokens += float(addition[_BATCH_TOKENS])

    def state(self) -> dict[str, NDArray[np.float64]]:
        """What was summed up."""
        return {"interactions": self._sum, "interaction_tokens": np.asarray(self._tokens)}

    def load_state(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Go on from `state`."""
        self._sum = np.array(state["interactions"], dtype=np.float64)
        self._tokens = float(state["interaction_tokens"])

    def matrix(self) -> NDArray[np.float64]:
        """float64 [groups, formats, groups, formats]; 0 where a group cannot take a format."""
        shape = (len(self._index), self._formats)
        return (self._sum / max(self._tokens, 1.0)).reshape(*shape, *shape)
