"""Rows and markdown tables of `estimators.py`: what each estimator's scores are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_DRAWS = 4000
CONFIDENCE = 0.95
JUDGED = ("rank_of_cells", "rank_of_plans", "slope", "measured_over_predicted", "cpu_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One pass of one estimator over one model."""

    rank_of_cells: float  # Spearman, scores with the measured divergence of a group alone
    rank_of_plans: float | None  # Spearman, predicted with measured loss of random plans
    slope: float | None  # of log measured on log predicted loss of random plans; 1 is right
    measured_over_predicted: float | None  # geometric mean; None where scores are no nats
    divergences: NDArray[np.float64]  # nats per token, [budgets, held-out sequences]
    cpu_seconds: float | None  # of the scoring pass


def judged(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, Any]]:
    """Case -> plain data: means over its passes, and its losses beside the first case's.

    Args:
        rows: case -> one row for every seed of labels; rows of the same sequences and budgets.
    """
    first = next(iter(rows.values()))
    return {case: _judged(found, first) for case, found in rows.items()}


def _judged(rows: Sequence[Row], first: Sequence[Row]) -> dict[str, Any]:
    means = {name: _mean([getattr(row, name) for row in rows]) for name in JUDGED}
    divergences = np.array([row.divergences for row in rows])  # [seeds, budgets, sequences]
    low, high = paired_ratio_interval(rows, first)
    return {
        **means,
        "divergence": divergences.mean(axis=(0, 2)).tolist(),
        "ratio": ratio(rows, first),
        "ratio_low": low,
        "ratio_high": high,
        "ratio_of_seeds": [ratio([row], first) for row in rows],
    }


def ratio(rows: Sequence[Row], first: Sequence[Row]) -> float:
    """Geometric mean, over seeds and budgets, of losses as a ratio to those of the first case."""
    ours, theirs = (
        np.mean([np.log(row.divergences.mean(axis=1)) for row in side]) for side in (rows, first)
    )
    return float(np.exp(ours - theirs))


def paired_ratio_interval(rows: Sequence[Row], first: Sequence[Row]) -> tuple[float, float]:
    """95 % bootstrap interval of `ratio` over held-out sequences, the same for both cases."""
    sequences = rows[0].divergences.shape[1]
    chosen = np.random.default_rng(0).integers(0, sequences, (BOOTSTRAP_DRAWS, sequences))
    ours, theirs = (
        np.mean([np.log(plan[chosen].mean(axis=1)) for row in side for plan in row.divergences], 0)
        for side in (rows, first)
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.exp(np.quantile(ours - theirs, [tail, 1 - tail]))
    return float(low), float(high)


def markdown(found: Mapping[str, Any]) -> str:
    """The table of one model."""
    columns = [found["model"], "rank, cells", "rank, plans", "slope", "measured / predicted"]
    columns += [f"KL at {budget:g} bits" for budget in found["settings"]["budgets"]]
    columns += ["KL / first", "from seed to seed", "CPU s", "CPU / first"]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    first = next(iter(found["cases"].values()))
    lines += [_line(case, values, first) for case, values in found["cases"].items()]
    return "\n".join(lines) + "\n"


def _line(case: str, values: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    seeds = values["ratio_of_seeds"]
    cells = [
        case,
        *(_number(values[name]) for name in JUDGED[:-1]),
        *(f"{value:.3e}" for value in values["divergence"]),
        f"{values['ratio']:.3f} ({values['ratio_low']:.3f} to {values['ratio_high']:.3f})",
        f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "",
        _number(values["cpu_seconds"], digits=1),
        _number(_cost(values, first), digits=2),
    ]
    return f"| {' | '.join(cells)} |"


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """All models together: geometric means of the ratios to the first estimator."""
    names = [model["model"] for model in found]
    lines = [
        f"| geometric means | {' | '.join(names)} | all | CPU / first |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for case in found[0]["cases"]:
        ratios = [model["cases"][case]["ratio"] for model in found]
        costs = [
            _cost(model["cases"][case], next(iter(model["cases"].values()))) for model in found
        ]
        cells = [_number(value) for value in (*ratios, _geometric_mean(ratios))]
        cost = None if None in costs else _geometric_mean([cost for cost in costs if cost])
        lines.append(f"| {case} | {' | '.join(cells)} | {_number(cost, digits=2)} |")
    return "\n".join(lines) + "\n"


def _cost(values: Mapping[str, Any], first: Mapping[str, Any]) -> float | None:
    seconds = values["cpu_seconds"]
    return None if seconds is None else float(seconds / first["cpu_seconds"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
