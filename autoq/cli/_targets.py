"""`autoq targets`: which engine runs which format on which hardware."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import Json
from autoq.cli._output import print_json

if TYPE_CHECKING:
    from autoq.formats import Container, Engine, Hardware, Support, Target

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

    chosen = None if target is None else parse_target(target)
    if as_json:
        cells = [cell for cell in all_supports() if chosen in (None, cell[0])]
        print_json({"targets": [_plain(*cell) for cell in cells]})
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
    for source in dict.fromkeys(entry.source for entry in entries):
        console.print(f"source: {source}")
    console.print(_search_line(target))


def _detail(entry: Support) -> str:
    if entry.out_features_multiple == 1:
        return entry.reason
    return f"{entry.reason}; out_features must be divisible by {entry.out_features_multiple}"


def _search_line(target: Target) -> str:
    from autoq.formats import containers_for, feasible_formats

    containers = containers_for(target)
    if not containers:
        return "no quantised format runs there"
    names = ", ".join(feasible_formats(target, containers[0]))
    return f"`autoq search --target {target}` aims at {containers[0]} with {names}"


def _print_matrix() -> None:
    from autoq.cli._tables import make_console, plain_table
    from autoq.formats import ENGINES, FORMATS, Container

    notes: dict[str, int] = {}
    console = make_console()
    for engine in ENGINES.values():
        rows = [row for container in Container for row in _rows(engine, container, notes)]
        console.print(f"{engine.name}: {engine.title}")
        console.print(plain_table("container", "hardware", *FORMATS, rows=rows))
    for reason, number in notes.items():
        console.print(f"({number}) {reason}")
    console.print()
    for line in _hardware_lines():
        console.print(line)
    console.print(_LEGEND)


def _rows(engine: Engine, container: Container, notes: dict[str, int]) -> list[tuple[str, ...]]:
    """A row for each run of hardware generations that are treated alike."""
    from autoq.formats import FORMATS, Target, support

    entries = {
        hardware.generation: [
            support(Target(engine, hardware), container, entry.name) for entry in FORMATS.values()
        ]
        for hardware in _generations()
    }
    rows = []
    for _, same in groupby(entries, key=lambda generation: _said(entries[generation])):
        alike = list(same)
        cells = [_cell(entry, notes) for entry in entries[alike[0]]]
        rows.append((str(container), _span(alike), *cells))
    return rows


def _generations() -> list[Hardware]:
    """One piece of hardware of each compute capability, rising; the CPU last."""
    from autoq.formats import HARDWARE

    first = {entry.capability: entry for entry in HARDWARE.values()}
    return [first[key] for key in sorted(first, key=lambda key: (key is None, key))]


def _said(entries: Sequence[Support]) -> list[tuple[str, str]]:
    return [(entry.verdict, entry.reason) for entry in entries]


def _cell(entry: Support, notes: dict[str, int]) -> str:
    if entry.verdict in ("native", "emulated"):
        return str(entry.verdict)
    return f"{entry.verdict} ({notes.setdefault(entry.reason, len(notes) + 1)})"


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
