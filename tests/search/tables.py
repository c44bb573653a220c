"""Random tables with several resources, and their optimum by trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.formats import FormatName
from autoq.models import GroupName
from autoq.search import Budget, CostTable, Resource, SensitivityTable

FORMATS = tuple(FormatName(name) for name in ("fp8", "nvfp4", "w4a8_awq", "none"))
BITS = np.array([8.0, 4.5, 4.25, 16.0])
ACTIVE, LATENCY = Resource.ACTIVE_BITS, Resource.LATENCY
BITS_RESOURCE, BYTES = Resource.EFFECTIVE_BITS, Resource.STORED_BYTES


def several_tables(
    seed: int, groups: int, *, scale: float = 1.0, sequences: int = 1, noise: float = 0.3
) -> tuple[SensitivityTable, CostTable]:
    """Tables with all resources: experts make active bits, and shapes make latency, their own."""
    rng = np.random.default_rng(seed)
    names = tuple(GroupName(f"g{row:05d}") for row in range(groups))
    weights = 4 * rng.integers(1, 2000, groups)
    bits = np.outer(weights, BITS).astype(np.int64)
    scores = scale * rng.lognormal(0, 1.5, (groups, 1)) * rng.lognormal(0, 0.5, (groups, 3))
    scores[:, 0] *= 0.03
    spread = rng.lognormal(0, noise, (sequences, groups, 3)) if sequences > 1 else 1.0
    touched = rng.choice([0.1, 0.25, 1.0], groups)
    speeds = rng.lognormal(0, 0.3, (groups, 4)) * [0.7, 0.45, 0.6, 1.0]
    sensitivity = SensitivityTable(
        groups=names,
        formats=FORMATS[:3],
        contributions=scores * spread * np.ones((sequences, 1, 1)),
        unit="nats_per_token",
        estimator="test",
    )
    costs = CostTable(
        groups=names,
        formats=FORMATS,
        weights=weights,
        effective_bits=bits,
        stored_bits=bits + 64,
        peer_bits=np.outer(weights, [8.0, 4.5, 4.0, 16.0]),
        allowed=np.ones(bits.shape, dtype=np.bool_),
        additional={
            ACTIVE: bits * touched[:, None] / (weights * touched).sum(),
            LATENCY: weights[:, None] * speeds * 1e-9,
        },
        fixed={BYTES: 4096.0, LATENCY: 1e-4},
    )
    return sensitivity, costs


def between(costs: CostTable, resource: Resource, share: float) -> Budget:
    """A budget between the least (0) and the most (1) that plans take of a resource."""
    table = amounts(costs, resource)
    least, most = table.min(axis=1).sum(), table.max(axis=1).sum()
    rest = costs.fixed.get(resource, 0.0)
    return Budget(resource=resource, limit=float(least + share * (most - least) + rest))


def amounts(costs: CostTable, resource: Resource) -> NDArray[np.float64]:
    """Cells in the resource's unit, [groups, formats]."""
    if resource is BITS_RESOURCE:
        return costs.effective_bits / costs.weights.sum()
    return costs.stored_bits / 8 if resource is BYTES else costs.additional[resource]


def every_choice(
    sensitivity: SensitivityTable, costs: CostTable
) -> tuple[NDArray[np.float64], dict[Resource, NDArray[np.float64]]]:
    """Losses, and what is taken of each resource, of all assignments."""
    scores = np.concatenate([sensitivity.scores(), np.zeros((len(costs.groups), 1))], axis=1)
    rows = np.arange(len(costs.groups))
    every = np.array(list(itertools.product(range(len(FORMATS)), repeat=len(rows))))
    every = every[costs.allowed[rows, every].all(axis=1)]
    taken = {
        resource: amounts(costs, resource)[rows, every].sum(axis=1) + costs.fixed.get(resource, 0.0)
        for resource in Resource
    }
    return scores[rows, every].sum(axis=1), taken


def best_by_trying(
    sensitivity: SensitivityTable, costs: CostTable, budgets: Sequence[Budget]
) -> float:
    """The least loss of all assignments within the budgets; inf when there is none."""
    losses, taken = every_choice(sensitivity, costs)
    fits = np.ones(len(losses), dtype=np.bool_)
    for budget in budgets:
        fits &= taken[budget.resource] <= budget.limit * (1 + 1e-13)
    return float(losses[fits].min()) if fits.any() else float("inf")
