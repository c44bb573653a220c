"""What `kernels check` prints: an operation, under it its variants, under those their kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from autoq.kernels.compile_check import CheckedLaunch

_COLUMNS = ("target", "kernel", "units", "", "registers", "spill bytes", "shared bytes")
_TEXT_COLUMNS = 4  # the others hold numbers

_Row: TypeAlias = Sequence[str]


def check_lines(results: Sequence[CheckedLaunch]) -> Iterator[str]:
    """The lines of all operations, each with columns of its own width."""
    operations = dict.fromkeys(result.operation for result in results)
    for operation in operations:
        launches = [result for result in results if result.operation == operation]
        yield operation
        yield from _operation_lines(launches)
        yield ""


def _operation_lines(launches: Sequence[CheckedLaunch]) -> Iterator[str]:
    variants: dict[str, list[_Row]] = {}
    for launch in launches:
        variants.setdefault(launch.variant, []).extend(_rows(launch))
    every_row = [_COLUMNS, *(row for rows in variants.values() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*every_row, strict=True)]
    yield f"    {_aligned(_COLUMNS, widths)}"
    for variant, rows in variants.items():
        yield f"  {variant}"
        for row in rows:
            yield f"    {_aligned(row, widths)}"


def _rows(launch: CheckedLaunch) -> list[_Row]:
    outcome = "failed" if launch.failures else "ok"
    if not launch.kernels:
        return [(launch.target, "-", "-", outcome, "-", "-", "-")]
    return [
        (
            launch.target,
            kernel.name,
            ", ".join(kernel.instructions) or "-",
            outcome,
            str(kernel.registers),
            str(kernel.spill_bytes),
            str(kernel.shared_memory_bytes),
        )
        for kernel in launch.kernels
    ]


def _aligned(row: _Row, widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if place < _TEXT_COLUMNS else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
