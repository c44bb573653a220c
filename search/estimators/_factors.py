"""Second moments of layers' inputs and output gradients, and what they say of an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

ROWS_PER_BATCH = 32
"""Of them at most so many come from one batch, so that they come from several."""

Factor = Tensor
"""float32 [n, n], or [n] where only the diagonal is kept."""


class Factors:
    """Sums over tokens, by slot: x x^T of its inputs x, g g^T of its output gradients g.

    Members of a fusion set share their inputs, which are summed for the set's first member.
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
        self._sampled_now: dict[SlotName, Tensor] = {}

    def leader(self, slot: WeightSlot) -> SlotName:
        """The slot that stands for the inputs of `slot`."""
        return self._leaders.get(slot.name, slot.name)

    def add(
        self, call: MatrixCall, inputs: Tensor, output_gradient: Tensor, input_gradient: Tensor
    ) -> None:
        """Add one product's rows."""
        name, leader = call.slot.name, self.leader(call.slot)
        _add_moment(self.sums[f"gradients/{name}"], output_gradient)
        if name == leader:
            _add_moment(self.sums[f"inputs/{name}"], inputs)
            self.sums[f"rows/{name}"] += len(inputs)
        self._sample(leader, inputs, input_gradient)

    def end_batch(self, tokens: int) -> None:
        """A batch of so many tokens with a loss term is through."""
        self.tokens += tokens
        for leader, rows in self._sampled_now.items():
            self.sums[f"kept/{leader}"] += len(rows)
        self._sampled_now.clear()

    def _sample(self, leader: SlotName, inputs: Tensor, input_gradient: Tensor) -> None:
        """Keep some rows; gradients of a set's members add up, as their shared input has one."""
        start = int(self.sums[f"kept/{leader}"])
        first = leader not in self._sampled_now
        if first:
            take = min(ROWS_PER_BATCH, SAMPLED_ROWS - start, len(inputs))
            self._sampled_now[leader] = torch.linspace(0, len(inputs) - 1, max(take, 0)).long()
        rows = self._sampled_now[leader]
        place = slice(start, start + len(rows))
        if first:
            self.sums[f"sampled_inputs/{leader}"][place] = inputs[rows.to(inputs.device)].cpu()
        gradients = input_gradient[rows.to(inputs.device)].float().cpu()
        self.sums[f"sampled_gradients/{leader}"][place] += gradients

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


def _add_moment(total: Tensor, rows: Tensor) -> None:
    rows = rows.float()
    moment = rows.t() @ rows if total.dim() == 2 else rows.square().sum(dim=0)
    total += moment.cpu()


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
