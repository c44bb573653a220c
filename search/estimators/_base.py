"""What every estimator offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoq.formats import FormatName
from autoq.layers.quantize import Container
from autoq.models import ModelMap
from autoq.search._batch_loss import BatchLoss, LabelSource
from autoq.search._projections import Calibrations


class Estimator(Protocol):
    """Scores every group in every format, batch by batch.

    The result of a batch depends on the batch alone, so that an interrupted pass goes on with the
    batch that it lost and ends with the same bits. What is summed over batches beside the scores
    travels through `state` and `load_state`.
    """

    name: ClassVar[str]
    labels: ClassVar[LabelSource]  # of the loss that it is to be given
    unit: str  # "nats_per_token", or "relative" where scores only rank
    needs_backward: ClassVar[bool]
    sequences_wanted: ClassVar[int | None]  # None: all that there are
    formats: tuple[FormatName, ...]  # columns of the result, without "none"

    def __init__(
        self,
        model: nn.Module,
        model_map: ModelMap,
        formats: Sequence[FormatName],
        calibration: Calibrations,
        *,
        container: Container,
        scale_dtype: torch.dtype,
        row_fraction: float = 1.0,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        draws: int | None = None,
    ) -> None: ...

    def score_batch(self, index: int, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """What the sequences of batch `index` say, [sequences, groups, formats].

        NaN where a group cannot take a format.

        Raises:
            NoGradientError: the estimator needs gradients, and a layer has none.
        """
        ...

    def state(self) -> Mapping[str, NDArray[Any]]:
        """What was summed up over the batches so far, for `load_state` after an interruption."""
        ...

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        ...

    def keep_batches_apart(self) -> bool:
        """From now on `score_batch` leaves the state alone, so that batches may come in any order.

        What each adds is had from `addition`, and `add` adds it. Whoever adds all of them in the
        order of the batches has the state, bit for bit, that scoring them in order would leave.

        Returns:
            Whether that can be done; False changes nothing.
        """
        ...

    def addition(self) -> Mapping[str, NDArray[Any]]:
        """What the last `score_batch` would have added to the state, once batches are kept apart."""
        ...

    def add(self, addition: Mapping[str, NDArray[Any]]) -> None:
        """Add what `addition` gave, here or in another process."""
        ...

    def finish(self, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
        """From what `score_batch` gave of all batches, in order, to the final contributions."""
        ...

    def results(self) -> Mapping[str, NDArray[Any]]:
        """Arrays to store beside the scores, once all batches are scored."""
        ...
