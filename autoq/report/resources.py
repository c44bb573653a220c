"""What a plan takes and may take, in words: the same on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoq.report.numbers import MISSING, bits_text, loss_text, percent_text

if TYPE_CHECKING:
    from autoq.report._data import LatencyRow, ReportData

_SHOWN_BITS_DIFFERENCE = 0.5e-4
"""Bits that differ by less read the same in four decimals."""


def budgets_text(data: ReportData) -> str:
    """All limits that the plan was solved for; for a plan of an old version its bits."""
    if not data.budgets:
        return f"{bits_text(data.budget_bits)} effective bits per weight"
    return ", ".join(_limit_text(name, limit) for name, limit in data.budgets.items())


def takes_lines(data: ReportData) -> Sequence[tuple[str, str]]:
    """(name, value) of what the plan takes beside bits of the searched layers."""
    takes = data.takes
    lines = []
    if "stored_bytes" in takes:
        text = f"{gigabytes_text(takes['stored_bytes'])} for all weights of the checkpoint"
        lines.append(("on disk", text))
    active, effective = takes.get("active_bits"), data.effective_bits
    if (
        active is not None
        and effective is not None
        and abs(active - effective) >= _SHOWN_BITS_DIFFERENCE
    ):
        lines.append(("active bits", f"{bits_text(active)} for weights that a token touches"))
    if "latency_seconds" in takes:
        lines.append(("predicted time", _time_text(takes["latency_seconds"], data.latency)))
    return lines


def least_lines(data: ReportData) -> Sequence[tuple[str, str]]:
    """(name, value) of the proof that the plan is the smallest; of one for a limit on its loss."""
    least = data.least
    if least is None:
        return ()
    bound = MISSING if least.bound is None else _limit_text(least.resource, least.bound)
    none = f"none predicted to lose at most {loss_text(least.loss_limit)} takes less than {bound}"
    return (("gap in size", f"{percent_text(least.gap)} ({none})"),)


def gigabytes_text(value: float) -> str:
    """A size in 10^9 bytes, four significant digits: 23.41 GB."""
    return f"{value / 1e9:.4g} GB"


def milliseconds_text(seconds: float) -> str:
    """A time, four significant digits: 1.234 ms."""
    return f"{seconds * 1e3:.4g} ms"


def _limit_text(name: str, limit: float) -> str:
    texts: Mapping[str, str] = {
        "effective_bits": f"{bits_text(limit)} effective bits per weight",
        "stored_bytes": f"{gigabytes_text(limit)} on disk",
        "active_bits": f"{bits_text(limit)} active bits per weight",
        "latency_seconds": f"{milliseconds_text(limit)} of predicted time",
        "kl_divergence": f"KL divergence {loss_text(limit)}",
    }
    return texts.get(name, f"{limit:g} {name.replace('_', ' ')}")


def _time_text(seconds: float, latency: LatencyRow | None) -> str:
    time = f"{milliseconds_text(seconds)} for the searched layers"
    if latency is None:
        return time
    count = "1 token" if latency.tokens == 1 else f"{latency.tokens} tokens"
    return f"{time} and {count}, on {latency.hardware}"
