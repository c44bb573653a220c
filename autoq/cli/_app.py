"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from autoq.cli._compress import compress
from autoq.cli._dashboard import dashboard
from autoq.cli._generate import generate
from autoq.cli._kernels import kernels_app
from autoq.cli._kernels_bench import bench
from autoq.cli._look import formats, frontier, list_command, report, show
from autoq.cli._make import evaluate, export
from autoq.cli._refine import refine
from autoq.cli._search import search
from autoq.cli._store import store_app
from autoq.cli._targets import targets
from autoq.cli._validate import validate
from autoq.cli._verify import verify

app = typer.Typer(
    name="autoq",
    help="Decides, layer by layer, in which number format a language model is stored and run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("search")(search)
app.command("show")(show)
app.command("frontier")(frontier)
app.command("validate")(validate)
app.command("refine")(refine)
app.command("export")(export)
app.command("compress")(compress)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("report")(report)
app.command("dashboard")(dashboard)
app.command("list")(list_command)
app.command("formats")(formats)
app.command("targets")(targets)
app.command("verify")(verify)
kernels_app.command("bench")(bench)
app.add_typer(kernels_app, name="kernels")
app.add_typer(store_app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        from autoq import __version__

        typer.echo(f"autoq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; ends the process."""
    app()
