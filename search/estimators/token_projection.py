"""Projections of every token's output error on its gradient: half the squared sums, in nats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.layers.taps import MatrixCall
from autoq.search._batch_loss import BatchLoss
from autoq.search._projections import Projections, QuantizedInputs
from autoq.search.estimators._gram import GramMatrix
from autoq.search.sensitivity import SensitivityScorer


class TokenProjection(SensitivityScorer):
    """Half the sum over tokens of (g_t . dy_t)^2, labels drawn from the model.

    For a layer y = x W^T whose output has the loss gradient g, quantising its weight and its
    input changes the output of token t by dy_t; members of a group are summed before squaring.
    With labels drawn from the model itself g g^T averages to the Fisher matrix, and the score is
    the second-order estimate of the KL divergence to the original, in nats per token;
    correlations between tokens and between groups are left out.

    The projection needs no quantised forward: with x' = x + dx and W' = W + dW

        g . dy = (g dW) . x' + (g W) . dx

    and g W is what backward computes anyway. So a further format costs one matrix product on the
    tokens that are sampled, and the differences are small numbers from the start instead of the
    difference of two large ones.

    The same projections give what every two cells do together (`GramMatrix`), at no further pass.

    Source: Martens, "New insights and perspectives on the natural gradient method", 2020.
    """

    name: ClassVar[str] = "token_projection"
    keeps_interactions: ClassVar[bool] = True

    def __init__(self, *args: Any, interactions: bool = True, **options: Any) -> None:
        """
        Args:
            interactions: also sum up the cross terms of all cells, where there are few enough.
        """
        super().__init__(*args, **options)
        kept = interactions and self.keeps_interactions
        self._gram = (
            GramMatrix(self._group_index, len(self.formats))
            if kept and GramMatrix.fits(len(self._map.groups), len(self.formats))
            else None
        )

    def _row_values(
        self,
        call: MatrixCall,
        name: FormatName,
        calibration: LayerCalibration,
        inputs: QuantizedInputs,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> Tensor:
        return self._errors.project(
            call.slot,
            name,
            output_gradient,
            inputs.get(name, calibration),
            inputs.exact,
            input_gradient,
        )

    def _per_token(self, sums: Tensor) -> Tensor:
        return sums.square_().mean(dim=2)

    def _contributions(self, projections: Projections, batch: BatchLoss) -> NDArray[np.float64]:
        result = super()._contributions(projections, batch)
        if self._gram is not None:
            self._gram.add(projections.sums, batch.sequences * batch.tokens_per_sequence)
        return result

    def state(self) -> Mapping[str, NDArray[Any]]:
        """The sums of cross terms."""
        return {} if self._gram is None else self._gram.state()

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on with sums of cross terms."""
        if self._gram is not None and state:
            self._gram.load_state(state)

    def results(self) -> Mapping[str, NDArray[Any]]:
        """`interactions`: float64 [groups, formats, groups, formats], in nats per token."""
        return {} if self._gram is None else {"interactions": self._gram.matrix()}
