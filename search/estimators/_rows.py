"""Estimators that look at one product in one format at a time."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.layers.taps import MatrixCall
from autoq.search._projections import QuantizedInputs, Rows
from autoq.search.sensitivity import SensitivityScorer


class RowScorer(SensitivityScorer):
    """Scores made of what each row of a product contributes in each format."""

    def _project(
        self,
        call: MatrixCall,
        accumulator: Tensor,
        positions: Rows,
        inputs: Tensor,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> None:
        quantized_inputs = self._quantized_inputs(call.slot, inputs)
        for column, name in enumerate(self.formats):
            calibration = self._calibration.get((call.slot.name, name))
            if calibration is None:
                accumulator[column] = torch.nan
                continue
            # An expert's rows are different tokens, so no position comes twice.
            accumulator[column, positions] += self._row_values(
                call, name, calibration, quantized_inputs, output_gradient, input_gradient
            )

    @abstractmethod
    def _row_values(
        self,
        call: MatrixCall,
        name: FormatName,
        calibration: LayerCalibration,
        inputs: QuantizedInputs,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> Tensor:
        """What each row contributes to its token's sum over the group, float32 [rows].

        Args:
            output_gradient: in the dtype of the errors of weights, [rows, out_features].
            input_gradient: that times the weight, [rows, in_features].
        """
