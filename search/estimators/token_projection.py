"""Projections of every token's output error on its gradient: half the squared sums, in nats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.formats import FormatName
from autoq.layers.taps import MatrixCall
from autoq.models import SlotName, WeightSlot
from autoq.search._batch_loss import BatchLoss
from autoq.search._projections import Projections, Rows, seen_inputs
from autoq.search._shared_inputs import (
    ProjectedRows,
    SharedInput,
    formats_with_equal_inputs,
    shared_by,
)
from autoq.search._token_sampling import (
    ADDED_VARIANCE,
    importance,
    inclusion_probabilities,
    sampled_rows,
)
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
    difference of two large ones. Members of a fusion set share x, and formats may share x', so
    each x' is made once, and the members' products are one.

    The product is made for the tokens that matter, with inverse probabilities as weights
    (`autoq.search._token_sampling`): a quarter of them is as good as all. Groups whose products do
    not come together, once, as the experts of a layer, take all tokens: a sum has to be over the
    same tokens before it is squared.

    The same projections give what every two cells do together (`GramMatrix`), at no further pass.
    A token that two groups take with different probabilities counts there by the root of their
    ratio: a lower bound in magnitude, and near, for such tokens hardly contribute.

    Source: Martens, "New insights and perspectives on the natural gradient method", 2020.
    """

    name: ClassVar[str] = "token_projection"
    keeps_interactions: ClassVar[bool] = True
    samples_tokens: ClassVar[bool] = True
    goes_block_by_block: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        interactions: bool = True,
        added_variance: float = ADDED_VARIANCE,
        **options: Any,
    ) -> None:
        """
        Args:
            interactions: also sum up the cross terms of all cells, where there are few enough.
            added_variance: what sampling tokens may add to scores; see `inclusion_probabilities`.
                0 takes all tokens.
        """
        super().__init__(*args, **options)
        self._added_variance = added_variance if self.samples_tokens else 0.0
        self._slots_of = {group.name: set(group.slots) for group in self._map.groups}
        self._sets = shared_by(self._map, self._errors.most_weights)
        self._shared: SharedInput | None = None
        self._alike_of: dict[tuple[SlotName, ...], list[list[FormatName]]] = {}
        kept = interactions and self.keeps_interactions
        self._gram = (
            GramMatrix(self._group_index, len(self.formats))
            if kept and GramMatrix.fits(len(self._map.groups), len(self.formats))
            else None
        )

    def _draw(
        self, index: int, draw: int, batch: BatchLoss, *, keep_graph: bool
    ) -> NDArray[np.float64]:
        self._shared = None  # whatever a backward left that failed
        return super()._draw(index, draw, batch, keep_graph=keep_graph)

    def _project(
        self,
        call: MatrixCall,
        accumulator: Tensor,
        positions: Rows,
        inputs: Tensor,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> None:
        if self._shared is None or not self._shared.takes(call.slot, inputs):
            self._project_shared()
            own = (call.slot.name,)
            members = own if call.token_rows is not None else self._sets.get(call.slot.name, own)
            self._shared = SharedInput(members, inputs, accumulator, positions)
        self._shared.add(call.slot, output_gradient, input_gradient)
        if self._shared.is_complete:
            self._project_shared()

    def _alike(self, slots: tuple[WeightSlot, ...]) -> list[list[FormatName]]:
        """The formats that all slots can take, in sets that leave the same of their input."""
        names = tuple(slot.name for slot in slots)
        if names not in self._alike_of:
            possible = [name for name in self.formats if self._can_take(slots, name)]
            self._alike_of[names] = formats_with_equal_inputs(
                names[0], possible, self._calibration, self._container
            )
        return self._alike_of[names]

    def _can_take(self, slots: tuple[WeightSlot, ...], name: FormatName) -> bool:
        return all((slot.name, name) in self._calibration for slot in slots)

    def _end_backward(self) -> None:
        self._project_shared()
        super()._end_backward()

    @torch.no_grad()
    def _project_shared(self) -> None:
        """Add to the sums what the products that were gathered contribute."""
        shared, self._shared = self._shared, None
        if shared is None:
            return
        slots = shared.slots
        for column, name in enumerate(self.formats):
            if not self._can_take(slots, name):
                shared.accumulator[column] = torch.nan
        rows = self._rows_that_matter(shared)
        for names in self._alike(slots):
            calibration = self._calibration[slots[0].name, names[0]]
            changed = seen_inputs(rows.inputs, names[0], calibration, self._container)
            for name in names:
                projections = self._errors.project(
                    slots, name, rows.output_gradient, changed, rows.inputs, rows.input_gradient
                )
                # An expert's rows are different tokens, so no position comes twice.
                shared.accumulator[self.formats.index(name), rows.positions] += rows.weighted(
                    projections
                )

    def _rows_that_matter(self, shared: SharedInput) -> ProjectedRows:
        whole = ProjectedRows.all_of(shared)
        if not self._added_variance or not self._is_whole_group(shared):
            return whole
        size = importance(whole.inputs, whole.output_gradient)
        probability = inclusion_probabilities(size, self._added_variance)
        uniform = self._projections.uniform(len(probability), probability.device)
        return whole.taken(*sampled_rows(probability, uniform))

    def _is_whole_group(self, shared: SharedInput) -> bool:
        """Whether a group's rows get all that they will get, and are all its tokens."""
        slots = shared.slots
        return (
            shared.has_all_tokens
            and {slot.name for slot in slots} == self._slots_of[self._group_of[slots[0].name]]
            and all(self._reach.ran_once(slot.name) for slot in slots)
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

    def keep_batches_apart(self) -> bool:
        """See `Estimator`."""
        if self._gram is not None:
            self._gram.keep_batches_apart()
        return True

    def addition(self) -> Mapping[str, NDArray[Any]]:
        """The terms of the sums of cross terms."""
        return {} if self._gram is None else self._gram.addition()

    def add(self, addition: Mapping[str, NDArray[Any]]) -> None:
        """Add those of a batch."""
        if self._gram is not None:
            self._gram.add_all(addition)

    def score_batch(self, index: int, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """See `SensitivityScorer.score_batch`."""
        if self._gram is not None:
            self._gram.begin_batch()
        return super().score_batch(index, loss)

    def results(self) -> Mapping[str, NDArray[Any]]:
        """`interactions`: float64 [groups, formats, groups, formats], in nats per token."""
        return {} if self._gram is None else {"interactions": self._gram.matrix()}
