"""Measured plans as observations, and predicted losses as what is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Floats: TypeAlias = NDArray[np.float64]
Columns: TypeAlias = NDArray[np.int64]
"""Format column of every group, [groups]."""

_LEAST_DIFFICULTY = 0.05
"""Of the mean: sequences that lose next to nothing do not weigh more than twenty others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Plans measured on the same sequences, the reference first."""

    columns: tuple[Columns, ...]
    losses: tuple[Floats, ...]  # per sequence; a trial stopped early has only the first ones

    def differences(self) -> list[Floats]:
        """Of every plan but the reference, per sequence, to the reference.

        Sequences differ in difficulty by factors, and the losses of all plans with them: the few
        hardest would decide alone, with all their noise. So differences are taken relative to the
        sequence's difficulty, and multiplied by the mean difficulty: every sequence counts alike,
        and the unit stays.
        """
        reference, weights = self.losses[0], self._weights()
        return [
            (losses - reference[: len(losses)]) * weights[: len(losses)]
            for losses in self.losses[1:]
        ]

    def _weights(self) -> Floats:
        """Mean difficulty over difficulty, the median loss of all complete trials, [sequences].

        All are one where some sequence has none: such an objective is no divergence.
        """
        sequences = len(self.losses[0])
        complete = [losses for losses in self.losses if len(losses) == sequences]
        difficulty = np.median(complete, axis=0)
        if difficulty.min() <= 0.0:
            return np.ones(sequences)
        difficulty = np.maximum(difficulty, _LEAST_DIFFICULTY * difficulty.mean())
        return np.asarray(difficulty.mean() / difficulty, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """Predicted losses, and which errors cells share."""

    losses: Floats  # [groups, formats], above zero except where a format costs nothing
    spread: Floats  # [groups, formats]: variance of log loss from the spread over sequences
    shared: Mapping[str, NDArray[np.int64]]  # error -> [groups, formats], whose error a cell has

    @classmethod
    def of(
        cls, losses: Floats, errors: Floats, types: NDArray[np.int64], classes: NDArray[np.int64]
    ) -> Prior:
        """From predicted losses and their standard errors [groups, formats], NaN where unusable.

        A loss that is zero or negative, as noisy estimates can be, counts as half its standard
        error; one that is zero without error stays zero.
        """
        finite = np.where(np.isfinite(losses), losses, 0.0)
        noise = np.where(np.isfinite(errors), errors, 0.0)
        positive = np.maximum(finite, noise / 2)
        shape = losses.shape
        relative = np.divide(noise, positive, out=np.zeros(shape), where=positive > 0.0)
        rows = np.broadcast_to(np.arange(shape[0])[:, None], shape)
        shared = {
            "all": np.zeros(shape, dtype=np.int64),
            "type": np.broadcast_to(types[:, None], shape),
            "class": np.broadcast_to(classes[:, None], shape),
            "group": rows,
            "cell": np.arange(losses.size).reshape(shape),
        }
        return cls(losses=positive, spread=np.log1p(relative**2), shared=shared)


def changes(columns: Sequence[Columns], shape: tuple[int, ...]) -> csr_array:
    """+1 for each cell that a plan takes and the reference does not, -1 the other way round."""
    from scipy.sparse import csr_array

    rows, cells, signs = [], [], []
    for row, taken in enumerate(columns[1:]):
        differs = np.flatnonzero(taken != columns[0])
        for chosen, sign in ((taken, 1.0), (columns[0], -1.0)):
            cells.append(differs * shape[1] + chosen[differs])
            rows.append(np.full(len(differs), row))
            signs.append(np.full(len(differs), sign))
    coordinates = (np.concatenate(rows), np.concatenate(cells))
    size = (len(columns) - 1, int(np.prod(shape)))
    return csr_array((np.concatenate(signs), coordinates), shape=size)


def summed_by_label(weighted: csr_array, labels: NDArray[np.int64]) -> csr_array:
    """Columns with the same label summed up, [plans, labels]."""
    from scipy.sparse import csr_array

    entries = weighted.tocoo()
    rows, cells = entries.coords
    size = (weighted.shape[0], int(labels.max()) + 1)
    return csr_array((entries.data, (rows, labels[cells])), shape=size)


def sampling_covariance(differences: Sequence[Floats]) -> Floats:
    """Covariance of the plans' mean differences, from how they vary together over sequences."""
    longest = max(len(each) for each in differences)
    deviations = np.zeros((len(differences), longest))
    for row, each in enumerate(differences):
        count = len(each)
        if count > 1:
            centred = each - each.mean()
            deviations[row, :count] = centred / math.sqrt(count * (count - 1))
    return np.asarray(deviations @ deviations.T, dtype=np.float64)


def square_root(covariance: Floats) -> Floats:
    """A square root of a covariance that may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)), dtype=np.float64)
