"""What formats, engines and hardware there are, as the service tells it."""

from __future__ import annotations

from functools import cache

from autoq.formats import (
    ENGINES,
    FORMATS,
    HARDWARE,
    NONE,
    Container,
    QuantFormat,
    Target,
    all_supports,
    feasible_formats,
)
from autoq.wire import FormatEntry, TargetEntry


@cache
def format_entries() -> tuple[FormatEntry, ...]:
    """Every number format."""
    containers: dict[str, set[Container]] = {}
    for _, cell in all_supports():
        if cell.verdict.runs:
            containers.setdefault(cell.format, set()).add(cell.container)
    return tuple(
        _format_entry(entry, containers.get(entry.name, set())) for entry in FORMATS.values()
    )


@cache
def target_entries() -> tuple[TargetEntry, ...]:
    """Every engine on every hardware that it runs on; formats without the unquantised one."""
    targets = [Target(engine, place) for engine in ENGINES.values() for place in HARDWARE.values()]
    entries = [_target_entry(target) for target in targets]
    return tuple(entry for entry in entries if entry.formats)


def _format_entry(entry: QuantFormat, containers: set[Container]) -> FormatEntry:
    return FormatEntry(
        name=entry.name,
        weight="none" if entry.weight_element is None else entry.weight_element.value,
        activation=entry.activation.value,
        effective_bits=entry.nominal_bits,
        offered_unasked=entry.portable and entry.name != NONE,
        containers=tuple(container.value for container in Container if container in containers),
        summary=entry.summary,
        peer_effective_bits=entry.peer_bits,
        block_size=entry.weight_block_size,
        calibration=entry.calibration.value,
        loads_in=entry.loads_in,
    )


def _target_entry(target: Target) -> TargetEntry:
    running = {name for container in Container for name in feasible_formats(target, container)}
    return TargetEntry(
        target=str(target),
        engine=target.engine.title,
        hardware=target.hardware.title,
        formats=tuple(name for name in FORMATS if name in running and name != NONE),
    )
