"""Who asks, and whether that one may: what routes depend on."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from autoq import __version__
from autoq.service.problems import Refusal
from autoq.wire import Identity, Scope

_RANKS = {scope: rank for rank, scope in enumerate(Scope)}

LOCAL = Identity(name="local", scope=Scope.ADMIN, authentication=False, version=__version__)
"""Everybody on this machine, where the service was started without tokens."""


def caller_of(request: Request) -> Identity:
    """Who asks.

    Raises:
        Refusal: the request brought no token that is known.
    """
    if request.app.state.context.settings.token_file is None:
        return LOCAL
    raise Refusal(
        "unauthorized",
        "give a token: Authorization: Bearer",
        headers={"www-authenticate": "Bearer"},
    )


Caller = Annotated[Identity, Depends(caller_of)]


def require(caller: Identity, scope: Scope) -> None:
    """
    Raises:
        Refusal: the caller may not do what needs the scope.
    """
    if _RANKS[caller.scope] < _RANKS[scope]:
        raise Refusal(
            "forbidden",
            f"this needs a token with the scope {scope}, and {caller.name} has {caller.scope}; "
            "`autoq token create --scope` makes one",
        )


def _can_read(caller: Caller) -> None:
    require(caller, Scope.READ)


def _can_run(caller: Caller) -> None:
    require(caller, Scope.RUN)


def _can_administer(caller: Caller) -> None:
    require(caller, Scope.ADMIN)


CanRead, CanRun, CanAdminister = map(Depends, (_can_read, _can_run, _can_administer))
