"""Replies: problems, bodies that were typed already, and tags of what changes rarely."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter
from starlette.exceptions import HTTPException
from starlette.responses import Response

from autoq.errors import AutoqError, UnknownNameError
from autoq.service.problems import KINDS, Refusal, problem_of
from autoq.wire import PROBLEM_MEDIA_TYPE

JSON = "application/json"
_OF_STATUS = {404: "not-found", 405: "method", 413: "too-large", 415: "media-type"}
_NO_STORE = {"cache-control": "no-store"}
_LISTED_FAULTS = 20
_REVALIDATED = {"cache-control": "private, no-cache"}


def reply(
    body: BaseModel, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    """A typed reply; what was made as a model is not checked a second time."""
    return Response(
        body.model_dump_json(), status, {**_NO_STORE, **(headers or {})}, media_type=JSON
    )


def reply_list(entries: Sequence[BaseModel]) -> Response:
    """A list of typed entries."""
    body = TypeAdapter(list[Any]).dump_json(list(entries))
    return Response(body, headers=_NO_STORE, media_type=JSON)


def tagged(request: Request, content: bytes, media_type: str = JSON) -> Response:
    """The content with a tag of its own, or 304 where the client has it already."""
    tag = f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"etag": tag, **_REVALIDATED}
    if _names(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


def problem_reply(error: BaseException, path: str | None) -> Response:
    """What is said of an exception."""
    problem = problem_of(error, path)
    headers = error.headers if isinstance(error, Refusal) else {}
    return Response(
        problem.model_dump_json(),
        problem.status,
        {**_NO_STORE, **headers},
        media_type=PROBLEM_MEDIA_TYPE,
    )


@contextmanager
def not_found() -> Iterator[None]:
    """What the address names is not there: 404, unlike unknown names in a body.

    Raises:
        Refusal: instead of `UnknownNameError`.
    """
    try:
        yield
    except UnknownNameError as error:
        raise Refusal("not-found", str(error)) from None


def handle_problems(app: FastAPI) -> None:
    """Let the app answer with problems; what nobody foresaw goes on to the guard, which logs it."""
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(AutoqError, _on_known)


def address_of(scope: Mapping[str, Any]) -> str:
    """The path that was asked for, quoted as it came: decoded, it may have been changed on the way."""
    raw: bytes = scope.get("raw_path") or b""
    return raw.partition(b"?")[0].decode("ascii", "replace") or quote(scope["path"])


async def _on_known(request: Request, error: Exception) -> Response:
    return problem_reply(error, address_of(request.scope))


async def _on_http(request: Request, error: Exception) -> Response:
    refused = cast(HTTPException, error)
    kind = _OF_STATUS.get(refused.status_code, "input")
    detail = _HTTP_DETAILS.get(refused.status_code, str(refused.detail))
    headers = dict(refused.headers or {})
    if "Allow" in headers:
        headers["Allow"] = _methods(request, headers["Allow"])
    return problem_reply(Refusal(kind, detail, headers=headers), address_of(request.scope))


async def _on_invalid(request: Request, error: Exception) -> Response:
    found = cast(RequestValidationError, error).errors()
    faults = [_fault(entry) for entry in found[:_LISTED_FAULTS]]
    said = "; ".join(f"{fault['where']}: {fault['what']}" for fault in faults[:3])
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    refusal = Refusal("input", f"the request breaks its schema: {said}{more}", errors=faults)
    return problem_reply(refusal, address_of(request.scope))


def _methods(request: Request, first: str) -> str:
    """All that an address takes: the router knows those of the first of its routes only."""
    template = getattr(request.scope.get("route"), "path", "")
    declared = request.app.openapi()["paths"].get(template, {})
    methods = {*first.split(", "), *map(str.upper, declared)}
    return ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))


_HTTP_DETAILS = {
    404: "the service has no such address; /openapi.json lists those that there are",
    405: "the address does not take this method; /openapi.json says which it takes",
    400: "the body could not be read; send JSON in UTF-8",
}


def _fault(entry: Mapping[str, Any]) -> dict[str, str]:
    """Where and what, without the value, which may be long or secret."""
    where = ".".join(str(part) for part in entry["loc"])
    message = str(entry["msg"])
    return {"where": where[:200], "what": (message[:1].lower() + message[1:])[:300]}


def _names(header: str, tag: str) -> bool:
    """Whether If-None-Match names the tag; weak comparison."""
    wanted = tag.removeprefix("W/")
    tags = (part.strip().removeprefix("W/") for part in header.split(","))
    return any(part in ("*", wanted) for part in tags)


def _problem_response(kinds: Sequence[str]) -> dict[str, Any]:
    return {
        "description": "; or: ".join(KINDS[kind].title for kind in kinds),
        "content": {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What routes declare: problems of these statuses, by OpenAPI's rules."""
    kinds: dict[int, list[str]] = {}
    for name, kind in KINDS.items():
        kinds.setdefault(int(kind.status), []).append(name)
    return {status: _problem_response(kinds.get(status, ["input"])) for status in sorted(statuses)}
