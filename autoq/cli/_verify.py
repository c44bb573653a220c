"""`autoq verify`: what is wrong with a checkpoint, and what engines make of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoq.cli._failures import NOT_RUN, UNVERIFIED, reports_failures
from autoq.cli._options import Json
from autoq.cli._output import print_json

if TYPE_CHECKING:
    from autoq.export.checkup import CacheReport, CheckpointReport, LayerReport, Outcome

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@reports_failures
def verify(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A folder; autoq's or another tool's.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE:HARDWARE",
            show_default=False,
            help="Where it is to run, as vllm:h200; every engine if left out.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a quantised checkpoint without a GPU, and say what engines do with every layer.

    Of a key/value cache that the checkpoint states it says so, too.

    Ends with 0 if nothing is wrong and the target (without one: any engine) runs every layer, and
    keeps such a cache; with 3 if nothing is wrong and it does not; with 4 if something is wrong with the checkpoint,
    wherever it is to run; with 2 if the folder cannot be read.
    """
    from autoq.export.checkup import check_checkpoint
    from autoq.formats import parse_target

    chosen = None if target is None else parse_target(target)
    report = check_checkpoint(checkpoint, chosen)
    end_with(report, as_json=as_json)


def end_with(report: CheckpointReport, *, as_json: bool) -> None:
    """Print what was found.

    Raises:
        typer.Exit: something is wrong, or nothing runs it.
    """
    if as_json:
        print_json(report.as_plain())
    else:
        _print(report)
    if report.faults:
        raise typer.Exit(UNVERIFIED)
    if not report.runners:
        raise typer.Exit(NOT_RUN)


def report_of(plain: Mapping[str, Any]) -> CheckpointReport:
    """What `autoq verify --json` printed, or a server's job gave, as it was found."""
    from autoq.export.checkup import CacheReport, CheckpointReport, LayerReport
    from autoq.formats import Container

    cache = plain["kv_cache"]
    return CheckpointReport(
        path=Path(plain["checkpoint"]),
        container=None if plain["container"] is None else Container(plain["container"]),
        faults=tuple(plain["faults"]),
        layers=tuple(
            LayerReport(layer["module"], layer["stored"], _outcomes(layer["outcomes"]))
            for layer in plain["layers"]
        ),
        cache=None if cache is None else CacheReport(cache["stored"], _outcomes(cache["outcomes"])),
    )


def _outcomes(plain: Mapping[str, Any]) -> dict[str, Outcome]:
    from autoq.export.checkup import Outcome

    return {
        name: Outcome(does=found["does"], reason=found["reason"], runs=found["runs"])
        for name, found in plain.items()
    }


def _print(report: CheckpointReport) -> None:
    from autoq.cli._tables import make_console

    console = make_console()
    lines = [f"{report.path}: {report.container or 'no manifest'}"]
    lines += [f"WRONG: {fault}" for fault in report.faults]
    for alike in _alike(report.layers):
        lines += ["", *_section(alike)]
    if report.cache is not None:
        lines += ["", *_cache_section(report.cache)]
    for line in [*lines, "", _conclusion(report)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _section(alike: list[LayerReport]) -> list[str]:
    """Layers of which the same is said, and what that is."""
    first = alike[0]
    count = "1 layer" if len(alike) == 1 else f"{len(alike)} layers"
    lines = [
        f"{first.stored}, {count}:",
        *(f"  {name}" for name in _names([x.name for x in alike])),
    ]
    return [*lines, *_outcome_lines(first.outcomes)]


def _cache_section(cache: CacheReport) -> list[str]:
    return [f"key/value cache, stated as {cache.stored}:", *_outcome_lines(cache.outcomes)]


def _outcome_lines(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    for engine, outcome in outcomes.items():
        why = f": {outcome.reason}" if outcome.reason else ""
        yield f"  -> {engine}: {outcome.does}{why}"


def _alike(layers: tuple[LayerReport, ...]) -> list[list[LayerReport]]:
    """Layers that are stored alike, and of which the same is said."""
    found: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        said = tuple((outcome.does, outcome.reason) for outcome in layer.outcomes.values())
        found.setdefault((layer.stored, said), []).append(layer)
    return list(found.values())


def _names(modules: list[str]) -> list[str]:
    """Layers' names, those in one line that differ in the layer's number."""
    numbers: dict[tuple[str, str], set[int]] = {}
    plain: dict[str, None] = {}
    for module in modules:
        match = _NUMBER.search(module)
        if match is None:
            plain[module] = None
            continue
        after = _NUMBER.sub("*", module[match.end() :])  # experts
        numbers.setdefault((module[: match.start()], after), set()).add(int(match[0]))
    return [
        *(f"{before}{_spans(sorted(found))}{after}" for (before, after), found in numbers.items()),
        *plain,
    ]


def _spans(numbers: list[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][-1] + 1:
            pieces[-1].append(number)
        else:
            pieces.append([number])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in pieces)


def _conclusion(report: CheckpointReport) -> str:
    if report.faults:
        count = len(report.faults)
        return "1 thing is wrong" if count == 1 else f"{count} things are wrong"
    cache = "" if report.cache is None else " and keeps the key/value cache as stated"
    if not report.runners:
        return f"nothing is wrong, but of the engines looked at none runs every layer{cache}"
    kept = ", which keep the key/value cache as stated" if report.cache is not None else ""
    return f"nothing is wrong; every layer runs in {', '.join(report.runners)}{kept}"
