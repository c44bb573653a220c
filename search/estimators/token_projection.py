"""Projections of every token's output error on its gradient: half the squared sums, in nats."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.layers.taps import MatrixCall
from autoq.search._projections import QuantizedInputs
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

    Source: Martens, "New insights and perspectives on the natural gradient method", 2020.
    """

    name: ClassVar[str] = "token_projection"

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
