"""Times our solver beside plain HiGHS and PuLP/CBC, and compares what they find.

    python benchmarks/solver.py [--groups 40 200 1000] [--scales 1 1e-6 1e-12] [--repeats 5]

All solve the same synthetic instances in one process: one decision group per attention or MLP
matrix of an 8-billion-parameter shape, three formats and none, scores spread log-normally. Plain
HiGHS and CBC get the scores as they are, with default tolerances, as one would first write it.
PuLP is left out where it is not installed. Every figure is a ratio to ours: medians of wall time
(above 1: slower), worst and median of the predicted loss found (above 1: worse).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from autoq.formats import NONE, FormatName
from autoq.models import GroupName
from autoq.search import CostTable, SensitivityTable, effective_bits, solve
from autoq.search._highs import quiet_stdout

FORMATS = tuple(map(FormatName, ("fp8", "nvfp4", "w4a8_awq", NONE)))
BITS_PER_WEIGHT = np.array([8.0, 4.5, 4.25, 16.0])
MATRIX_WEIGHTS = np.array([4096 * 6144, 4096 * 4096, 4096 * 28672, 14336 * 4096])
BUDGETS_BITS = (4.8, 5.5, 6.5)
TIME_LIMIT_SECONDS = 60

Solver = Callable[[SensitivityTable, CostTable, float], NDArray[np.int64] | None]
"""Returns the format column of each group, or None where it found nothing."""


def instance(groups: int, scale: float, seed: int) -> tuple[SensitivityTable, CostTable]:
    """Synthetic tables; `scale` is the size of a typical nvfp4 score."""
    generator = np.random.default_rng(seed)
    names = tuple(GroupName(f"group.{row}") for row in range(groups))
    weights = MATRIX_WEIGHTS[np.arange(groups) % len(MATRIX_WEIGHTS)].astype(np.int64)
    bits = np.outer(weights, BITS_PER_WEIGHT).astype(np.int64)
    typical = generator.lognormal(0, 1.5, (groups, 1)) * [0.03, 1.0, 1.2]
    scores = scale * typical * generator.lognormal(0, 0.4, (groups, 3))
    sensitivity = SensitivityTable(
        groups=names,
        formats=FORMATS[:-1],
        contributions=scores[None],
        unit="relative",
        estimator="synthetic",
    )
    costs = CostTable(
        groups=names,
        formats=FORMATS,
        weights=weights,
        effective_bits=bits,
        stored_bits=bits,
        peer_bits=bits.astype(np.float64),
        allowed=np.ones(bits.shape, dtype=np.bool_),
    )
    return sensitivity, costs


def all_scores(sensitivity: SensitivityTable) -> NDArray[np.float64]:
    """[groups, formats] with the zero column of `none`."""
    scores = sensitivity.scores()
    return np.concatenate([scores, np.zeros((len(scores), 1))], axis=1)


def with_autoq(
    sensitivity: SensitivityTable, costs: CostTable, budget_bits: float
) -> NDArray[np.int64]:
    """This package."""
    plan = solve(sensitivity, costs, budget_bits, time_limit_seconds=TIME_LIMIT_SECONDS)
    return np.array([costs.formats.index(plan.assignment[group]) for group in costs.groups])


def with_plain_highs(
    sensitivity: SensitivityTable, costs: CostTable, budget_bits: float
) -> NDArray[np.int64] | None:
    """scipy's HiGHS on unscaled scores and bits, with default tolerances."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    shape = costs.effective_bits.shape
    one_each = kron(np.eye(shape[0]), np.ones((1, shape[1])), format="csr")
    row = csr_array(costs.effective_bits.reshape(1, -1).astype(np.float64))
    with quiet_stdout():
        found = milp(
            all_scores(sensitivity).ravel(),
            integrality=np.ones(costs.effective_bits.size),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(row, -np.inf, budget_bits * costs.weights.sum()),
            ],
            options={"time_limit": TIME_LIMIT_SECONDS},
        )
    return None if found.x is None else found.x.reshape(shape).argmax(axis=1)


def with_pulp(
    sensitivity: SensitivityTable, costs: CostTable, budget_bits: float
) -> NDArray[np.int64]:
    """PuLP's bundled CBC on unscaled scores, with default tolerances."""
    pulp = importlib.import_module("pulp")
    scores = all_scores(sensitivity)
    cells = [(row, column) for row in range(len(scores)) for column in range(len(costs.formats))]
    take = pulp.LpVariable.dicts("take", cells, cat="Binary")
    problem = pulp.LpProblem("plan", pulp.LpMinimize)
    problem += pulp.lpSum(float(scores[cell]) * take[cell] for cell in cells)
    for row in range(len(scores)):
        problem += pulp.lpSum(take[row, column] for column in range(len(costs.formats))) == 1
    problem += pulp.lpSum(
        int(costs.effective_bits[cell]) * take[cell] for cell in cells
    ) <= budget_bits * int(costs.weights.sum())
    problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=TIME_LIMIT_SECONDS))
    taken = np.array([take[cell].value() for cell in cells], dtype=np.float64)
    columns: NDArray[np.int64] = taken.reshape(scores.shape).argmax(axis=1)
    return columns


def loss_of(sensitivity: SensitivityTable, columns: NDArray[np.int64]) -> float:
    """Predicted loss of the format columns taken."""
    return float(all_scores(sensitivity)[np.arange(len(columns)), columns].sum())


def fits(costs: CostTable, columns: NDArray[np.int64], budget_bits: float) -> bool:
    """Whether the format columns stay within the budget, CBC's rounding of 1e-9 forgiven."""
    formats = [costs.formats[column] for column in columns]
    taken = effective_bits(costs, dict(zip(costs.groups, formats, strict=True)))
    return taken <= budget_bits * (1 + 1e-9)


def compare(groups: int, scale: float, repeats: int, solvers: dict[str, Solver]) -> None:
    """Print one line for each solver over all seeds and budgets."""
    seconds: dict[str, list[float]] = {name: [] for name in solvers}
    losses: dict[str, list[float]] = {name: [] for name in solvers}
    for seed in range(repeats):
        sensitivity, costs = instance(groups, scale, seed)
        for budget_bits in BUDGETS_BITS:
            for name, solver in solvers.items():
                start = time.perf_counter()
                columns = solver(sensitivity, costs, budget_bits)
                seconds[name].append(time.perf_counter() - start)
                usable = columns is not None and fits(costs, columns, budget_bits)
                loss = loss_of(sensitivity, columns) if usable and columns is not None else np.inf
                losses[name].append(loss)
    ours_seconds = statistics.median(seconds["autoq"])
    for name in solvers:
        ratios = np.array(losses[name]) / np.array(losses["autoq"])
        print(
            f"{groups:6d} {scale:8.0e}  {name:12s} {statistics.median(seconds[name]):9.4f} "
            f"{statistics.median(seconds[name]) / ours_seconds:10.2f} "
            f"{np.median(ratios):12.6f} {ratios.max():12.6f}",
            flush=True,
        )


def main() -> None:
    """Compare over all sizes and scales asked for."""
    parser = argparse.ArgumentParser(description="Our solver beside plain HiGHS and PuLP/CBC.")
    parser.add_argument("--groups", type=int, nargs="+", default=[40, 200, 1000])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1e-6, 1e-12])
    parser.add_argument("--repeats", type=int, default=5, help="instances per size and scale")
    arguments = parser.parse_args()
    solvers: dict[str, Solver] = {"autoq": with_autoq, "plain_highs": with_plain_highs}
    if importlib.util.find_spec("pulp"):
        solvers["pulp_cbc"] = with_pulp
    with_autoq(*instance(8, 1.0, 0), 6.5)  # imports are not what is compared
    print("groups    scale  solver         seconds time ratio  loss median   loss worst")
    for groups in arguments.groups:
        for scale in arguments.scales:
            compare(groups, scale, arguments.repeats, solvers)


if __name__ == "__main__":
    main()
