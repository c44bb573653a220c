"""Who asks, and whether that one may: what routes depend on."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from autoq.service.guard.security import identity_of
from autoq.service.problems import Refusal
from autoq.wire import Identity, Scope

_RANKS = {scope: rank for rank, scope in enumerate(Scope)}


async def caller_of(request: Request) -> Identity:
    """Who asks, as the guard found out before any route was chosen.

    Raises:
        Refusal: the request brought no token that is known.
    """
    return identity_of(request.scope)


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


async def _can_read(caller: Caller) -> None:
    require(caller, Scope.READ)


async def _can_run(caller: Caller) -> None:
    require(caller, Scope.RUN)


async def _can_administer(caller: Caller) -> None:
    require(caller, Scope.ADMIN)


CanRead, CanRun, CanAdminister = map(Depends, (_can_read, _can_run, _can_administer))
