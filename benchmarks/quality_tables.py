"""Rows and markdown tables of `quality.py`: KL divergences of both tools, paired by sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BOOTSTRAP_DRAWS = 4000
CONFIDENCE = 0.95

ALLOCATION = {
    "rescaled, equal bits": ("rescaled", False),
    "as shipped, equal bits": ("as_shipped", False),
    "as shipped, equal budget": ("as_shipped", True),
    "as shipped, batches of 32, equal budget": ("large_batches", True),
    "as shipped, its example's batches, equal budget": ("largest_batches", True),
}
"""Comparison -> the peer's solver, and whether autoq gets the budget instead of the peer's bits."""

PRODUCT = ("rescaled, equal bits", "as shipped, equal bits", "as shipped, equal budget")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Both tools at one budget of one model and set of formats."""

    table: str
    model: str
    formats: str
    comparison: str
    budget_bits: float
    peer_variant: str
    peer_bits: float
    autoq_bits: float
    peer_kl: float  # nats per token
    autoq_kl: float
    ratio: float  # autoq's over the peer's
    ratio_low: float
    ratio_high: float

    @property
    def verdict(self) -> str:
        """Whether the interval of the ratio, which is paired by sequence, leaves out 1."""
        if self.ratio_low > 1:
            return "worse"
        return "better" if self.ratio_high < 1 else "tie"


ALLOCATION_UNDER_OWN = "allocation under autoq's default calibration"


def allocation_rows(
    model: str, formats: str, own: dict[str, Any], *, table: str = "allocation"
) -> list[Row]:
    """Both tools' assignments under autoq's quantiser.

    Args:
        own: what `quality_autoq.py` wrote with `--peer-assignments`.
    """
    return [
        _row(table, model, formats, comparison, plan, own, plan["kl_per_sequence"])
        for comparison, (solver, _) in ALLOCATION.items()
        for plan in own["peer_plans"]
        if plan["solver"] == solver
    ]


REFINED = {
    "rescaled, equal bits, before refinement": "start",
    "rescaled, equal bits, refined": "",
    "rescaled, equal bits, refined, best finalist whether sure or not": "best",
}
"""Comparison -> which of the plans that a refinement left; the empty one is what the product keeps."""


def refined_rows(model: str, formats: str, own: dict[str, Any]) -> list[Row]:
    """The peer's rescaled assignments and refined ones of autoq under autoq's quantiser.

    Args:
        own: what `quality_autoq.py` wrote with `--peer-assignments` and `--refine`.
    """
    rows = []
    for comparison, which in REFINED.items():
        chosen = {limit: plan[which] if which else plan for limit, plan in own["own"].items()}
        rows += [
            _row(
                "allocation",
                model,
                formats,
                comparison,
                plan,
                {**own, "own": chosen},
                plan["kl_per_sequence"],
            )
            for plan in own["peer_plans"]
        ]
    return rows


def product_rows(
    model: str, formats: str, own: dict[str, Any], peers: dict[str, dict[str, Any]]
) -> list[Row]:
    """Each tool's own models. Of the peer's variants the one with less loss at a budget counts.

    Args:
        own: what `quality_autoq.py` wrote.
        peers: variant -> what `quality_modelopt.py` wrote.
    """
    measured = {
        (variant, plan["solver"], plan["budget_bits"]): plan["kl_per_sequence"]
        for variant, peer in peers.items()
        for plan in peer["plans"]
    }
    rows: list[Row] = []
    for comparison in PRODUCT:
        solver, _ = ALLOCATION[comparison]
        best: dict[float, Row] = {}
        for plan in own["peer_plans"]:
            if plan["solver"] != solver:
                continue
            divergences = measured[plan["source"], solver, plan["budget_bits"]]
            row = _row("product", model, formats, comparison, plan, own, divergences)
            if row.budget_bits not in best or row.peer_kl < best[row.budget_bits].peer_kl:
                best[row.budget_bits] = row
        rows += best.values()
    return rows


def _row(
    table: str,
    model: str,
    formats: str,
    comparison: str,
    plan: dict[str, Any],
    own: dict[str, Any],
    peer_divergences: Sequence[float],
) -> Row:
    limit = plan["effective_bits"]
    if ALLOCATION.get(comparison, ("", False))[1]:
        limit = max(limit, plan["budget_bits"])
    ours = own["own"][repr(limit)]
    theirs_kl, ours_kl = np.array(peer_divergences), np.array(ours["kl_per_sequence"])
    low, high = paired_ratio_interval(ours_kl, theirs_kl)
    return Row(
        table=table,
        model=model,
        formats=formats,
        comparison=comparison,
        budget_bits=plan["budget_bits"],
        peer_variant=plan["source"],
        peer_bits=plan["effective_bits"],
        autoq_bits=ours["effective_bits"],
        peer_kl=float(theirs_kl.mean()),
        autoq_kl=float(ours_kl.mean()),
        ratio=float(ours_kl.mean() / theirs_kl.mean()),
        ratio_low=low,
        ratio_high=high,
    )


def paired_ratio_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of mean(ours) / mean(theirs) over sequences drawn in pairs."""
    draws = np.random.default_rng(0).integers(0, len(ours), (BOOTSTRAP_DRAWS, len(ours)))
    ratios = ours[draws].mean(axis=1) / theirs[draws].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of positive numbers."""
    return float(np.exp(np.mean(np.log(list(ratios)))))


def markdown(rows: Sequence[Row], table: str) -> str:
    """The rows of one table, one block for every comparison, with its geometric mean."""
    lines = []
    for comparison in dict.fromkeys(row.comparison for row in rows if row.table == table):
        chosen = [row for row in rows if (row.table, row.comparison) == (table, comparison)]
        lines += [f"**{comparison}**", "", *_block(chosen), "", _summary(chosen), ""]
    return "\n".join(lines)


def _block(rows: Sequence[Row]) -> list[str]:
    columns = ["Model", "Formats", "Budget", "Bits, ModelOpt", "Bits, autoq"]
    columns += ["KL, ModelOpt", "KL, autoq", "autoq / ModelOpt"]
    lines = [
        f"| {' | '.join(columns)} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.model} | {row.formats} | {row.budget_bits:g} | {row.peer_bits:.3f} "
        f"| {row.autoq_bits:.3f} | {row.peer_kl:.3e} | {row.autoq_kl:.3e} "
        f"| {row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f}) |"
        for row in rows
    ]
    return lines


def _summary(rows: Sequence[Row]) -> str:
    counts = {name: sum(r.verdict == name for r in rows) for name in ("better", "tie", "worse")}
    by_model = ", ".join(
        f"{model} {geometric_mean(r.ratio for r in rows if r.model == model):.3f}"
        for model in dict.fromkeys(row.model for row in rows)
    )
    return (
        f"Geometric mean {geometric_mean(r.ratio for r in rows):.3f} over {len(rows)} rows "
        f"({by_model}); better in {counts['better']}, level in {counts['tie']}, "
        f"worse in {counts['worse']}."
    )


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON."""
    return [{**asdict(row), "verdict": row.verdict} for row in rows]
