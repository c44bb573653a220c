"""All routes, and the schema that describes them."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from autoq.service.replies import problem_responses, tagged
from autoq.service.web import (
    page_files,
    routes_jobs,
    routes_service,
    routes_studies,
    routes_summary,
    routes_work,
)
from autoq.service.web.access import CanRead

_ANYWHERE = (401, 403, 413, 415, 422, 429, 500, 503)
"""Statuses of problems that any route may answer with."""

_PUBLIC = ("/v1/health", "/v1/ready")

_SCHEMA = APIRouter(include_in_schema=False, dependencies=[CanRead])


def include_routes(app: FastAPI) -> None:
    """Give the app its routes, and its schema."""
    app.include_router(routes_service.public)
    for part in (routes_service, routes_studies, routes_summary, routes_jobs, routes_work):
        app.include_router(part.router, responses=problem_responses(*_ANYWHERE))
    app.include_router(_SCHEMA)
    app.include_router(page_files.router)
    generated = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_security(generated())
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]  # FastAPI's documented way


@_SCHEMA.get("/openapi.json")
def show_schema(request: Request) -> Response:
    """The API for programs that make clients or tests of it."""
    schema = request.app.openapi()
    return tagged(request, json.dumps(schema, separators=(",", ":")).encode())


def _with_security(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the one way to say who asks, and with the routes that do not want to know."""
    components = schema.setdefault("components", {})
    components["securitySchemes"] = {
        "token": {
            "type": "http",
            "scheme": "bearer",
            "description": "What `autoq token create` printed; none where the server asks for none.",
        }
    }
    schema["security"] = [{"token": []}]
    for path in _PUBLIC:
        schema["paths"][path]["get"]["security"] = []
    return schema
