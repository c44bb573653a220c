"""Plain data between sensitivity, costs, the solver and whoever stores or shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from autoq.formats import FormatName
from autoq.models import GroupName


class Resource(StrEnum):
    """What a plan takes and a budget limits."""

    EFFECTIVE_BITS = "effective_bits"  # mean bits per searched weight, codes and block scales
    STORED_BYTES = "stored_bytes"  # weights of the whole checkpoint, unsearched tensors included
    ACTIVE_BITS = "active_bits"  # mean bits per weight that a token touches
    LATENCY = "latency_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A plan takes no more than `limit` of `resource`, in the resource's own unit."""

    resource: Resource
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityTable:
    """Expected loss increase of each group in each format.

    `contributions[s, g, f]` is what calibration sequence `s` says of quantising group `g` alone
    in format `f`; their mean over sequences is the score. `none` is not a column: it costs
    nothing by definition. Cells that a group cannot take are NaN.
    """

    groups: tuple[GroupName, ...]
    formats: tuple[FormatName, ...]  # without "none"
    contributions: NDArray[np.float64]  # [sequences, groups, formats]
    unit: str  # "nats_per_token" when it predicts KL divergence, else "relative"
    estimator: str

    def scores(self) -> NDArray[np.float64]:
        """Mean loss increase, [groups, formats]; NaN where a group cannot take the format."""
        return np.asarray(self.contributions.mean(axis=0), dtype=np.float64)

    def standard_errors(self) -> NDArray[np.float64]:
        """Standard error of `scores` from the spread over sequences, [groups, formats]."""
        sequences = self.contributions.shape[0]
        if sequences < 2:
            return np.full(self.contributions.shape[1:], np.inf)
        spread = self.contributions.std(axis=0, ddof=1)
        return np.asarray(spread / np.sqrt(sequences), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """What each group costs in each format; `none` is a column like the others.

    Bits are integers and exact. `allowed[g, f]` is False where shape, engine or a user's rule
    forbids the format for the group.

    What a plan takes of a resource is the sum over its cells plus what is `fixed`, the share of
    everything that is not searched. Effective bits and stored bytes follow from the integer tables;
    `additional` holds the cells of other resources, already divided so that the sum is the value.
    """

    groups: tuple[GroupName, ...]
    formats: tuple[FormatName, ...]  # "none" included
    weights: NDArray[np.int64]  # [groups]
    effective_bits: NDArray[np.int64]  # [groups, formats]: codes and block scales
    stored_bits: NDArray[np.int64]  # [groups, formats]: everything that is written
    peer_bits: NDArray[np.float64]  # [groups, formats]: as ModelOpt charges them
    allowed: NDArray[np.bool_]  # [groups, formats]
    additional: Mapping[Resource, NDArray[np.float64]] = field(default_factory=dict)
    fixed: Mapping[Resource, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """The proof that a plan takes as little of a resource as a limit on its loss allows."""

    resource: Resource
    loss_limit: float
    value: float  # what the plan takes
    bound: float  # no plan within the limits takes less
    gap: float  # (value - bound) / value; 0 when both are 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An assignment with its predicted loss, its costs, and how far from optimal it can be."""

    assignment: Mapping[GroupName, FormatName]
    budget_bits: float  # effective bits per weight asked for; those taken where none were
    effective_bits: float  # per weight, codes and block scales
    peer_effective_bits: float  # per weight, as ModelOpt counts
    stored_bits_per_weight: float  # per weight, everything that is written
    stored_bytes: int
    predicted_loss: float
    predicted_loss_interval: tuple[float, float]  # 95 %, from the spread over sequences
    bound: float  # no assignment within the budgets has a lower predicted loss
    gap: float  # (predicted_loss - bound) / predicted_loss; 0 when both are 0
    budgets: tuple[Budget, ...] = ()  # all limits that were asked for
    takes: Mapping[Resource, float] = field(default_factory=dict)  # every resource with costs
    least: Least | None = None  # when the loss was limited and a resource minimised
