"""What a search will need, in lines: all of it for `--dry-run`, one before every search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autoq.cli._failures import one_line
from autoq.cli._output import print_json, results_kept_clean
from autoq.errors import AutoqError

if TYPE_CHECKING:
    from autoq.api.preflight import Preflight

DOES_NOT_FIT = 5
"""Exit code of `--dry-run` where the search would not fit."""


def print_estimate(options: dict[str, Any], *, as_json: bool) -> None:
    """Print the estimate and end: 0 if it fits, `DOES_NOT_FIT` if it does not.

    Args:
        options: arguments of `autoq.api.preflight.preflight`.
    """
    with results_kept_clean():
        from autoq.api.preflight import preflight

        found = preflight(**options)
    if as_json:
        print_json(found.to_json())
    else:
        for line in (*_stages(found), *_workers(found), *_totals(found), *_misfits(found)):
            typer.echo(line)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def say_first(options: dict[str, Any]) -> None:
    """A line on standard error before a search of a folder, and what will not fit.

    An estimate that cannot be made, say of somebody's own model code, stops no search.

    Raises:
        InputError, ModelError: as the search would, before it begins.
    """
    if not Path(options["model"]).is_dir():
        return  # the search says so
    from autoq.api.preflight import preflight

    try:
        found = preflight(**options, reads_data=False, cluster_may_grow=True)
    except AutoqError:
        raise
    except Exception as error:  # noqa: BLE001  (see above)
        typer.echo(f"not estimated: {type(error).__name__}: {one_line(str(error))}", err=True)
        return
    for line in (_summary(found), *_notes(found), *_misfits(found)):
        typer.echo(line, err=True)


def _summary(found: Preflight) -> str:
    from autoq.report.numbers import bytes_text

    return (
        f"estimated: {_duration(found)}, {bytes_text(found.machine_peak_bytes)} of memory at most "
        f"({bytes_text(found.used_memory_bytes + found.free_memory_bytes)} to be had), "
        f"{bytes_text(found.disk_bytes)} of disk"
    )


def _duration(found: Preflight) -> str:
    from autoq.report.numbers import seconds_text

    return seconds_text(found.total_seconds)


def _stages(found: Preflight) -> list[str]:
    from autoq.report.numbers import bytes_text, seconds_text

    has_others = found.machine_bytes != found.memory_bytes
    head = f"{'stage':<14}{'time':>12}{'memory':>14}"
    rows = [f"{head}{'all processes':>16}" if has_others else head]
    for name, peak in found.memory_bytes.items():
        took = seconds_text(found.seconds[name])
        row = f"{name:<14}{took:>12}{bytes_text(peak):>14}"
        rows.append(f"{row}{bytes_text(found.machine_bytes[name]):>16}" if has_others else row)
    return rows


def _workers(found: Preflight) -> list[str]:
    from autoq.report.numbers import bytes_text

    return [
        f"{team.stage}: {team.count} other process{'es' if team.count > 1 else ''} on {team.place}, "
        f"{bytes_text(team.memory_bytes)} of memory each"
        for team in found.workers
    ]


def _totals(found: Preflight) -> list[str]:
    from autoq.report.numbers import bytes_text

    room = found.used_memory_bytes + found.free_memory_bytes
    disk = [f"{bytes_text(found.store_bytes)} for the store"]
    if found.checkpoint_bytes:
        disk.append(f"{bytes_text(found.checkpoint_bytes)} at most for the checkpoint")
    if found.temporary_bytes:
        disk.append(f"{bytes_text(found.temporary_bytes)} for what blocks give (TMPDIR)")
    if found.outputs_bytes:
        disk.append(f"{bytes_text(found.outputs_bytes)} for the original's outputs beside it")
    lines = [
        f"time:   {_duration(found)}",
        f"memory: {bytes_text(found.machine_peak_bytes)} at most, {bytes_text(room)} to be had",
        f"disk:   {', '.join(disk)}",
        *_notes(found),
    ]
    return [*lines, "it fits"] if found.fits else lines


def _notes(found: Preflight) -> list[str]:
    return [f"note: {text}" for text in found.notes]


def _misfits(found: Preflight) -> list[str]:
    from autoq.report.numbers import bytes_text

    lines = []
    for misfit in found.misfits:
        lines.append(
            f"will not fit: {bytes_text(misfit.needed_bytes)} of {misfit.what} on {misfit.place}, "
            f"and {bytes_text(misfit.free_bytes)} are free"
        )
        lines += [f"  would fit: {remedy}" for remedy in misfit.remedies]
        if not misfit.remedies:
            lines.append("  nothing smaller would; take a machine that has more")
    return lines
