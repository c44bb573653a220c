"""The measured divergence of each group by itself: for models that gradients do not reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.formats import NONE, FormatName
from autoq.layers.quantize import Container
from autoq.layers.taps import MatrixCall, tapped
from autoq.models import ModelMap, output_kind
from autoq.search._batch_loss import BatchLoss, LabelSource, check_loss
from autoq.search._projections import Calibrations, QuantizedInputs, WeightErrors
from autoq.search.objectives import divergence_of


class ForwardOnly:
    """KL(original || one group quantised), a forward for every group and format.

    It needs no gradient and makes no second-order assumption; what groups do to each other is
    left out as everywhere. With G groups and F formats it takes G F + 1 forwards where others
    take one forward and one backward, so it looks at `sequences_wanted` sequences only. The
    fallback where backward does not reach every layer.

    With a loss of the user's own, which has no output distribution, a score is how much the loss
    of the batch grows; then scores rank, and are not nats.
    """

    name: ClassVar[str] = "forward_only"
    labels: ClassVar[LabelSource] = "model"
    needs_backward: ClassVar[bool] = False
    sequences_wanted: ClassVar[int | None] = 16

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
    ) -> None:
        """Arguments are those of `SensitivityScorer`.

        Raises:
            InputError: `row_fraction` or `draws` is not 1: nothing is sampled here.
        """
        del dtype, seed  # outputs are compared in the model's own dtype, and nothing is drawn
        if row_fraction != 1.0 or draws not in (None, 1):
            raise InputError(
                f"{self.name} samples neither tokens nor labels, so row_fraction and draws must "
                f"be 1, got {row_fraction:g} and {draws or 1}; leave them out"
            )
        self.unit = "nats_per_token"
        self.formats = tuple(name for name in formats if name != NONE)
        self._model = model
        self._map = model_map
        self._calibration = calibration
        self._container = container
        self._divergence = divergence_of(output_kind(model))
        self._errors = WeightErrors(model, calibration, container, scale_dtype, torch.float32)

    def score_batch(self, index: int, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """Measured contributions of one batch, [sequences, groups, formats].

        Args:
            index: not used: a batch's result depends on its data alone.
            loss: runs the model; called once for every cell, and once for the original.
        Raises:
            ModelError: the loss is not finite.
        """
        with torch.no_grad():
            original = loss()
            check_loss(original)
            if original.output is None:
                self.unit = "relative"
            cells = [
                [self._cell(original, loss, group.slots, name) for name in self.formats]
                for group in self._map.groups
            ]
        return np.moveaxis(np.asarray(cells, dtype=np.float64), 2, 0)

    def _cell(
        self,
        original: BatchLoss,
        loss: Callable[[], BatchLoss],
        slots: Sequence[Any],
        name: FormatName,
    ) -> NDArray[np.float64]:
        if any((slot, name) not in self._calibration for slot in slots):
            return np.full(original.sequences, np.nan)
        members = [self._map.slots[slot] for slot in slots]
        with tapped(self._model, members, partial(self._quantized_product, name)):
            changed = loss()
        if original.output is None or changed.output is None:
            grown = float(changed.total - original.total)
            tokens = original.sequences * original.tokens_per_sequence
            return np.full(original.sequences, max(grown, 0.0) / tokens)
        return np.asarray(
            [
                # Rounding can take a divergence of next to nothing below zero.
                max(float(self._divergence(before, after).double().mean()), 0.0)
                for before, after in zip(original.output, changed.output, strict=True)
            ]
        )

    def _quantized_product(self, name: FormatName, call: MatrixCall, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(0, -2)
        calibration = self._calibration[call.slot.name, name]
        changed = QuantizedInputs(call.slot.name, rows, self._container).get(name, calibration)
        weight = call.weight.float() + self._errors.get(call.slot, name)
        output = nn.functional.linear(changed, weight).to(inputs.dtype)
        if call.bias is not None:
            output = output + call.bias
        return output.reshape(*inputs.shape[:-1], -1)

    def state(self) -> Mapping[str, NDArray[Any]]:
        """Nothing is summed up."""
        return {}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Nothing to load."""

    def keep_batches_apart(self) -> bool:
        """They are."""
        return True

    def addition(self) -> Mapping[str, NDArray[Any]]:
        """Nothing is summed up."""
        return {}

    def add(self, addition: Mapping[str, NDArray[Any]]) -> None:
        """Nothing to add."""

    def finish(self, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
        """They are final."""
        return contributions

    def results(self) -> Mapping[str, NDArray[Any]]:
        """Nothing beside the scores."""
        return {}
