"""`kernels bench`: how fast the kernels are on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoq.cli._failures import INTERRUPTED, reports_failures
from autoq.cli._options import Quiet
from autoq.cli._output import (
    check_writable,
    plain,
    quiet_libraries,
    results_kept_clean,
    write_text,
)
from autoq.cli._progress import make_progress
from autoq.errors import InputError

if TYPE_CHECKING:
    import torch

    from autoq.kernels.benchmark import Row

_DEVICES = ("cuda", "cpu")


@reports_failures
def bench(
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; the GPU if there is one if left out.")
    ] = None,
    operation: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Only operations that begin so, as fp8.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the results there.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads on the CPU; the goals are for one.")
    ] = 1,
    quiet: Quiet = False,
) -> None:
    """Measure every operation beside a copy, torch's own products and naive code, in one run.

    On the CPU this takes about two minutes. What was measured when it is interrupted is kept.
    """
    check_writable(json_file)
    quiet_libraries()
    rows: list[Row] = []
    chosen = _device(device)
    with results_kept_clean(), _threads(chosen, threads):
        interrupted = _measure(rows, chosen, operation or "", quiet=quiet)
        if json_file is not None:
            _write_json(json_file, rows, chosen)
    if not quiet:
        _print_tables(rows)
    typer.echo(_summary(rows))
    if interrupted:
        typer.echo("interrupted: this is what was measured until then", err=True)
        raise typer.Exit(INTERRUPTED)


def _device(name: str | None) -> torch.device:
    from autoq.api.task import resolve_device

    if name is not None and name.partition(":")[0] not in _DEVICES:
        raise InputError(f"the device must be cuda or cpu, got {name!r}; choose one of them")
    return resolve_device(name or "auto")


@contextmanager
def _threads(device: torch.device, count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(rows: list[Row], device: torch.device, prefix: str, *, quiet: bool) -> bool:
    """Fill `rows`; returns whether it was interrupted."""
    from autoq.kernels import benchmark

    sizes = benchmark.CPU_SIZES if device.type == "cpu" else benchmark.GPU_SIZES
    cases = benchmark.cases(sizes, prefix)
    try:
        with make_progress(quiet=quiet).task("measuring", len(cases)) as advance:
            for measured in benchmark.run(cases, device):
                rows.extend(measured)
                advance()
    except KeyboardInterrupt:
        return True
    return False


def _write_json(path: Path, rows: Sequence[Row], device: torch.device) -> None:
    from autoq.kernels import benchmark

    write_text(path, json.dumps(plain(benchmark.document(rows, device)), indent=1) + "\n")


def _print_tables(rows: Sequence[Row]) -> None:
    from autoq.cli._tables import make_console, numbers_table

    console = make_console()
    for operation in dict.fromkeys(row.operation for row in rows):
        measured = [row for row in rows if row.operation == operation]
        names = list(dict.fromkeys(name for row in measured for name in row.baselines))
        rate = "TFLOP/s" if any(row.teraflops for row in measured) else "GB/s"
        columns = ("variant", "shape", "body", "goal", "ms", rate, *(f"x {name}" for name in names))
        cells = [_cells(row, names) for row in measured]
        console.print(numbers_table(operation, *columns, rows=cells, text_columns=4))
    console.print(
        "x NAME: its time over ours, above 1 ours is faster. Goals: for one hardware each."
    )
    for row in rows:
        if row.failure is not None:
            console.print(f"{row.operation}, {row.variant}: {row.failure}", markup=False)


def _cells(row: Row, baselines: Sequence[str]) -> list[str]:
    beside = [row.baselines[name].ratio if name in row.baselines else None for name in baselines]
    return [
        row.variant,
        "x".join(str(size) for size in row.shape.values()),
        row.implementation,
        ", ".join(outcome.reached or "-" for outcome in row.outcomes) or "-",
        *map(_number, (row.milliseconds, row.teraflops or row.gigabytes_per_second, *beside)),
    ]


def _number(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:#.3g}".rstrip(".")


def _summary(rows: Sequence[Row]) -> str:
    failed = sum(row.failure is not None for row in rows)
    reached = [outcome.reached for row in rows for outcome in row.outcomes]
    count = sum(each in ("good", "excellent") for each in reached)
    goals = f"{count} of {len(reached)} goals reached" if reached else "no goals for this hardware"
    return f"{len(rows) - failed} measurements, {failed} not possible here; {goals}"
