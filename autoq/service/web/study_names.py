"""Studies by the name in an address: the whole name, never its beginning or a number."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Path
from starlette.types import ASGIApp, Receive, Scope, Send

from autoq.service.problems import Refusal
from autoq.service.replies import not_found
from autoq.service.web.context import InContext
from autoq.studies import StudyRecord

_SLASH = "\x002F"
"""What stands for "%2F" on the way through the router; no name holds it."""

StudyName = Annotated[str, Path(min_length=1, max_length=200, description="A study's name.")]


def _named(context: InContext, study: StudyName) -> StudyRecord:
    """
    Raises:
        Refusal: no study is called so.
    """
    with not_found():
        return context.store.study_named(_name(study))


async def _checked(study: StudyName) -> str:
    return _name(study)


def _name(study: str) -> str:
    """
    Raises:
        Refusal: it cannot be a name.
    """
    name = study.replace(_SLASH, "/")
    if not name.isprintable():  # nor can names be, and some databases refuse to look for them
        raise Refusal("not-found", f"no study is named {name[:80]!r}")
    return name


NameOfStudy = Annotated[str, Depends(_checked)]
"""The name alone, for whoever looks the study up."""

InStudy = Annotated[StudyRecord, Depends(_named)]


class WholeNamesMiddleware:
    """Keeps a quoted slash from ending a part of an address, since names may hold slashes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        raw = scope.get("raw_path") or b""
        if scope["type"] == "http" and raw.startswith(b"/v1/studies/") and b"%2f" in raw.lower():
            kept = raw.replace(b"%00", b"%01").replace(b"%2f", b"%002F").replace(b"%2F", b"%002F")
            scope["path"] = unquote(kept.partition(b"?")[0].decode("ascii", "replace"))
        await self._app(scope, receive, send)
