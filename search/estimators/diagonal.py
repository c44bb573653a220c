"""The score that others publish: squares of gradient times error, output by output."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.layers.taps import MatrixCall
from autoq.search._batch_loss import LabelSource
from autoq.search._branches import surplus_outputs
from autoq.search._projections import QuantizedInputs
from autoq.search.estimators._rows import RowScorer


class Diagonal(RowScorer):
    """Half the sum over tokens and outputs k of (g_tk dy_tk)^2, labels from the data.

    The baseline: up to a constant factor what ModelOpt's `auto_quantize` sums up (described in its
    documentation as a gradient-based score; implemented here from the formula). It takes the
    Fisher matrix to be diagonal, so what several outputs of a layer do together is lost, and the
    members of a group are added up after squaring. Labels are the next tokens of the data, so it
    is no estimate of a divergence: scores rank.
    """

    name: ClassVar[str] = "diagonal"
    labels: ClassVar[LabelSource] = "data"
    unit: str = "relative"
    goes_block_by_block: ClassVar[bool] = True

    def _row_values(
        self,
        call: MatrixCall,
        name: FormatName,
        calibration: LayerCalibration,
        inputs: QuantizedInputs,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> Tensor:
        changed = inputs.get(name, calibration)
        error = self._errors.get(call.slot, name)
        exact_weight = call.weight.to(self._dtype)
        change = (changed.to(self._dtype) @ error.t()).float()
        change += ((changed - inputs.exact).to(self._dtype) @ exact_weight.t()).float()
        surplus = surplus_outputs(calibration, changed, inputs.exact)
        if surplus is not None:
            change -= surplus
        return change.mul_(output_gradient).square_().sum(dim=1)

    def _per_token(self, sums: Tensor) -> Tensor:
        return sums.mean(dim=2)
