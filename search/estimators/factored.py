"""Curvature as a product of two small matrices per layer: scores formats that come later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoq.errors import InputError
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import LayerCalibration
from autoq.layers.quantize import Container
from autoq.layers.taps import MatrixCall
from autoq.models import DecisionGroup, ModelMap
from autoq.search._batch_loss import BatchLoss
from autoq.search._branches import surplus_projections
from autoq.search._projections import Calibrations, QuantizedInputs, WeightErrors
from autoq.search.estimators._factors import Factors
from autoq.search.estimators._rows import RowScorer
from autoq.search.sensitivity import fusion_leaders


class Factored(RowScorer):
    """tr(B dW A dW^T) / 2 for errors of weights, with A = E[x x^T] and B = E[g g^T] per layer.

    If a layer's inputs x and the gradients g at its outputs are independent, that is what
    `TokenProjection` averages to for the weight alone. What quantising the inputs does,
    half the mean of ((x' - x) . g W)^2, is projected token by token, as it takes no product.
    Assumed beside the independence: errors of weight and input do not move together, and so do
    those of the members of a group, whose scores are added.

    A and B are stored with the study. They score another format, or another calibration, with no
    further pass over data (`score_new_format`).

    The spread over sequences of the weight's part is taken to be that of the squared gradients.

    Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature", 2015.
    """

    name: ClassVar[str] = "factored"

    def __init__(self, *args: Any, **options: Any) -> None:
        """Arguments are those of `SensitivityScorer`."""
        super().__init__(*args, **options)
        self._factors = Factors(self._map, self._leaders)
        self._energy: list[NDArray[np.float64]] = []  # of each batch, [sequences, groups]

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
        projections = (changed - inputs.exact).mul_(input_gradient).sum(dim=1)
        surplus = surplus_projections([calibration], output_gradient, changed, inputs.exact)
        return projections if surplus is None else projections - surplus

    def _per_token(self, sums: Tensor) -> Tensor:
        return sums.square_().mean(dim=2)

    def _observe_rows(
        self, call: MatrixCall, inputs: Tensor, output_gradient: Tensor, input_gradient: Tensor
    ) -> None:
        super()._observe_rows(call, inputs, output_gradient, input_gradient)
        self._factors.add(call, inputs, output_gradient, input_gradient)
        squares = output_gradient.float().square().sum(dim=1)
        if call.token_rows is not None:
            by_token = torch.zeros(call.token_count, device=squares.device)
            squares = by_token.index_add_(0, call.token_rows, squares)
        group = self._group_index[self._group_of[call.slot.name]]
        sequences = squares.reshape(self._projections.sequences, -1).sum(dim=1)
        self._energy[-1][:, group] += sequences.double().numpy(force=True)

    def _draw(
        self, index: int, draw: int, batch: BatchLoss, *, keep_graph: bool
    ) -> NDArray[np.float64]:
        shape = (batch.sequences, len(self._map.groups))
        self._energy.append(np.zeros(shape))
        result = super()._draw(index, draw, batch, keep_graph=keep_graph)
        self._factors.end_batch(batch.sequences * batch.tokens_per_sequence)
        if draw > 0:
            latest = self._energy.pop()
            self._energy[-1] += latest
        return result

    def finish(self, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
        """The projected inputs' part, and that of the weights from the factors."""
        energy = np.concatenate(self._energy)[: len(contributions)]
        mean = energy.mean(axis=0)
        share = np.divide(energy, mean, out=np.ones_like(energy), where=mean > 0)
        weights = np.asarray(
            [
                [self._weight_part(group, name) for name in self.formats]
                for group in self._map.groups
            ]
        )
        return np.asarray(contributions + share[:, :, None] * weights)

    def _weight_part(self, group: DecisionGroup, name: FormatName) -> float:
        if any((slot, name) not in self._calibration for slot in group.slots):
            return float("nan")
        slots = [self._map.slots[slot] for slot in group.slots]
        return 0.5 * sum(
            self._factors.weight_score(slot, self._errors.get(slot, name)) for slot in slots
        )

    def state(self) -> Mapping[str, NDArray[Any]]:
        """The factors, and the squared gradients of every sequence."""
        groups = len(self._map.groups)
        energy = np.concatenate(self._energy) if self._energy else np.zeros((0, groups))
        return {**self._factors.arrays(), "energy": energy}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on with factors of earlier batches."""
        if state:
            self._factors.load(state)
            self._energy = [np.array(state["energy"])]

    def keep_batches_apart(self) -> bool:
        """The factors of one batch are as large as those of all: they are not sent about."""
        return False

    def results(self) -> Mapping[str, NDArray[Any]]:
        """The factors, for `score_new_format`."""
        return self._factors.arrays()


def score_new_format(
    name: FormatName,
    arrays: Mapping[str, NDArray[Any]],
    model: nn.Module,
    model_map: ModelMap,
    calibration: Calibrations,
    *,
    container: Container,
    scale_dtype: torch.dtype,
) -> NDArray[np.float64]:
    """Scores of a format that the pass did not know, from the factors that it left.

    The weights' part is that of `Factored`. The inputs' part is computed on the sampled rows,
    input by input, and added over the inputs of a group.

    Args:
        arrays: what `Factored.results` gave; a study keeps them with its scoring stage.
        calibration: of the format; of its other entries nothing is used.

    Returns:
        float64 [groups], nats per token; NaN where a group is not calibrated for the format.

    Raises:
        InputError: the format has a branch of low rank, for which gradients were not kept.
    """
    if FORMATS[name].low_rank:
        raise InputError(
            f"a format that is scored from factors must have no branch of low rank, got {name}; "
            "search with it from the start"
        )
    factors = Factors(model_map, fusion_leaders(model_map))
    factors.load(arrays)
    errors = WeightErrors(model, calibration, container, scale_dtype, torch.float32)

    def score(group: DecisionGroup) -> float:
        if name == NONE:
            return 0.0
        if any((slot, name) not in calibration for slot in group.slots):
            return float("nan")
        slots = [model_map.slots[slot] for slot in group.slots]
        total = sum(factors.weight_score(slot, errors.get(slot, name)) for slot in slots)
        for leader in dict.fromkeys(factors.leader(slot) for slot in slots):
            scales = calibration[leader, name]

            def error_of(inputs: Tensor, leader: Any = leader, scales: Any = scales) -> Tensor:
                seen = QuantizedInputs(leader, inputs, container)
                return seen.get(name, scales) - seen.exact

            total += factors.input_score(leader, error_of)
        return 0.5 * total

    return np.asarray([score(group) for group in model_map.groups])
