"""`autoq serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import DEFAULT_STORE, Store
from autoq.cli._output import quiet_libraries
from autoq.cli._worker import (
    Data,
    Exports,
    MaxJobMemory,
    Models,
    RayCluster,
    job_memory,
    make_exports,
    shared_store,
)
from autoq.errors import InputError, without_password

if TYPE_CHECKING:
    from autoq.service.settings import ServiceSettings

_PORT = 8731


@reports_failures
def serve(
    store: Store = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on, 0 for any.")
    ] = _PORT,
    models: Models = None,
    data: Data = None,
    exports: Exports = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="Tokens that requests must bring; `autoq token create` makes them. Without it only "
            "this machine is listened to, and everybody on it may do everything.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            help="A further name by which clients call this server, for example a proxy's; "
            "repeatable.",
        ),
    ] = None,
    rate_limit: Annotated[
        float,
        typer.Option(
            "--rate-limit",
            min=0,
            metavar="N",
            help="Requests a second that one client may send; 0 for any number.",
        ),
    ] = 300.0,
    workers: Annotated[
        int, typer.Option(min=0, max=64, help="Jobs that run at once, each in a process.")
    ] = 1,
    max_job_memory: MaxJobMemory = None,
    ray: RayCluster = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", metavar="FILE", help="Certificate chain, PEM: answer by HTTPS."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="FILE", help="Its key, PEM.")
    ] = None,
    dashboard_url: Annotated[
        str | None,
        typer.Option(
            "--dashboard-url",
            metavar="URL",
            help="Where `autoq dashboard` shows the same store: the page links to it.",
        ),
    ] = None,
) -> None:
    """Serve the store by HTTP: a page for browsers, an API for programs, workers for jobs.

    Ctrl-C ends it: replies at hand are given, jobs go back into the queue and go on from what
    their studies have when the next server or `autoq worker` starts.
    """
    quiet_libraries()
    _check_installed()
    from autoq.service.settings import ServiceSettings

    settings = ServiceSettings(
        store=shared_store(store),
        host=host,
        port=port,
        models=tuple(models or ()),
        data=tuple(data or ()),
        exports=exports,
        token_file=token_file,
        allowed_hosts=tuple(allowed_host or ()),
        rate_limit=rate_limit or None,
        workers=workers,
        max_job_memory=job_memory(max_job_memory),
        ray=ray,
        tls_certificate=tls_cert,
        tls_key=tls_key,
        dashboard=None if dashboard_url is None else _web_address(dashboard_url),
    )
    _run(settings)


def _run(settings: ServiceSettings) -> None:
    from autoq.service.guard.hosts import check_exposure
    from autoq.service.jobs.runner import RunnerSettings
    from autoq.service.jobs.runner_pool import RunnerPool
    from autoq.service.web.app import create_app
    from autoq.service.web.server import check_tls, listening_socket, serve

    check_tls(settings)
    has_certificate = settings.tls_certificate is not None
    warnings = check_exposure(settings.host, settings.token_file, has_certificate)
    with listening_socket(settings.host, settings.port) as listening:
        make_exports(settings.exports)
        app = create_app(settings)
        runner = RunnerSettings(
            store=settings.store,
            roots=app.state.context.roots.to_json(),
            max_job_memory=settings.max_job_memory,
            ray=settings.ray,
        )
        with RunnerPool(runner, settings.workers):
            _greet(settings, listening.getsockname()[1], warnings)
            serve(app, settings, listening)
    _note("the service has ended; jobs that ran are in the queue again")


def _web_address(text: str) -> str:
    """
    Raises:
        InputError: it is none that a browser should be sent to; or it holds a password, which
            everybody would read.
    """
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    except ValueError:  # brackets that are no address
        is_good = False
    if not is_good:
        raise InputError(
            "--dashboard-url must be an http or https address without a password, got "
            f"{without_password(text)!r}; give one as http://127.0.0.1:8080"
        )
    return parts.geturl()


def _check_installed() -> None:
    """
    Raises:
        InputError: what the service is built from is not installed.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the service needs {error.name}, which is not installed; "
            'install it: pip install "autoq[service]"'
        ) from None


def _greet(settings: ServiceSettings, port: int, warnings: Sequence[str]) -> None:
    from autoq.service.web.server import location

    scheme = "http" if settings.tls_certificate is None else "https"
    typer.echo(f"autoq serves {scheme}://{location(settings.host, port)}")
    sys.stdout.flush()
    _note(f"store {without_password(settings.store)}; Ctrl-C ends it")
    for warning in warnings:
        _note(f"warning: {warning}")
    if settings.token_file is not None:
        _note("requests need a token: `autoq token create` makes one, the page asks for it")
    if settings.exports is None:
        _note("checkpoints cannot be written: give --exports FOLDER to allow it")
    if settings.workers == 0:
        _note("no workers: jobs wait until `autoq worker` runs with the same store and roots")


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
