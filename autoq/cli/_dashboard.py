"""`autoq dashboard`."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from autoq.cli._failures import one_line, reports_failures
from autoq.cli._options import DEFAULT_STORE, Store, check_store
from autoq.cli._output import quiet_libraries, results_kept_clean
from autoq.errors import InputError


@reports_failures
def dashboard(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            show_default=False,
            help="Port to listen on, 0 for any; 8080, or any that is free, if left out.",
        ),
    ] = None,
    artifacts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Folder for plans, heat maps and reports; beside the SQLite file if left out.",
        ),
    ] = None,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote",
            help="Listen where other machines reach it, without password, deleting included.",
        ),
    ] = False,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
    store: Store = DEFAULT_STORE,
) -> None:
    """Show the store's studies in Optuna's dashboard: notes, plots, trials, plans, reports.

    Refined studies show their trials, other studies their measured plans. Ctrl-C ends it.
    """
    quiet_libraries()
    with results_kept_clean():
        from autoq.api.dashboards.dashboard import check_dashboard_installed
        from autoq.api.dashboards.server import is_loopback, listening_server

        check_dashboard_installed()
        _check_host(host, is_loopback(host), allow_remote)
        check_store(store)
    with listening_server(host, port) as server:
        with results_kept_clean():
            from autoq.api.dashboards.dashboard import dashboard_application, prepare_store

            prepared = prepare_store(store, artifacts, say=_note)
            application = dashboard_application(prepared)
        for name, reason in prepared.skipped:
            _note(f"{name} is not shown: {one_line(reason)}")
        typer.echo(f"dashboard: {server.url}")
        sys.stdout.flush()
        _note("Ctrl-C ends it")
        if browser and _has_display():
            webbrowser.open(server.url)
        server.serve(application)
    _note("the dashboard has ended")


def _check_host(host: str, is_loopback: bool, allow_remote: bool) -> None:
    if is_loopback:
        return
    if not allow_remote:
        raise InputError(
            f"--host {host} lets other machines in, and Optuna's dashboard has no password: whoever "
            "reaches it can read and delete; listen on 127.0.0.1 and forward the port, or add "
            "--allow-remote"
        )
    _note(
        f"warning: whoever reaches {host} can read and delete studies; the dashboard has no password"
    )


def _has_display() -> bool:
    """Whether there is a screen: without one, a text browser would take the terminal."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
