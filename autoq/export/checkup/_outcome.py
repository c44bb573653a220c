"""What an engine does with something, on one target or on each generation of hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from autoq.formats import HARDWARE, Engine, Hardware, Target

UNQUANTIZED = "unquantised"
SILENT = "SILENTLY UNQUANTISED"
GARBAGE = "COMPUTES GARBAGE"
REFUSES = "refuses"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an engine does, in a word or with the GPUs it holds for; and why."""

    does: str
    reason: str
    runs: bool  # on the target; without one, on some hardware at least


def outcomes(
    engines: Sequence[Engine], target: Target | None, on: Callable[[Target], Outcome]
) -> dict[str, Outcome]:
    """By the target; without one by engine, on all its hardware.

    Args:
        on: what happens on one target.
    """
    if target is not None:
        return {str(target): on(target)}
    return {engine.name: _anywhere(engine, on) for engine in engines}


def _anywhere(engine: Engine, on: Callable[[Target], Outcome]) -> Outcome:
    """On each generation of hardware; generations that are treated alike in one piece."""
    found = [(hardware, on(Target(engine, hardware))) for hardware in _generations()]
    if not any(outcome.runs for _, outcome in found):
        return found[-2][1]  # of the newest GPU; the last is the CPU
    if len({outcome.does for _, outcome in found}) == 1:
        return found[0][1]
    pieces, reasons = [], []
    for does, alike in groupby(found, key=lambda pair: pair[1].does):
        members = list(alike)
        if members[0][1].runs:
            pieces.append(f"{does} on {_span([hardware for hardware, _ in members])}")
            reasons.append(members[0][1].reason)
    return Outcome("; ".join(pieces), "; ".join(dict.fromkeys(reasons)), True)


def _generations() -> list[Hardware]:
    first = {entry.capability: entry for entry in HARDWARE.values()}
    return [first[key] for key in sorted(first, key=lambda key: (key is None, key or 0))]


def _span(hardware: Sequence[Hardware]) -> str:
    names = [entry.generation for entry in hardware]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
