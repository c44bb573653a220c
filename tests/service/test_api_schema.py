"""Requests that nobody thought of, made from the schema: no 5xx, and every reply is as declared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from autoq.service.settings import ServiceSettings
from autoq.service.web.app import create_app
from autoq.studies import StudyStore
from autoq.testing.synthetic_study import add_synthetic_study

STUDY = "known"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
KNOWN_IN_BODIES: dict[str, Any] = {
    "model": "bundled",
    "checkpoint": "bundled",
    "calibration_data": None,
    "output": "exports/new",
    "export": "exports/new",
    "formats": ["fp8", "nvfp4"],
    "target": "vllm:h200",
    "container": "modelopt",
    "estimator": None,
    "calibration": "best",
    "kv_formats": ["fp8"],
    "rules": ["*layers.0.*=fp8"],
    "gpu": "h200",
    "objective": None,
    "plan": 1,
}
"""What stands in some bodies instead of generated text, which is never the name of anything."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder: Path = tmp_path_factory.mktemp("schema")
    (folder / "exports").mkdir()
    made = create_app(
        ServiceSettings(
            store=f"sqlite:///{folder / 'store.db'}",
            exports=folder / "exports",
            allowed_hosts=("testserver",),
            rate_limit=None,
        )
    )
    store: StudyStore = made.state.context.store
    add_synthetic_study(store, groups=12, formats=3, name=STUDY)
    made.openapi_schema = without_tuples(made.openapi())
    store.note_runner("none", lease_seconds=36_000)  # or the service would not be ready: 503
    yield made
    store.close()


def without_tuples(node: Any) -> Any:
    """The document with pairs as arrays of one kind of entry.

    Schemathesis 4.32 rewrites `prefixItems` as older drafts had them, which it then takes for wrong.
    """
    if isinstance(node, list):
        return [without_tuples(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    plain = {key: without_tuples(value) for key, value in node.items()}
    entries = plain.pop("prefixItems", None)
    return plain if entries is None else {**plain, "items": {"anyOf": entries}}


@pytest.fixture(scope="module")
def known_job(app: FastAPI) -> str:
    record, _ = app.state.context.store.add_job(
        kind="verify", request={"checkpoint": "bundled"}, created_by="local"
    )
    return str(record.id)


@pytest.fixture(scope="module")
def described(app: FastAPI, known_job: str) -> Any:
    """The schema; half of all addresses name what there is, or nearly all would be 404."""
    loaded = schemathesis.openapi.from_asgi("/openapi.json", app)
    known = {"study": STUDY, "job": known_job, "plan": 1}

    @loaded.hook
    def map_path_parameters(context: Any, parameters: dict[str, Any] | None) -> Any:
        if not parameters or context.operation.method.upper() == "DELETE":
            return parameters
        takes = sum(map(ord, str(parameters))) % 2
        return {name: known[name] if takes else value for name, value in parameters.items()}

    @loaded.hook
    def map_body(context: Any, body: Any) -> Any:
        if isinstance(body, dict) and len(body) % 2:
            body = {name: KNOWN_IN_BODIES.get(name, value) for name, value in body.items()}
        return body

    # Streams of events end when jobs do, and no job is run here; they have tests of their own.
    return loaded.exclude(path_regex="/events$")


def test_generated_requests_are_answered_as_declared(described: Any) -> None:
    assert answered(described, 10) >= 250


@pytest.mark.slow
def test_thousands_of_generated_requests_are_answered_as_declared(described: Any) -> None:
    assert answered(described, 200) >= 4_000


def cases_of(operation: Any) -> Any:
    """Requests as the schema allows them, and where something can be wrong, wrong ones, too."""
    right = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if not list(operation.body) and not list(operation.query):
        return right
    return right | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)


def answered(schema: Any, each: int) -> int:
    """Send so many requests of every operation, and return how many all were.

    The same requests every time: nothing of hypothesis' choice is random here.
    """
    statuses: Counter[int] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=each,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=cases_of(operation))
        def ask(case: Any) -> None:
            response = case.call()
            statuses[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        ask()
    assert statuses[200] and statuses[202] and statuses[404] and statuses[422]
    print(f"{statuses.total()} requests: {dict(sorted(statuses.items()))}")
    return statuses.total()
