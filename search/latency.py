"""How long the searched layers' matrix products take, in each format, for some tokens at once.

The time of a layer is that of its products with the tokens of one step: one per sequence in
decoding, all of a prompt's in prefill. It comes from measured kernels where there is a table of
them, and otherwise from the roofline model (Williams, Waterman and Patterson, 2009): moving the
operands, or multiplying them, whatever takes longer. Attention, norms and layers that are not
searched are left out: no choice of formats changes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.formats import FORMATS, FormatName, QuantFormat
from autoq.models import DecisionGroup, ModelMap, SlotName, WeightSlot
from autoq.models.grouping import is_expert
from autoq.search.hardware import Gpu, MatrixUnit

_BITS_PER_BYTE = 8
_ACTIVATION_BYTES = 2
"""Inputs are read and outputs written in 16 bits, whatever the matrix units take."""


class LatencyModel(Protocol):
    """Predicts the time of one matrix product."""

    @property
    def name(self) -> str:
        """What plans that were solved with this model are labelled with; other times, other name."""
        ...

    @property
    def hardware(self) -> str:
        """Where the times are those of."""
        ...

    def seconds(
        self, fmt: QuantFormat, *, tokens: float, out_features: int, in_features: int
    ) -> float:
        """Time of an input [tokens, in_features] times a weight [out_features, in_features].

        Args:
            fmt: of the weight and the input.
            tokens: at least 1; an expectation, so not always whole.
        Raises:
            InputError: nothing is known of the format.
        """
        ...


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least time that a GPU's memory and matrix units allow."""

    gpu: Gpu

    @property
    def name(self) -> str:
        """The GPU's name."""
        return self.gpu.name

    @property
    def hardware(self) -> str:
        """The GPU, and where its figures come from."""
        return f"{self.gpu.description} ({self.gpu.source})"

    def seconds(
        self, fmt: QuantFormat, *, tokens: float, out_features: int, in_features: int
    ) -> float:
        """See `LatencyModel`; the weight moves with its block scales and its branch of low rank."""
        weight_bits = fmt.storage_bits(out_features, in_features).effective_bits
        moved = weight_bits / _BITS_PER_BYTE
        moved += tokens * (in_features + out_features) * _ACTIVATION_BYTES
        operations = 2.0 * tokens * out_features * in_features
        rate = self.gpu.operations_per_second[self.gpu.unit_for(fmt)]
        rank = fmt.branch_rank(out_features, in_features)
        branch = 2.0 * tokens * rank * (out_features + in_features)
        branch /= self.gpu.operations_per_second[MatrixUnit.BF16]
        return max(moved / self.gpu.bytes_per_second, operations / rate + branch)


def latency_seconds(
    model_map: ModelMap,
    formats: Sequence[FormatName],
    model: LatencyModel,
    *,
    tokens: int,
    shares: Mapping[SlotName, float],
) -> NDArray[np.float64]:
    """Expected time of each group's products in each format, [groups, formats].

    Members of a fusion set are one product, as engines run them. An expert that each token takes
    with probability p, independently of the others, is touched by `tokens` of them with
    probability 1 - (1 - p)^tokens, and then works on tokens * p / that many on average. Cells of
    shapes that a format refuses are NaN.

    Args:
        tokens: of one step, over all sequences.
        shares: of each slot, how many of the tokens it sees; see `autoq.search.costs.token_shares`.
    Raises:
        InputError: the model knows nothing of a format, or `tokens` is below 1.
    """
    if tokens < 1:
        raise InputError(f"latency is predicted for at least 1 token, got {tokens}; give more")
    columns = [FORMATS[name] for name in formats]
    table = np.full((len(model_map.groups), len(columns)), np.nan)
    for row, group in enumerate(model_map.groups):
        products = list(_products(group, model_map, tokens, shares))
        for column, fmt in enumerate(columns):
            if not any(fmt.refusal(each.out_features, each.in_features) for each in products):
                table[row, column] = math.fsum(_expected(each, fmt, model) for each in products)
    return table


@dataclass(frozen=True, slots=True)
class _Product:
    """One matrix, how likely a step multiplies by it, and with how many tokens if it does."""

    out_features: int
    in_features: int
    probability: float
    tokens: float


def _expected(product: _Product, fmt: QuantFormat, model: LatencyModel) -> float:
    if product.probability == 0.0:
        return 0.0
    return product.probability * model.seconds(
        fmt,
        tokens=product.tokens,
        out_features=product.out_features,
        in_features=product.in_features,
    )


def products_of(model_map: ModelMap) -> set[tuple[int, int]]:
    """(out_features, in_features) of every product, fused ones as one."""
    return {
        (sum(slot.out_features for slot in slots), slots[0].in_features)
        for group in model_map.groups
        for slots in _fused(group, model_map)
    }


def _products(
    group: DecisionGroup, model_map: ModelMap, tokens: int, shares: Mapping[SlotName, float]
) -> Iterator[_Product]:
    for slots in _fused(group, model_map):
        first = slots[0]
        share, probability, rows = shares[first.name], 1.0, float(tokens)
        if is_expert(first):
            probability = 1.0 - (1.0 - min(share, 1.0)) ** tokens
            rows = max(tokens * share / probability, 1.0) if probability else 0.0
        yield _Product(
            sum(slot.out_features for slot in slots), first.in_features, probability, rows
        )


def _fused(group: DecisionGroup, model_map: ModelMap) -> Iterator[list[WeightSlot]]:
    """The group's slots, those of a fusion set together."""
    fused: set[SlotName] = set()
    for names in group.fusion_sets:
        fused.update(names)
        yield [model_map.slots[name] for name in names]
    for name in group.slots:
        if name not in fused:
            yield [model_map.slots[name]]
