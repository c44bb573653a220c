"""Commands about the kernels: `kernels check` and `kernels list`."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoq.cli._failures import INTERRUPTED, UNVERIFIED, reports_failures
from autoq.cli._kernels_table import check_lines
from autoq.cli._options import Json, Quiet
from autoq.cli._output import (
    check_writable,
    plain,
    print_json,
    quiet_libraries,
    results_kept_clean,
    write_text,
)
from autoq.cli._progress import make_progress
from autoq.errors import InputError

if TYPE_CHECKING:
    import torch

    from autoq.kernels._compile_cases.case import CompileCase
    from autoq.kernels.compile_check import CheckedLaunch
    from autoq.kernels.targets import Target

kernels_app = typer.Typer(
    help="What the numeric kernels are, whether they compile, and how fast they are.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@kernels_app.command("check")
@reports_failures
def check(
    target: Annotated[
        list[str] | None,
        typer.Option(help="A GPU generation, as sm_90 or gfx950; again for more. All if left out."),
    ] = None,
    operation: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Only operations that begin so, as fp8.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the results there.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Compile every kernel for every GPU generation, with no GPU, and check what came out.

    A launch fails if it does not compile, spills registers, needs more shared memory than there
    is, lacks the matrix or conversion instruction that it is written for, or computes
    approximately. The exit code is then 4.
    """
    check_writable(json_file)
    quiet_libraries()
    started = time.monotonic()
    with results_kept_clean():
        results = _checked(tuple(target or ()), operation, quiet=quiet)
    seconds = time.monotonic() - started
    if json_file is not None:
        _write_json(json_file, results)
    if not quiet:
        typer.echo("\n".join(check_lines(results)))
    failed = _print_failures(results)
    typer.echo(_summary(results, failed, seconds))
    if failed:
        raise typer.Exit(UNVERIFIED)


@kernels_app.command("list")
@reports_failures
def list_kernels(
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda|TARGET",
            help="A device of this machine, or a GPU generation as sm_90; the GPU if there is one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which implementation every operation takes on a device, and why."""
    from autoq.kernels.dispatch import answers

    where = _where(device)
    name = getattr(where, "name", None) or str(where)
    rows = [
        {
            "operation": answer.operation,
            "rows": answer.rows or None,
            "implementation": str(answer.choice.implementation),
            "reason": answer.choice.reason,
        }
        for answer in answers(where)
    ]
    if as_json:
        print_json({"device": name, "operations": rows})
        return
    from autoq.cli._tables import make_console, plain_table

    cells = [[str(value or "") for value in row.values()] for row in rows]
    make_console().print(plain_table(f"operation on {name}", "rows", "takes", "why", rows=cells))


def require_triton() -> None:
    """Refuse to go on where kernels cannot be compiled.

    Raises:
        InputError: triton is not installed, or its interpreter is switched on.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError("triton is not installed; pip install 'autoq[triton]'")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise InputError("TRITON_INTERPRET is set, and nothing compiles then; unset it")


def _where(device: str | None) -> torch.device | Target:
    """The device of this machine, or the target, that was named."""
    import torch

    from autoq.kernels.targets import TARGETS

    has_gpu = torch.cuda.is_available()
    if device is None:
        device = "cuda" if has_gpu else "cpu"
    if device in TARGETS:
        return TARGETS[device]
    if device == "cuda" and not has_gpu:
        raise InputError("there is no GPU here; name a generation such as sm_90")
    if device not in ("cpu", "cuda"):
        known = ", ".join(("cpu", "cuda", *TARGETS))
        raise InputError(f"no device or target named {device!r}; known: {known}")
    return torch.device(device)


def _checked(targets: tuple[str, ...], prefix: str | None, *, quiet: bool) -> list[CheckedLaunch]:
    require_triton()
    from autoq.kernels.check_processes import check_all
    from autoq.kernels.targets import TARGETS

    for name in targets:
        TARGETS[name]  # refuses an unknown one
    tasks = [
        (case, name)
        for case in _cases(prefix)
        for name in case.targets
        if not targets or name in targets
    ]
    if not tasks:
        raise InputError(
            f"{prefix} has no kernels for {' and '.join(targets)}; name other targets, or none"
        )
    results = []
    try:
        with make_progress(quiet=quiet).task("compiling", len(tasks)) as advance:
            for result in check_all(tasks):
                results.append(result)
                advance()
    except KeyboardInterrupt:
        typer.echo("interrupted: what was compiled is kept, run the command again", err=True)
        raise typer.Exit(INTERRUPTED) from None
    order = {(case.name, name): place for place, (case, name) in enumerate(tasks)}
    return sorted(results, key=lambda result: order[result.name, result.target])


def _cases(prefix: str | None) -> list[CompileCase]:
    from autoq.kernels._compile_cases import compile_cases

    cases = compile_cases()
    chosen = [case for case in cases if case.operation.startswith(prefix or "")]
    if not chosen:
        known = ", ".join(dict.fromkeys(case.operation for case in cases))
        raise InputError(f"no operation begins with {prefix!r}; known: {known}")
    return chosen


def _write_json(path: Path, results: Sequence[CheckedLaunch]) -> None:
    import triton

    from autoq import __version__

    document = {
        "autoq": __version__,
        "triton": triton.__version__,
        "launches": [plain(asdict(result)) for result in results],
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def _print_failures(results: Sequence[CheckedLaunch]) -> int:
    failed = [result for result in results if result.failures]
    for result in failed:
        for reason in result.failures:
            typer.echo(f"failed: {result.name} for {result.target}: {reason}", err=True)
    return len(failed)


def _summary(results: Sequence[CheckedLaunch], failed: int, seconds: float) -> str:
    import triton

    from autoq.report.numbers import seconds_text

    targets = len({result.target for result in results})
    return (
        f"{len(results)} launches for {targets} target{'s' if targets > 1 else ''} with triton "
        f"{triton.__version__}: {len(results) - failed} ok, {failed} failed, {seconds_text(seconds)}"
    )
