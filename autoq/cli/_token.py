"""`autoq token`: who may use a service, kept in a file of hashes."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import Json
from autoq.cli._output import print_columns, print_json

token_app = typer.Typer(
    help="Make, list and revoke the tokens that a service asks for.", no_args_is_help=True
)

TokenFile: TypeAlias = Annotated[
    Path,
    typer.Option("--token-file", metavar="FILE", help="Names, scopes and hashes; no token."),
]


class _Scope(StrEnum):
    """As `autoq.wire.Scope`, which is loaded only when a command runs."""

    READ = "read"
    RUN = "run"
    ADMIN = "admin"


@token_app.command("create")
@reports_failures
def create(
    token_file: TokenFile,
    name: Annotated[str, typer.Option(help="Whose it is, or what for; shows in jobs and logs.")],
    scope: Annotated[
        _Scope,
        typer.Option(
            help="read looks at everything; run also starts and ends jobs; admin also deletes studies."
        ),
    ] = _Scope.READ,
    as_json: Json = False,
) -> None:
    """Make a token, add its hash to the file, and print it: this once, and nowhere else.

    A server that runs with the file takes it at once.
    """
    from autoq.service.guard.tokens import create_token
    from autoq.wire import Scope

    token = create_token(token_file, name, Scope(scope.value))
    if as_json:
        print_json({"name": name, "scope": scope.value, "token": token})
        return
    typer.echo(token)
    typer.echo(
        f"the token of {name}, scope {scope.value}; keep it: {token_file} has only its hash",
        err=True,
    )


@token_app.command("list")
@reports_failures
def list_tokens(token_file: TokenFile, as_json: Json = False) -> None:
    """List the tokens of a file: name, scope, when they were made."""
    from autoq.service.guard.tokens import read_tokens

    entries = read_tokens(token_file)
    if as_json:
        shown = [
            {key: value for key, value in asdict(entry).items() if key != "sha256"}
            for entry in entries
        ]
        print_json({"tokens": shown})
        return
    if not entries:
        typer.echo("no tokens")
        return
    rows = [(entry.name, str(entry.scope), entry.created) for entry in entries]
    print_columns(("name", "scope", "created"), rows)


@token_app.command("revoke")
@reports_failures
def revoke(
    token_file: TokenFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The token's name.")],
) -> None:
    """Take a token out of the file; a server that runs with it refuses the token at once."""
    from autoq.service.guard.tokens import revoke_token

    revoke_token(token_file, name)
    typer.echo(f"revoked {name}")
