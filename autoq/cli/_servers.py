"""Which commands can be asked of a server, and the options that say so.

Loads no client: a command that works on this machine pays nothing for those that do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, TypeAlias

import typer

from autoq.cli._failures import reports_failures
from autoq.errors import InputError

SERVER_VARIABLE = "AUTOQ_SERVER"
TOKEN_VARIABLE = "AUTOQ_TOKEN"

ASKABLE = frozenset(
    [
        "search",
        "show",
        "frontier",
        "refine",
        "export",
        "eval",
        "report",
        "list",
        "formats",
        "targets",
        "verify",
        "jobs",
        "cancel",
        "resume",
    ]
)
"""Commands that a server can be asked."""

ServerUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        envvar=SERVER_VARIABLE,
        help="Ask this server (`autoq serve`) instead of working here.",
    ),
]
TokenVariable: TypeAlias = Annotated[
    str,
    typer.Option(
        "--token-env",
        metavar="VAR",
        help="Environment variable that holds the server's token.",
    ),
]
Detach: TypeAlias = Annotated[
    bool,
    typer.Option("--detach", help="With --server: print the job's id instead of waiting for it."),
]


@dataclass(frozen=True, slots=True)
class Server:
    """A server, as the command line names it."""

    url: str
    token_variable: str


@dataclass(frozen=True, slots=True)
class Asked:
    """One command for a server: its options' values, and which of them the user gave."""

    server: Server
    values: dict[str, Any]
    given: frozenset[str]
    names: dict[str, str]  # of parameters -> as the command line calls them
    detach: bool


def server_or_here(
    name: str, command: Callable[..., None], *, starts_job: bool = False
) -> Callable[..., None]:
    """A command that asks the server where there is one, and works here where there is none.

    Both have the same options; the server's side refuses those that it does not take.

    Args:
        name: key in `autoq.cli._remote.COMMANDS`.
        starts_job: it takes --detach, too.
    """

    @wraps(command)
    def chosen(context: typer.Context, **values: Any) -> None:
        detach = values.pop("detach", False)
        server: Server | None = context.obj
        if server is None:
            if detach:
                raise typer.BadParameter(
                    "--detach is for a server's jobs; name the server with --server URL"
                )
            command(**values)
            return
        _run(name, _asked(context, server, values, detach))

    return _with_parameters(chosen, command, starts_job)


def only_of_servers(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """A command that only a server can answer; `command` has its options and its help."""

    @wraps(command)
    def chosen(context: typer.Context, **values: Any) -> None:
        server: Server | None = context.obj
        if server is None:
            raise typer.BadParameter(
                f"`autoq {name}` asks a server; name it with `autoq --server URL {name}`, or in "
                f"the environment variable {SERVER_VARIABLE}"
            )
        _run(name, _asked(context, server, values, False))

    return _with_parameters(chosen, command, False)


@reports_failures
def refuse_here_only(command: str) -> None:
    """Say of a command that no server answers that it is none for servers.

    Raises:
        typer.Exit: it is none.
    """
    if command in ASKABLE:
        return
    raise InputError(
        f"`autoq {command}` works on this machine only; leave --server out, or run it where the "
        "server runs"
    )


def _run(name: str, asked: Asked) -> None:
    from autoq.cli._remote import run

    run(name, asked)


def _asked(context: typer.Context, server: Server, values: dict[str, Any], detach: bool) -> Asked:
    sources = {name: context.get_parameter_source(name) for name in values}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    names = {
        parameter.name: next((o for o in parameter.opts if o.startswith("--")), parameter.name)
        for parameter in context.command.params
        if parameter.name is not None
    }
    return Asked(server, values, frozenset(given), names, detach)


def _with_parameters(
    chosen: Callable[..., None], command: Callable[..., None], starts_job: bool
) -> Callable[..., None]:
    """`chosen` with the options of `command`, for whoever looks at its signature."""
    signature = inspect.signature(command, eval_str=True)  # nobody evaluates it afterwards
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter("context", keyword_only, annotation=typer.Context)]
    annotations: dict[str, Any] = {"context": typer.Context}
    if starts_job:
        added.append(inspect.Parameter("detach", keyword_only, default=False, annotation=Detach))
        annotations["detach"] = Detach
    parameters = [*signature.parameters.values(), *added]
    chosen.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    known = {name: entry.annotation for name, entry in signature.parameters.items()}
    chosen.__annotations__ = {**known, **annotations, "return": None}
    return chosen
