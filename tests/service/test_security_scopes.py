"""Every route of the service x every kind of caller: who gets in, and who does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, routing
from starlette.testclient import TestClient

from autoq.service.guard.security import is_public
from autoq.service.guard.tokens import TOKEN_PREFIX, create_token, revoke_token
from autoq.service.settings import ServiceSettings
from autoq.service.web.app import create_app
from autoq.testing.synthetic_study import add_synthetic_study
from autoq.wire import Scope

EVERYBODY = None
READ, RUN, ADMIN = Scope

SCOPES: dict[tuple[str, str], Scope | None] = {
    ("GET", "/v1/health"): EVERYBODY,
    ("GET", "/v1/ready"): EVERYBODY,
    ("GET", "/"): EVERYBODY,
    ("GET", "/studies"): EVERYBODY,
    ("GET", "/studies/{path:path}"): EVERYBODY,
    ("GET", "/compare"): EVERYBODY,
    ("GET", "/jobs"): EVERYBODY,
    ("GET", "/jobs/{path:path}"): EVERYBODY,
    ("GET", "/assets/{name:path}"): EVERYBODY,
    ("GET", "/v1/me"): READ,
    ("GET", "/v1/formats"): READ,
    ("GET", "/v1/targets"): READ,
    ("GET", "/v1/models"): READ,
    ("GET", "/metrics"): READ,
    ("GET", "/openapi.json"): READ,
    ("GET", "/v1/jobs"): READ,
    ("GET", "/v1/jobs/{job}"): READ,
    ("GET", "/v1/jobs/{job}/log"): READ,
    ("GET", "/v1/jobs/{job}/events"): READ,
    ("POST", "/v1/jobs/{job}/cancel"): RUN,
    ("POST", "/v1/jobs/{job}/resume"): RUN,
    ("GET", "/v1/studies"): READ,
    ("POST", "/v1/studies"): RUN,
    ("GET", "/v1/studies/{study}"): READ,
    ("DELETE", "/v1/studies/{study}"): ADMIN,
    ("POST", "/v1/studies/{study}/cancel"): RUN,
    ("POST", "/v1/studies/{study}/resume"): RUN,
    ("POST", "/v1/studies/{study}/plans"): READ,
    ("GET", "/v1/studies/{study}/plans/{plan}"): READ,
    ("GET", "/v1/studies/{study}/plans/{plan}/download"): READ,
    ("GET", "/v1/studies/{study}/frontier"): READ,
    ("GET", "/v1/studies/{study}/sensitivity"): READ,
    ("GET", "/v1/studies/{study}/trials"): READ,
    ("GET", "/v1/studies/{study}/summary"): READ,
    ("GET", "/v1/studies/{study}/report"): READ,
    ("GET", "/v1/studies/{study}/events"): READ,
    ("GET", "/v1/studies/{study}/exports"): READ,
    ("POST", "/v1/studies/{study}/exports"): RUN,
    ("POST", "/v1/studies/{study}/refinements"): RUN,
    ("POST", "/v1/studies/{study}/measurements"): RUN,
    ("POST", "/v1/verifications"): RUN,
}
"""Route -> the least scope that may use it."""

CALLERS = ("none", "wrong", "read", "run", "admin")
RANKS = {READ: 0, RUN: 1, ADMIN: 2}

NOWHERE = {"study": "none", "job": "0" * 32, "plan": "7", "path:path": "x", "name:path": "x"}
"""What addresses are filled with: nothing of that name is there, so that nothing is changed, and
streams end at once."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scopes")


@pytest.fixture(scope="module")
def tokens(place: Path) -> dict[str, str]:
    return {
        str(scope): create_token(place / "tokens", f"the-{scope}-token", scope) for scope in Scope
    }


@pytest.fixture(scope="module")
def app(place: Path, tokens: dict[str, str]) -> FastAPI:
    made = create_app(
        ServiceSettings(
            store=f"sqlite:///{place / 'store.db'}",
            token_file=place / "tokens",
            rate_limit=None,
        )
    )
    add_synthetic_study(made.state.context.store, groups=4, formats=3, name="there")
    return made


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1") as made:
        yield made


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """Method and address of every route, those of routers inside of routers too."""
    within = getattr(routing, "iter_route_contexts", iter)  # older ones flatten routers
    found = set()
    for route in within(app.routes):
        for method in route.methods - {"HEAD"}:
            found.add((method, route.path))
    return found


def ask(client: TestClient, method: str, template: str, headers: dict[str, str]) -> Any:
    path = template
    for name, value in NOWHERE.items():
        path = path.replace(f"{{{name}}}", value)
    assert "{" not in path, "say in NOWHERE what stands there"
    body = {} if method == "POST" else None
    return client.request(method, path, headers=headers, json=body)


def header_of(caller: str, tokens: dict[str, str]) -> dict[str, str]:
    if caller == "none":
        return {}
    token = TOKEN_PREFIX + "A" * 43 if caller == "wrong" else tokens[caller]
    return {"Authorization": f"Bearer {token}"}


def expected_refusal(scope: Scope | None, caller: str) -> int | None:
    """401, 403, or None where the caller gets through to the route."""
    if scope is EVERYBODY:
        return None
    if caller in ("none", "wrong"):
        return 401
    return 403 if RANKS[Scope(caller)] < RANKS[scope] else None


def test_every_route_has_its_scope_said_here(app: FastAPI) -> None:
    assert routes_of(app) == set(SCOPES)


@pytest.fixture
def failures_forgotten(app: FastAPI) -> None:
    """The tests send more wrong tokens than a client may in a minute."""
    app.state.context.guard._failures._levels.clear()


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(("method", "template"), sorted(SCOPES))
def test_who_gets_in(
    client: TestClient,
    tokens: dict[str, str],
    failures_forgotten: None,
    method: str,
    template: str,
    caller: str,
) -> None:
    response = ask(client, method, template, header_of(caller, tokens))
    refusal = expected_refusal(SCOPES[method, template], caller)
    if refusal is None:
        assert response.status_code not in (401, 403), response.text
        assert response.status_code < 500 or template == "/v1/ready", response.text
        return
    assert response.status_code == refusal, response.text
    assert (
        response.json()["type"]
        == {
            401: "urn:autoq:problem:unauthorized",
            403: "urn:autoq:problem:forbidden",
        }[refusal]
    )
    assert ("www-authenticate" in response.headers) == (refusal == 401)


@pytest.mark.parametrize(("method", "template"), sorted(SCOPES))
def test_public_is_what_needs_no_token_and_nothing_else(method: str, template: str) -> None:
    assert is_public(template) == (SCOPES[method, template] is EVERYBODY)


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/v1",
        "/v1/",
        "/docs",
        "/redoc",
        "/admin",
        "/v1/health/",
        "/v1//studies",
        "/v2/me",
    ],
)
def test_what_is_no_route_needs_a_token_too(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_public_paths_are_only_read_without_a_token(client: TestClient, method: str) -> None:
    assert client.request(method, "/studies/x").status_code == 401


def test_keeping_a_plan_takes_more_than_reading(client: TestClient, tokens: dict[str, str]) -> None:
    body = {"effective_bits": 6.0, "keep": True}
    at = "/v1/studies/there/plans"
    reading = client.post(at, json=body, headers=header_of("read", tokens))
    assert reading.status_code == 403
    unkept = client.post(at, json={**body, "keep": False}, headers=header_of("read", tokens))
    assert unkept.status_code == 200, unkept.text
    kept = client.post(at, json=body, headers=header_of("run", tokens))
    assert kept.status_code == 200, kept.text
    assert kept.json()["id"] is not None


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic {}",
        "{}",
        "Token {}",
        "Bearer {}x",
        "Bearer x{}",
        "Bearer {} {}",
        "Bearer {},Bearer {}",
        "Bearer " + "A" * 10_000,
    ],
)
def test_a_token_counts_only_as_it_was_printed(
    client: TestClient, tokens: dict[str, str], failures_forgotten: None, header: str
) -> None:
    given = header.replace("{}", tokens["admin"])
    assert client.get("/v1/me", headers={"Authorization": given}).status_code == 401


def test_the_scheme_is_read_in_any_case(client: TestClient, tokens: dict[str, str]) -> None:
    response = client.get("/v1/me", headers={"Authorization": f"bEARER {tokens['read']}"})
    assert response.json()["name"] == "the-read-token"


def test_two_authorizations_are_none(client: TestClient, tokens: dict[str, str]) -> None:
    twice = [("Authorization", f"Bearer {tokens[scope]}") for scope in ("read", "admin")]
    assert client.get("/v1/me", headers=twice).status_code == 401


@pytest.mark.parametrize("where", ["query", "cookie", "body"])
def test_tokens_elsewhere_are_not_looked_for(
    client: TestClient, tokens: dict[str, str], where: str
) -> None:
    token = tokens["admin"]
    sent = {
        "query": {"url": f"/v1/me?token={token}&access_token={token}"},
        "cookie": {"url": "/v1/me", "headers": {"Cookie": f"token={token}"}},
        "body": {"url": "/v1/studies", "method": "POST", "json": {"token": token}},
    }[where]
    response = client.request(**{"method": "GET", **sent})
    assert response.status_code == 401
    assert "set-cookie" not in response.headers


def test_tokens_are_made_and_revoked_while_the_server_runs(
    client: TestClient, place: Path, failures_forgotten: None
) -> None:
    token = create_token(place / "tokens", "for-a-while", Scope.READ)
    header = {"Authorization": f"Bearer {token}"}
    assert client.get("/v1/me", headers=header).json()["name"] == "for-a-while"
    revoke_token(place / "tokens", "for-a-while")
    assert client.get("/v1/me", headers=header).status_code == 401


def test_a_token_file_that_others_can_read_lets_nobody_in(
    client: TestClient, place: Path, tokens: dict[str, str], failures_forgotten: None
) -> None:
    header = header_of("admin", tokens)
    assert client.get("/v1/me", headers=header).status_code == 200
    (place / "tokens").chmod(0o644)
    try:
        assert client.get("/v1/me", headers=header).status_code == 401
    finally:
        (place / "tokens").chmod(0o600)
    assert client.get("/v1/me", headers=header).status_code == 200


def test_wrong_tokens_are_slowed_down_and_right_ones_from_the_same_address_are_not(
    client: TestClient, tokens: dict[str, str], failures_forgotten: None
) -> None:
    statuses = [
        client.get("/v1/me", headers=header_of("wrong", tokens)).status_code for _ in range(40)
    ]
    assert statuses[:20] == [401] * 20, "a few mistakes are only mistakes"
    assert statuses[-1] == 429
    slowed = client.get("/v1/me", headers=header_of("wrong", tokens))
    assert int(slowed.headers["retry-after"]) >= 1
    assert client.get("/v1/me", headers=header_of("read", tokens)).status_code == 200


def test_without_a_token_file_everybody_here_may_do_everything(tmp_path: Path) -> None:
    app = create_app(ServiceSettings(store=f"sqlite:///{tmp_path / 'store.db'}"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        me = client.get("/v1/me").json()
        assert (me["name"], me["scope"], me["authentication"]) == ("local", "admin", False)
        for method, template in sorted(SCOPES):
            response = ask(client, method, template, {})
            assert response.status_code not in (401, 403), (method, template, response.text)
