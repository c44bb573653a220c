"""The options and the help of commands that only a server answers."""

from __future__ import annotations

from typing import Annotated

import typer

from autoq.cli._options import Json

_JOB = typer.Argument(metavar="JOB_OR_STUDY", help="A job's id, or a study for its newest job.")


def jobs(
    limit: Annotated[int, typer.Option(min=1, help="Only so many, the newest.")] = 50,
    status: Annotated[
        str | None,
        typer.Option(help="queued, running, cancelling, done, failed or cancelled."),
    ] = None,
    study: Annotated[str | None, typer.Option(help="Of this study only.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="search, refine, measure, export or verify.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List a server's jobs, the newest first."""


def cancel(job: Annotated[str, _JOB], as_json: Json = False) -> None:
    """End a server's job within a second; what it finished is kept."""


def resume(job: Annotated[str, _JOB], as_json: Json = False) -> None:
    """Queue a server's failed or cancelled job again; it goes on where it was."""
