"""The tables of `refine.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
SEED = 0


def bootstrap(start: NDArray[np.float64], refined: NDArray[np.float64]) -> dict[str, float]:
    """Improvement, 1 - refined / start, with the 95 % interval over sequences, pairs together."""
    generator = np.random.default_rng(SEED)
    picks = generator.integers(0, len(start), (DRAWS, len(start)))
    draws = 1.0 - refined[picks].mean(axis=1) / start[picks].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    value = 1.0 - float(refined.mean()) / float(start.mean())
    return {"value": value, "low": float(low), "high": float(high)}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Strategies by cases, then what became of wrong scores."""
    cases = sorted({(row["model"], row["bits"]) for row in rows})
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    found = {(row["model"], row["bits"], row["strategy"]): row for row in rows}
    header = ["strategy", *(f"{model} {bits:g}" for model, bits in cases), "median"]
    lines = [_line(header), _line(["---"] * len(header))]
    for strategy in strategies:
        picked = [found.get((*case, strategy)) for case in cases]
        measured = [row for row in picked if row is not None]
        lines.append(_line([strategy, *map(_improvement, picked), _median(measured)]))
    lines += ["", *_details(rows)]
    return "\n".join(lines)


def _improvement(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    value = row["improvement"]
    if not row["accepted"]:
        return "start kept"
    return f"{value['value']:.1%} ({value['low']:.1%} to {value['high']:.1%})"


def _median(rows: Sequence[dict[str, Any]]) -> str:
    """Median over the cases, with the interval from resampling cases."""
    values = np.array([row["improvement"]["value"] for row in rows])
    generator = np.random.default_rng(SEED)
    picks = generator.integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return f"{np.median(values):.1%} ({low:.1%} to {high:.1%})"


def _details(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = ["model", "bits", "strategy", "KL start", "KL best", "KL kept", "of possible gain"]
    header += ["trials (stopped early)", "best found by"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        share = row["share_of_possible"]
        cells = [row["model"], f"{row['bits']:g}", row["strategy"]]
        cells += [f"{row[name]:.3e}" for name in ("start_kl", "best_kl", "kept_kl")]
        cells.append("-" if share is None else f"{share:.0%}")
        cells.append(f"{row['trials']} ({row['stopped_early']})")
        cells.append(f"{row['found_by']} in {row['found_in_trial']}")
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
