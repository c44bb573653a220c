"""Where a checkpoint is to run: an engine on some hardware, and which formats run there.

The facts are records in `autoq.formats._support`; here is what is asked of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from autoq.errors import InputError
from autoq.formats._builtin import FORMATS
from autoq.formats._container import Container
from autoq.formats._format import NONE, FormatName
from autoq.formats._places import ENGINES, HARDWARE, Engine, Hardware, Support, Verdict
from autoq.formats._support import SUPPORT

_BY_CELL = {
    (record.engine, record.container, record.format, capability): record
    for record in SUPPORT
    for capability in record.capabilities
}


@dataclass(frozen=True, slots=True)
class Target:
    """An engine on some hardware."""

    engine: Engine
    hardware: Hardware

    def __str__(self) -> str:
        return f"{self.engine.name}:{self.hardware.name}"


def parse_target(text: str) -> Target:
    """The target that "ENGINE:HARDWARE" names, for example "vllm:h200".

    Raises:
        InputError: the text is not of that shape.
        UnknownNameError: the engine or the hardware is not known; the message lists near misses.
    """
    engine, colon, hardware = (part.strip().casefold() for part in text.partition(":"))
    if not (engine and colon and hardware):
        raise InputError(
            f"a target must look like ENGINE:HARDWARE, got {text!r}; for example vllm:h200, and "
            "`autoq targets` lists all"
        )
    return Target(ENGINES[engine], HARDWARE[hardware])


def support(target: Target, container: Container, fmt: FormatName) -> Support:
    """What is known of a format on a target; of a format without a record, that nothing is.

    Raises:
        UnknownNameError: nothing has the format's name.
    """
    FORMATS[fmt]
    capability = target.hardware.capability
    record = _BY_CELL.get((target.engine.name, container, fmt, capability))
    return record or Support(
        engine=target.engine.name,
        container=container,
        format=fmt,
        capabilities=(capability,),
        verdict=Verdict.NO,
        reason=f"nothing is known of {fmt} in {target.engine.title}",
        source="no record",
    )


def feasible_formats(target: Target, container: Container) -> tuple[FormatName, ...]:
    """The formats that run on the target from the container, in the order of `FORMATS`.

    "none" is among them where the engine runs at all.
    """
    names = [entry.name for entry in FORMATS.values()]
    return tuple(name for name in names if support(target, container, name).verdict.runs)


def offered_formats(target: Target, container: Container) -> tuple[FormatName, ...]:
    """The quantised formats that the target runs and that a search tries unasked.

    Those that are for whoever names them are among them only where nothing else runs.
    """
    running = [name for name in feasible_formats(target, container) if name != NONE]
    unasked = [name for name in running if not FORMATS[name].when_named]
    return tuple(unasked or running)


def reasons(
    target: Target, container: Container, formats: Sequence[FormatName] | None = None
) -> dict[FormatName, str]:
    """Why formats do not run on the target from the container; those that do are left out.

    Args:
        formats: which to look at; None is all of `FORMATS`.
    Raises:
        UnknownNameError: nothing has a format's name.
    """
    names = [entry.name for entry in FORMATS.values()] if formats is None else formats
    found = {name: support(target, container, name) for name in names}
    return {name: entry.reason for name, entry in found.items() if not entry.verdict.runs}


def containers_for(
    target: Target, formats: Sequence[FormatName] | None = None
) -> tuple[Container, ...]:
    """The containers that the target reads with all of `formats`, the best first.

    The best runs most quantised formats, most of them natively; then `Container`'s order counts.

    Args:
        formats: those that must run; None asks for any quantised one, and counts
            `offered_formats`.
    Raises:
        UnknownNameError: nothing has a format's name.
    """
    fitting = [
        container
        for container in Container
        if (
            offered_formats(target, container)
            if formats is None
            else not reasons(target, container, formats)
        )
    ]
    return tuple(sorted(fitting, key=lambda container: _rank(target, container, formats)))


def all_supports() -> Iterator[tuple[Target, Support]]:
    """Every cell of the matrix of engines, hardware, containers and formats."""
    for engine, container, hardware in product(ENGINES.values(), Container, HARDWARE.values()):
        target = Target(engine, hardware)
        for fmt in FORMATS.values():
            yield target, support(target, container, fmt.name)


def _rank(
    target: Target, container: Container, formats: Sequence[FormatName] | None
) -> tuple[bool, int, int]:
    """Sorts the best first: minus the formats that run, minus those that run natively.

    A container with nothing to offer but formats that are for whoever names them comes last.
    """
    names = offered_formats(target, container) if formats is None else _quantised(formats)
    verdicts = [support(target, container, name).verdict for name in names]
    native = sum(verdict is Verdict.NATIVE for verdict in verdicts)
    is_last_resort = formats is None and all(FORMATS[name].when_named for name in names)
    return is_last_resort, -len(verdicts), -native


def _quantised(formats: Sequence[FormatName]) -> list[FormatName]:
    return [name for name in formats if name != NONE]
