"""Times our solver beside plain HiGHS and PuLP/CBC, and compares what they find.

    python benchmarks/solver.py [--groups 40 200 1000] [--scales 1 1e-6 1e-12] [--repeats 5]
        [--large 100000] [--frontier 1000] [--several 200 1000] [--time-limit 60]

All solve the same synthetic instances in one process: one decision group per attention or MLP
matrix of an 8-billion-parameter shape, three formats and none, scores spread log-normally. Plain
HiGHS and CBC get the scores as they are, with default tolerances, as one would first write it.
Figures of the others are ratios to ours: medians of wall time (above 1: slower), and of the
predicted loss found (above 1: worse). Ours also come in processor time, which a busy machine
changes less.

Tables, in markdown: sizes and scales of the scores; one large instance with seven formats and none,
to a proven gap of 1e-6; a frontier of as many points as groups (the others: the points that they
finish within the time limit); three budgets at once, bits, active bits and latency. 0 groups leave a
table out.

PuLP with CBC, which other tools use, is left out where it is not installed. It is no dependency:
`pip install --target pulp_only pulp`, then run with `PYTHONPATH=pulp_only`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.formats import NONE, FormatName
from autoq.models import GroupName
from autoq.search import (
    Budget,
    CostTable,
    Plan,
    Resource,
    SensitivityTable,
    frontier,
    solve,
)
from autoq.search._highs import quiet_stdout

FORMATS = tuple(map(FormatName, ("fp8", "nvfp4", "w4a8_awq", NONE)))
BITS_PER_WEIGHT = (8.0, 4.5, 4.25, 16.0)
TYPICAL_SCORES = (0.03, 1.0, 1.2)
MANY_FORMATS = (*(FormatName(f"format_{index}") for index in range(7)), NONE)
MANY_BITS_PER_WEIGHT = (3.25, 4.25, 4.5, 5.25, 6.25, 8.0, 8.5, 16.0)
MANY_TYPICAL_SCORES = (6.0, 1.2, 1.0, 0.4, 0.12, 0.03, 0.02)
MATRIX_WEIGHTS = np.array([4096 * 6144, 4096 * 4096, 4096 * 28672, 14336 * 4096])
BUDGETS_BITS = (4.8, 5.5, 6.5)
LARGE_BUDGET_BITS = 5.5
LARGE_GAP = 1e-6
FRONTIER_SAMPLE = 5
ROUNDING = 1e-9
"""CBC and plain HiGHS may exceed a limit by a fraction of this; it is forgiven."""

Columns = NDArray[np.int64]
"""The format column of each group."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """What all solvers get: our tables, and the same as rows of a 0-1 program."""

    sensitivity: SensitivityTable
    costs: CostTable
    budgets: tuple[Budget, ...]

    def scores(self) -> NDArray[np.float64]:
        """[groups, formats] with the zero column of `none`."""
        scores = self.sensitivity.scores()
        return np.concatenate([scores, np.zeros((len(scores), 1))], axis=1)

    def rows(self) -> list[tuple[NDArray[np.float64], float]]:
        """Cells [groups, formats] and limit of each budget, unscaled."""
        weights = float(self.costs.weights.sum())
        return [
            (self.costs.effective_bits.astype(np.float64), budget.limit * weights)
            if budget.resource is Resource.EFFECTIVE_BITS
            else (self.costs.additional[budget.resource], budget.limit)
            for budget in self.budgets
        ]

    def loss_of(self, columns: Columns | None) -> float:
        """Predicted loss; inf where there is no answer or it is over a budget."""
        if columns is None:
            return float("inf")
        taken = np.arange(len(columns)), columns
        over = any(cells[taken].sum() > limit * (1 + ROUNDING) for cells, limit in self.rows())
        return float("inf") if over else float(self.scores()[taken].sum())


Solver = Callable[[Instance, float], Columns | None]
"""From an instance and a time limit in seconds to columns, or None where it found nothing."""


def instance(
    groups: int,
    scale: float,
    seed: int,
    *,
    formats: Sequence[FormatName] = FORMATS,
    bits_per_weight: Sequence[float] = BITS_PER_WEIGHT,
    typical_scores: Sequence[float] = TYPICAL_SCORES,
) -> Instance:
    """Synthetic tables without budgets; `scale` is the size of a typical nvfp4 score."""
    generator = np.random.default_rng(seed)
    names = tuple(GroupName(f"group.{row}") for row in range(groups))
    weights = MATRIX_WEIGHTS[np.arange(groups) % len(MATRIX_WEIGHTS)].astype(np.int64)
    bits = np.outer(weights, bits_per_weight).astype(np.int64)
    typical = generator.lognormal(0, 1.5, (groups, 1)) * np.array(typical_scores)
    scores = scale * typical * generator.lognormal(0, 0.4, typical.shape)
    # Every fourth matrix is one of experts, of which a token touches an eighth.
    touched = np.where(np.arange(groups) % 4 == 2, 0.125, 1.0)
    speeds = generator.lognormal(0, 0.2, bits.shape) * np.sqrt(np.array(bits_per_weight) / 16)
    sensitivity = SensitivityTable(
        groups=names,
        formats=tuple(formats)[:-1],
        contributions=scores[None],
        unit="relative",
        estimator="synthetic",
    )
    costs = CostTable(
        groups=names,
        formats=tuple(formats),
        weights=weights,
        effective_bits=bits,
        stored_bits=bits,
        peer_bits=bits.astype(np.float64),
        allowed=np.ones(bits.shape, dtype=np.bool_),
        additional={
            Resource.ACTIVE_BITS: bits * touched[:, None] / (weights * touched).sum(),
            Resource.LATENCY: weights[:, None] * touched[:, None] * speeds * 1e-12,
        },
    )
    return Instance(sensitivity=sensitivity, costs=costs, budgets=())


def within(found: Instance, *budgets: Budget) -> Instance:
    """The instance with budgets."""
    return Instance(sensitivity=found.sensitivity, costs=found.costs, budgets=budgets)


def bits(limit: float) -> Budget:
    """A budget in effective bits per weight."""
    return Budget(resource=Resource.EFFECTIVE_BITS, limit=limit)


def with_autoq(found: Instance, seconds: float) -> Columns:
    """This package, exactly."""
    plan = solve(found.sensitivity, found.costs, found.budgets, time_limit_seconds=seconds)
    return columns_of(found, plan)


def columns_of(found: Instance, plan: Plan) -> Columns:
    """The plan's format columns."""
    index = {name: column for column, name in enumerate(found.costs.formats)}
    return np.array([index[plan.assignment[group]] for group in found.costs.groups])


def with_plain_highs(found: Instance, seconds: float) -> Columns | None:
    """scipy's HiGHS on unscaled scores and rows, with default tolerances."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    scores = found.scores()
    one_each = kron(eye_array(len(scores)), np.ones((1, scores.shape[1])), format="csr")
    limits = [
        LinearConstraint(csr_array(cells.reshape(1, -1)), -np.inf, limit)
        for cells, limit in found.rows()
    ]
    with quiet_stdout():
        answer = milp(
            scores.ravel(),
            integrality=np.ones(scores.size),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), *limits],
            options={"time_limit": seconds},
        )
    return None if answer.x is None else answer.x.reshape(scores.shape).argmax(axis=1)


def with_pulp(found: Instance, seconds: float) -> Columns | None:
    """PuLP's bundled CBC on unscaled scores, with default tolerances."""
    pulp = importlib.import_module("pulp")
    scores = found.scores()
    groups, formats = scores.shape
    cells = [(row, column) for row in range(groups) for column in range(formats)]
    take = pulp.LpVariable.dicts("take", cells, cat="Binary")
    problem = pulp.LpProblem("plan", pulp.LpMinimize)
    problem += pulp.lpSum(float(scores[cell]) * take[cell] for cell in cells)
    for row in range(groups):
        problem += pulp.lpSum(take[row, column] for column in range(formats)) == 1
    for amounts, limit in found.rows():
        problem += pulp.lpSum(float(amounts[cell]) * take[cell] for cell in cells) <= limit
    problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds))
    values = [take[cell].value() for cell in cells]
    if any(value is None for value in values):
        return None
    taken = np.array(values, dtype=np.float64).reshape(scores.shape)
    # Out of time it may leave fractions behind, which are no plan.
    return taken.argmax(axis=1) if (taken.max(axis=1) > 0.99).all() else None


def timed(solver: Solver, found: Instance, seconds: float) -> tuple[float, float]:
    """Wall time in seconds, and the predicted loss."""
    start = time.perf_counter()
    columns = solver(found, seconds)
    return time.perf_counter() - start, found.loss_of(columns)


def print_header(title: str, *columns: str) -> None:
    """A heading and the first two lines of a table; all columns but the first are numbers."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")


def ratio(value: float, ours: float) -> str:
    """Their figure over ours, in words where there is none."""
    return f"{value / ours:.6g}" if np.isfinite(value) else "no plan"


def compare_sizes(
    sizes: Sequence[int],
    scales: Sequence[float],
    repeats: int,
    solvers: dict[str, Solver],
    limit: float,
) -> None:
    """One budget, over sizes and scales of the scores."""
    columns = ("Solver", "Groups", "Scale", "Seconds", "Time", "Loss, median", "Loss, worst")
    print_header("One budget", *columns)
    for groups in sizes:
        for scale in scales:
            seconds: dict[str, list[float]] = {name: [] for name in solvers}
            losses: dict[str, list[float]] = {name: [] for name in solvers}
            for seed in range(repeats):
                tables = instance(groups, scale, seed)
                for budget_bits in BUDGETS_BITS:
                    for name, solver in solvers.items():
                        took, loss = timed(solver, within(tables, bits(budget_bits)), limit)
                        seconds[name].append(took)
                        losses[name].append(loss)
            ours = statistics.median(seconds["autoq"])
            for name in solvers:
                worse = np.array(losses[name]) / np.array(losses["autoq"])
                typical = statistics.median(seconds[name])
                print(
                    f"| {name} | {groups} | {scale:g} | {typical:.4f} | {typical / ours:.2f} "
                    f"| {ratio(float(np.median(worse)), 1)} | {ratio(float(worse.max()), 1)} |",
                    flush=True,
                )


def compare_large(groups: int, repeats: int, solvers: dict[str, Solver], limit: float) -> None:
    """One large instance, to a proven gap."""
    tables = instance(
        groups,
        1.0,
        0,
        formats=MANY_FORMATS,
        bits_per_weight=MANY_BITS_PER_WEIGHT,
        typical_scores=MANY_TYPICAL_SCORES,
    )
    found = within(tables, bits(LARGE_BUDGET_BITS))
    times, processor = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        plan = solve(found.sensitivity, found.costs, found.budgets, relative_gap=LARGE_GAP)
        times.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    title = f"{groups} groups x {len(MANY_FORMATS)} formats, time limit {limit:g} s"
    print_header(title, "Solver", "Seconds", "Processor", "Time", "Loss", "Proven gap")
    ours = statistics.median(times)
    own = statistics.median(processor)
    print(f"| autoq | {ours:.3f} | {own:.3f} | 1 | 1 | {plan.gap:.1e} |", flush=True)
    for name, solver in solvers.items():
        if name != "autoq":
            took, loss = timed(solver, found, limit)
            worse = ratio(loss, plan.predicted_loss)
            print(f"| {name} | {took:.1f} | | {took / ours:.0f} | {worse} | |", flush=True)


def compare_frontier(groups: int, repeats: int, solvers: dict[str, Solver], limit: float) -> None:
    """A frontier of as many points as groups; the others solve a sample of its budgets."""
    tables = instance(groups, 1.0, 0)
    times, processor = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        plans = frontier(tables.sensitivity, tables.costs, points=groups // 2)
        times.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    ours = statistics.median(times)
    title = f"Frontier of {groups} groups, {len(plans)} points"
    print_header(
        title, "Solver", "Seconds", "Processor", "Seconds a point", "Time a point", "Loss, median"
    )
    each = ours / len(plans)
    own = statistics.median(processor)
    print(f"| autoq | {ours:.3f} | {own:.3f} | {each:.5f} | 1 | 1 |", flush=True)
    sample = np.linspace(0, len(plans) - 1, FRONTIER_SAMPLE + 2).round().astype(int)[1:-1]
    for name, solver in solvers.items():
        if name != "autoq":
            budgets = [within(tables, bits(plans[index].effective_bits)) for index in sample]
            answers = [timed(solver, found, limit) for found in budgets]
            typical = statistics.mean(took for took, _ in answers)
            worse = [
                loss / plans[index].predicted_loss
                for index, (_, loss) in zip(sample, answers, strict=True)
            ]
            print(
                f"| {name}, {len(sample)} of them | | | {typical:.3f} | {typical / each:.0f} "
                f"| {ratio(statistics.median(worse), 1)} |",
                flush=True,
            )


def compare_several(
    sizes: Sequence[int], repeats: int, solvers: dict[str, Solver], limit: float
) -> None:
    """Bits, active bits and latency at once."""
    columns = ("Solver", "Groups", "Seconds", "Time", "Loss, median", "Loss, worst", "Proven gap")
    print_header(f"Three budgets, time limit {limit:g} s", *columns)
    for groups in sizes:
        answers: dict[str, list[tuple[float, float]]] = {name: [] for name in solvers}
        gaps = []
        for seed in range(repeats):
            found = three_budgets(instance(groups, 1.0, seed))
            start = time.perf_counter()
            plan = solve(found.sensitivity, found.costs, found.budgets, time_limit_seconds=limit)
            answers["autoq"].append((time.perf_counter() - start, plan.predicted_loss))
            gaps.append(plan.gap)
            for name, solver in solvers.items():
                if name != "autoq":
                    answers[name].append(timed(solver, found, limit))
        ours = statistics.median(took for took, _ in answers["autoq"])
        for name, results in answers.items():
            typical = statistics.median(took for took, _ in results)
            pairs = zip(results, answers["autoq"], strict=True)
            worse = np.array([loss / best for (_, loss), (_, best) in pairs])
            gap = f"{max(gaps):.1e}" if name == "autoq" else ""
            print(
                f"| {name} | {groups} | {typical:.3f} | {typical / ours:.2f} "
                f"| {ratio(float(np.median(worse)), 1)} | {ratio(float(worse.max()), 1)} | {gap} |",
                flush=True,
            )


def three_budgets(tables: Instance) -> Instance:
    """Budgets that all limit: each a little below what the optimum of the others takes."""
    budgets = [bits(5.5)]
    for resource, share in ((Resource.ACTIVE_BITS, 0.995), (Resource.LATENCY, 0.995)):
        plan = solve(tables.sensitivity, tables.costs, budgets, relative_gap=1e-3)
        budgets.append(Budget(resource=resource, limit=plan.takes[resource] * share))
    return within(tables, *budgets)


def main() -> None:
    """Compare over everything asked for."""
    parser = argparse.ArgumentParser(description="Our solver beside plain HiGHS and PuLP/CBC.")
    parser.add_argument("--groups", type=int, nargs="*", default=[40, 200, 1000])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1e-6, 1e-12])
    parser.add_argument("--repeats", type=int, default=5, help="instances per size and scale")
    parser.add_argument("--large", type=int, default=100_000, help="groups; 0 leaves it out")
    parser.add_argument("--frontier", type=int, default=1000, help="groups; 0 leaves it out")
    parser.add_argument("--several", type=int, nargs="*", default=[40, 200])
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for each answer")
    arguments = parser.parse_args()
    solvers: dict[str, Solver] = {"autoq": with_autoq, "plain HiGHS": with_plain_highs}
    if importlib.util.find_spec("pulp"):
        solvers["PuLP/CBC"] = with_pulp
    else:
        print("PuLP/CBC is left out: pip install --target pulp_only pulp; PYTHONPATH=pulp_only")
    limit, repeats = arguments.time_limit, arguments.repeats
    with_autoq(three_budgets(instance(8, 1.0, 0)), limit)  # imports are not what is compared
    if arguments.groups:
        compare_sizes(arguments.groups, arguments.scales, repeats, solvers, limit)
    if arguments.large:
        compare_large(arguments.large, repeats, solvers, limit)
    if arguments.frontier:
        compare_frontier(arguments.frontier, repeats, solvers, limit)
    if arguments.several:
        compare_several(arguments.several, repeats, solvers, limit)


if __name__ == "__main__":
    main()
