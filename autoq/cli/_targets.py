"""`autoq targets`: which engine runs which format on which hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import Json
from autoq.cli._output import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from autoq.formats import Container, Engine, FormatName, Hardware, Support, Target, Verdict

    Lookup = Callable[[Target, Container, FormatName], Support]

_LEGEND = (
    "native: as searched; weight-only: inputs stay 16-bit and weights are widened, so memory is "
    "saved and arithmetic is not; emulated: the right numbers, and no faster.\n"
    "`autoq targets vllm:h200` says more about one target; `autoq search --target vllm:h200` takes "
    "what runs there."
)


@reports_failures
def targets(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="ENGINE:HARDWARE",
            show_default=False,
            help="One target in detail; all if left out.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which engine runs which format on which hardware, and why not."""
    from autoq.formats import all_supports, parse_target
    from autoq.formats.kv_cache_support import all_kv_cache_supports

    chosen = None if target is None else parse_target(target)
    if as_json:
        matrices = {"targets": all_supports(), "kv_caches": all_kv_cache_supports()}
        cells = {
            name: [_plain(*cell) for cell in matrix if chosen in (None, cell[0])]
            for name, matrix in matrices.items()
        }
        print_json(cells)
    elif chosen is not None:
        _print_target(chosen)
    else:
        _print_matrix()


def _plain(target: Target, entry: Support) -> dict[str, Any]:
    return {
        "target": str(target),
        "engine": target.engine.name,
        "engine_version": target.engine.title,
        "hardware": target.hardware.name,
        "generation": target.hardware.generation,
        "container": entry.container,
        "format": entry.format,
        "runs": entry.verdict.runs,
        "verdict": entry.verdict,
        "reason": entry.reason,
        "out_features_multiple": entry.out_features_multiple,
        "runs_experts": entry.runs_experts,
        "source": entry.source,
    }


def _print_target(target: Target) -> None:
    from autoq.cli._tables import make_console, plain_table
    from autoq.formats import FORMATS, Container, support

    entries = [
        support(target, container, entry.name)
        for container in Container
        for entry in FORMATS.values()
    ]
    rows = [(entry.container, entry.format, entry.verdict, _detail(entry)) for entry in entries]
    console = make_console()
    console.print(f"{target}: {target.engine.title} on {target.hardware.title}")
    console.print(plain_table("container", "format", "runs", "why", rows=rows))
    caches = _caches_on(target)
    rows = [(entry.container, entry.format, entry.verdict, entry.reason) for entry in caches]
    console.print(plain_table("container", "KV cache", "runs", "why", rows=rows))
    for source in dict.fromkeys(entry.source for entry in entries):
        console.print(f"source: {source}")
    console.print(_search_line(target))


def _caches_on(target: Target) -> list[Support]:
    from autoq.formats import NONE, Container
    from autoq.formats.kv_cache import KV_CACHE_FORMATS
    from autoq.formats.kv_cache_support import kv_cache_support

    return [
        kv_cache_support(target, container, entry.name)
        for container in Container
        for entry in KV_CACHE_FORMATS.values()
        if entry.name != NONE
    ]


def _detail(entry: Support) -> str:
    parts = [entry.reason]
    if entry.out_features_multiple != 1:
        parts.append(f"out_features must be divisible by {entry.out_features_multiple}")
    if not entry.runs_experts:
        parts.append("no experts of a mixture")
    return "; ".join(parts)


def _search_line(target: Target) -> str:
    from autoq.formats import NONE, containers_for, feasible_formats, offered_formats

    containers = containers_for(target)
    if not containers:
        return "no quantised format runs there"
    offered = (*offered_formats(target, containers[0]), NONE)
    line = f"`autoq search --target {target}` aims at {containers[0]} with {', '.join(offered)}"
    named = [name for name in feasible_formats(target, containers[0]) if name not in offered]
    return f"{line}; --formats takes {', '.join(named)}, too" if named else line


def _print_matrix() -> None:
    from autoq.cli._tables import make_console
    from autoq.formats import ENGINES, FORMATS, NONE, support
    from autoq.formats.kv_cache import KV_CACHE_FORMATS
    from autoq.formats.kv_cache_support import kv_cache_support

    notes: dict[str, int] = {}
    console = make_console()
    caches = [name for name in KV_CACHE_FORMATS if name != NONE]
    for engine in ENGINES.values():
        console.print(f"{engine.name}: {engine.title}")
        console.print(_engine_table("format", engine, FORMATS, support, notes))
        console.print(_engine_table("KV cache", engine, caches, kv_cache_support, notes))
    for reason, number in notes.items():
        console.print(f"({number}) {reason}")
    console.print()
    for line in _hardware_lines():
        console.print(line)
    console.print(_LEGEND)


def _engine_table(
    what: str, engine: Engine, formats: Iterable[str], support: Lookup, notes: dict[str, int]
) -> Table:
    from autoq.cli._tables import plain_table
    from autoq.formats import Container, FormatName, Verdict

    cells = {
        (container, fmt): _spans(engine, container, fmt, notes, support)
        for fmt in map(FormatName, formats)
        for container in Container
    }
    verdicts = [verdict for verdict in Verdict if any(verdict in row for row in cells.values())]
    rows = [
        (fmt, container, *(row.get(verdict, "") for verdict in verdicts))
        for (container, fmt), row in cells.items()
    ]
    return plain_table(what, "container", *verdicts, rows=rows)


def _spans(
    engine: Engine,
    container: Container,
    fmt: FormatName,
    notes: dict[str, int],
    support: Lookup,
) -> dict[Verdict, str]:
    """How a format runs -> the generations of hardware where it does so, with numbered reasons."""
    from autoq.formats import Target

    entries = {
        hardware.generation: support(Target(engine, hardware), container, fmt)
        for hardware in _generations()
    }
    found: dict[Verdict, list[str]] = {}
    for _, same in groupby(entries, key=lambda generation: _said(entries[generation])):
        alike = list(same)
        entry = entries[alike[0]]
        found.setdefault(entry.verdict, []).append(f"{_span(alike)}{_note(entry, notes)}")
    return {verdict: ", ".join(spans) for verdict, spans in found.items()}


def _generations() -> list[Hardware]:
    """One piece of hardware of each compute capability, rising; the CPU last."""
    from autoq.formats import HARDWARE

    first = {entry.capability: entry for entry in HARDWARE.values()}
    return [first[key] for key in sorted(first, key=lambda key: (key is None, key))]


def _said(entry: Support) -> tuple[str, str]:
    return entry.verdict, entry.reason


def _note(entry: Support, notes: dict[str, int]) -> str:
    if entry.verdict in ("native", "emulated"):
        return ""
    return f" ({notes.setdefault(entry.reason, len(notes) + 1)})"


def _span(generations: Sequence[str]) -> str:
    gpus = [name for name in generations if name != "cpu"]
    texts = [gpus[0] if len(gpus) == 1 else f"{gpus[0]} to {gpus[-1]}"] if gpus else []
    return ", ".join([*texts, *(name for name in generations if name == "cpu")])


def _hardware_lines() -> list[str]:
    from autoq.formats import HARDWARE

    names: dict[str, list[str]] = {entry.generation: [] for entry in _generations()}
    for entry in HARDWARE.values():
        names[entry.generation].append(entry.name)
    return [f"{generation}: {', '.join(found)}" for generation, found in names.items()]
