"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from autoq.cli._compress import compress
from autoq.cli._dashboard import dashboard
from autoq.cli._generate import generate
from autoq.cli._jobs import cancel, jobs, resume
from autoq.cli._kernels import kernels_app
from autoq.cli._kernels_bench import bench
from autoq.cli._look import formats, frontier, list_command, report, show
from autoq.cli._make import evaluate, export
from autoq.cli._refine import refine
from autoq.cli._search import search
from autoq.cli._serve import serve
from autoq.cli._servers import (
    TOKEN_VARIABLE,
    Server,
    ServerUrl,
    TokenVariable,
    only_of_servers,
    refuse_here_only,
    server_or_here,
)
from autoq.cli._store import store_app
from autoq.cli._targets import targets
from autoq.cli._token import token_app
from autoq.cli._validate import validate
from autoq.cli._verify import verify
from autoq.cli._worker import worker

app = typer.Typer(
    name="autoq",
    help="Decides, layer by layer, in which number format a language model is stored and run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("search")(server_or_here("search", search, starts_job=True))
app.command("show")(server_or_here("show", show))
app.command("frontier")(server_or_here("frontier", frontier))
app.command("validate")(validate)
app.command("refine")(server_or_here("refine", refine, starts_job=True))
app.command("export")(server_or_here("export", export, starts_job=True))
app.command("compress")(compress)
app.command("eval")(server_or_here("eval", evaluate, starts_job=True))
app.command("generate")(generate)
app.command("report")(server_or_here("report", report))
app.command("dashboard")(dashboard)
app.command("list")(server_or_here("list", list_command))
app.command("formats")(server_or_here("formats", formats))
app.command("targets")(server_or_here("targets", targets))
app.command("verify")(server_or_here("verify", verify, starts_job=True))
app.command("serve")(serve)
app.command("worker")(worker)
app.command("jobs")(only_of_servers("jobs", jobs))
app.command("cancel")(only_of_servers("cancel", cancel))
app.command("resume")(only_of_servers("resume", resume))
kernels_app.command("bench")(bench)
app.add_typer(kernels_app, name="kernels")
app.add_typer(store_app, name="store")
app.add_typer(token_app, name="token")


def _print_version(wanted: bool) -> None:
    if wanted:
        from autoq import __version__

        typer.echo(f"autoq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
    server: ServerUrl = None,
    token_env: TokenVariable = TOKEN_VARIABLE,
) -> None:
    if not server:
        return
    context.obj = Server(server, token_env)
    source = context.get_parameter_source("server")
    # The environment's server is for the commands that can ask one; others do not mind it.
    if source is not None and source.name == "COMMANDLINE":
        refuse_here_only(context.invoked_subcommand or "")


def main() -> None:
    """Run the command line; ends the process."""
    app()
