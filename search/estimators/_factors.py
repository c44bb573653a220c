"""Second moments of layers' inputs and output gradients, and what they say of an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.layers.taps import MatrixCall
from autoq.models import ModelMap, SlotName, WeightSlot

FACTOR_BYTES = 3 << 28
"""Memory for second moments; the largest ones are kept as diagonals to stay within it."""

SAMPLED_ROWS = 256
"""Input rows of each fusion set that are kept to score the inputs of formats yet unknown."""

ROWS_PER_PRODUCT = 32
"""Of them at most so many come from one product, so that they come from several batches."""

Factor = Tensor
"""float32 [n, n], or [n] where only the diagonal is kept."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Rows that are kept of one product's input, and for which of its fusion set they are."""

    rows: Tensor  # their numbers among the input's rows
    place: slice  # theirs among all that are kept
    members: set[SlotName]


class Factors:
    """Sums over tokens, by slot: x x^T of its inputs x, g g^T of its output gradients g.

    Members of a fusion set share their inputs, which are summed for the set's first member. What
    was given out stays as it was: sums are replaced, not added to.
    """

    def __init__(self, model_map: ModelMap, leaders: Mapping[SlotName, SlotName]) -> None:
        self._leaders = leaders
        slots = list(model_map.slots.values())
        leading = [slot for slot in slots if self.leader(slot) == slot.name]
        wanted = [(slot.in_features, "inputs", slot.name) for slot in leading]
        wanted += [(slot.out_features, "gradients", slot.name) for slot in slots]
        whole = _whole_within(wanted, FACTOR_BYTES)
        self.sums: dict[str, Tensor] = {
            f"{kind}/{name}": torch.zeros((size, size) if (kind, name) in whole else size)
            for size, kind, name in wanted
        }
        for slot in leading:
            self.sums[f"rows/{slot.name}"] = torch.zeros((), dtype=torch.float64)
            self.sums[f"kept/{slot.name}"] = torch.zeros((), dtype=torch.int64)
            for what in ("sampled_inputs", "sampled_gradients"):
                self.sums[f"{what}/{slot.name}"] = torch.zeros(SAMPLED_ROWS, slot.in_features)
        self.tokens = torch.zeros((), dtype=torch.float64)
        self._samples: dict[SlotName, _Sample] = {}

    def leader(self, slot: WeightSlot) -> SlotName:
        """The slot that stands for the inputs of `slot`."""
        return self._leaders.get(slot.name, slot.name)

    def add(
        self, call: MatrixCall, inputs: Tensor, output_gradient: Tensor, input_gradient: Tensor
    ) -> None:
        """Add one product's rows."""
        name, leader = call.slot.name, self.leader(call.slot)
        self._add_moment(f"gradients/{name}", output_gradient)
        if name == leader:
            self._add_moment(f"inputs/{name}", inputs)
            self.sums[f"rows/{name}"] = self.sums[f"rows/{name}"] + len(inputs)
        self._sample(name, leader, inputs, input_gradient)

    def end_batch(self, tokens: int) -> None:
        """A batch of so many tokens with a loss term is through."""
        self.tokens = self.tokens + tokens
        self._samples.clear()

    def _add_moment(self, name: str, rows: Tensor) -> None:
        total, rows = self.sums[name], rows.float()
        moment = rows.t() @ rows if total.dim() == 2 else rows.square().sum(dim=0)
        self.sums[name] = moment.cpu().add_(total)

    def _sample(
        self, name: SlotName, leader: SlotName, inputs: Tensor, input_gradient: Tensor
    ) -> None:
        """Keep some rows; gradients of a set's members add up, as their shared input has one."""
        sample = self._samples.get(leader)
        if sample is None or name in sample.members:  # where a module runs again, its inputs differ
            sample = self._begin_sample(leader, inputs, is_first=sample is None)
        sample.members.add(name)
        gradients = input_gradient[sample.rows.to(inputs.device)].float().cpu()
        self.sums[f"sampled_gradients/{leader}"][sample.place] += gradients

    def _begin_sample(self, leader: SlotName, inputs: Tensor, *, is_first: bool) -> _Sample:
        start = int(self.sums[f"kept/{leader}"])
        take = max(min(ROWS_PER_PRODUCT, SAMPLED_ROWS - start, len(inputs)), 0)
        rows = torch.linspace(0, len(inputs) - 1, take).long()
        sample = _Sample(rows, slice(start, start + take), set())
        for what in ("sampled_inputs", "sampled_gradients"):
            key = f"{what}/{leader}"
            if is_first and take:
                self.sums[key] = self.sums[key].clone()  # that of earlier batches was given out
            self.sums[key][sample.place] = 0.0
        self.sums[f"sampled_inputs/{leader}"][sample.place] = inputs[rows.to(inputs.device)].cpu()
        self.sums[f"kept/{leader}"] = self.sums[f"kept/{leader}"] + take
        self._samples[leader] = sample
        return sample

    def weight_score(self, slot: WeightSlot, error: Tensor) -> float:
        """tr(B dW A dW^T) per token, for a token's A = E[x x^T] and B = E[g g^T].

        Args:
            error: dW, [out_features, in_features].
        """
        inputs = self.sums[f"inputs/{self.leader(slot)}"]
        gradients = self.sums[f"gradients/{slot.name}"]
        rows = float(self.sums[f"rows/{self.leader(slot)}"])
        tokens = float(self.tokens)
        if not rows or not tokens:
            return 0.0  # an expert that no token was routed to
        error = error.float().cpu()
        left = gradients @ error if gradients.dim() == 2 else gradients[:, None] * error
        right = error @ inputs if inputs.dim() == 2 else error * inputs
        return float((left.double() * right.double()).sum()) / rows / tokens

    def input_score(self, leader: SlotName, error_of: Any) -> float:
        """E[((x' - x) . g W)^2] per token of a fusion set, from the sampled rows.

        Args:
            error_of: inputs x [rows, in_features] -> x' - x.
        """
        kept = int(self.sums[f"kept/{leader}"])
        tokens = float(self.tokens)
        if not kept or not tokens:
            return 0.0
        inputs = self.sums[f"sampled_inputs/{leader}"][:kept]
        gradients = self.sums[f"sampled_gradients/{leader}"][:kept]
        projections = (error_of(inputs) * gradients).sum(dim=1).double()
        share = float(self.sums[f"rows/{leader}"]) / tokens
        return float(projections.square().mean()) * share

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything, to be stored."""
        found = {f"factors/{name}": values.numpy() for name, values in self.sums.items()}
        return {**found, "factors/tokens": self.tokens.numpy()}

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `arrays` gave."""
        for name in self.sums:
            self.sums[name] = torch.from_numpy(np.array(arrays[f"factors/{name}"]))
        self.tokens = torch.from_numpy(np.array(arrays["factors/tokens"]))


def _whole_within(
    wanted: Iterable[tuple[int, str, SlotName]], limit_bytes: int
) -> set[tuple[str, SlotName]]:
    """The matrices to keep whole: the smallest first, as many as fit."""
    whole, left = set(), limit_bytes
    for size, kind, name in sorted(wanted):
        left -= 4 * size * size
        if left < 0:
            break
        whole.add((kind, name))
    return whole
