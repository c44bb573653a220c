"""`autoq worker`: run the service's jobs on this machine."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import DEFAULT_STORE, Store
from autoq.cli._output import quiet_libraries
from autoq.errors import InputError, without_password

Models = Annotated[
    list[Path] | None,
    typer.Option(
        "--models", metavar="ROOT", help="Folder below which models may be read; repeatable."
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="ROOT",
        help="Folder below which calibration data may be read; repeatable.",
    ),
]
Exports = Annotated[
    Path | None,
    typer.Option(
        "--exports",
        metavar="ROOT",
        help="Folder below which checkpoints may be written; made if there is none.",
    ),
]
MaxJobMemory = Annotated[
    str | None,
    typer.Option(
        "--max-job-memory",
        metavar="SIZE",
        help="End a job that takes more memory, for example 16GB; no bound if left out.",
    ),
]
RayCluster = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Have a Ray cluster score for searches; auto for this one."
    ),
]


@reports_failures
def worker(
    store: Store = DEFAULT_STORE,
    models: Models = None,
    data: Data = None,
    exports: Exports = None,
    max_job_memory: MaxJobMemory = None,
    ray: RayCluster = None,
    once: Annotated[
        bool, typer.Option("--once", help="End when no job waits, instead of waiting for one.")
    ] = False,
) -> None:
    """Run the jobs that `autoq serve` takes in, one after another, until Ctrl-C or SIGTERM.

    `autoq serve` starts workers of its own; these are further ones, on this machine or on others
    that reach the same store. Roots must have the names that they have there: a request names a
    model as ROOT/inside, by the last part of its folder. A job that is at work when a worker ends
    goes back into the queue, and the next worker goes on with it.
    """
    quiet_libraries()
    from autoq.service.guard.roots import Roots
    from autoq.service.jobs.runner import RunnerSettings, run

    make_exports(exports)
    settings = RunnerSettings(
        store=shared_store(store),
        roots=Roots(models=models or (), data=data or (), exports=exports).to_json(),
        max_job_memory=job_memory(max_job_memory),
        ray=ray,
        once=once,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    typer.echo(f"jobs of {without_password(store)}; Ctrl-C ends", err=True)
    run(settings)


def shared_store(store: str) -> str:
    """The URL of a store that several processes can open.

    Raises:
        InputError: it lives in the memory of one.
        StoreError: it is no URL of a store.
    """
    from autoq.studies import is_in_memory

    if is_in_memory(store) or store in ("", ":memory:"):
        raise InputError(
            "a store in memory is seen by one process, and jobs run in others; name a file or a "
            "database, for example --store sqlite:///autoq.db"
        )
    return store


def make_exports(folder: Path | None) -> None:
    """Make the folder that checkpoints go to; the other roots hold what is read, so they are there.

    Raises:
        InputError: it cannot be made.
    """
    if folder is None or os.path.lexists(folder.expanduser()):
        return  # whether it is a folder is for `Roots` to say
    try:
        folder.expanduser().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"--exports takes a folder, and {str(folder)!r} cannot be made ({reason}); name another"
        ) from None


def job_memory(size: str | None) -> int | None:
    """Bytes that a job may take.

    Raises:
        InputError: it is no size.
    """
    from autoq.api.sizes import parse_bytes

    return None if size is None else parse_bytes(size)
