"""The API on a real PostgreSQL: what SQLite bears, and what another database might not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from autoq import wire
from autoq.service.settings import ServiceSettings
from autoq.service.web.app import create_app
from autoq.testing.postgresql import NoServerError, postgresql_url
from autoq.testing.synthetic_study import add_synthetic_study

pytestmark = pytest.mark.slow

LARGEST = 2**63 - 1


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    pytest.importorskip("psycopg")
    try:
        with postgresql_url() as url:
            app = create_app(ServiceSettings(store=url, rate_limit=None))
            for number in range(3):
                add_synthetic_study(
                    app.state.context.store, groups=8, formats=3, name=f"study {number}"
                )
            with TestClient(
                app, base_url="http://127.0.0.1", raise_server_exceptions=False
            ) as made:
                yield made
    except NoServerError as error:
        pytest.skip(str(error))


def test_studies_plans_and_tables(client: TestClient) -> None:
    page = wire.StudyPage.model_validate_json(client.get("/v1/studies?limit=2").content)
    rest = client.get("/v1/studies", params={"cursor": page.next_cursor}).json()["items"]
    names = [entry.name for entry in page.items] + [entry["name"] for entry in rest]
    assert sorted(names) == ["study 0", "study 1", "study 2"]
    for path in ("", "/sensitivity", "/frontier", "/trials", "/exports", "/report", "/summary"):
        assert client.get(f"/v1/studies/study%201{path}").status_code == 200
    kept = client.post("/v1/studies/study%201/plans", json={"effective_bits": 6.0, "keep": True})
    assert client.get(f"/v1/studies/study%201/plans/{kept.json()['id']}").status_code == 200
    assert client.delete("/v1/studies/study%202").status_code == 204


def test_jobs_and_their_events(client: TestClient) -> None:
    headers = {"idempotency-key": "one"}
    body = {"checkpoint": "bundled"}
    first = client.post("/v1/verifications", json=body, headers=headers)
    again = client.post("/v1/verifications", json=body, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json()["id"] == again.json()["id"]
    at = f"/v1/jobs/{first.json()['id']}"
    assert client.post(f"{at}/cancel").status_code == 202
    assert client.get(f"{at}/events").text.count("event: status") == 2
    assert client.get("/v1/jobs?status=cancelled").json()["items"][0]["id"] == first.json()["id"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/studies/a%00b", 404),
        ("/v1/studies?q=%00", 422),
        ("/v1/studies?model=%00", 422),
        ("/v1/jobs?study=%00", 422),
        ("/v1/jobs/%00", 422),
        (f"/v1/studies/study%201/plans/{LARGEST}", 404),
        (f"/v1/studies/study%201/plans/{LARGEST + 1}", 422),
        (f"/v1/studies/study%201/summary?plan={LARGEST}", 404),
        ("/v1/studies?q=%25_%5C", 200),
    ],
)
def test_what_the_database_cannot_hold_is_no_failure(
    client: TestClient, path: str, status: int
) -> None:
    assert client.get(path).status_code == status
