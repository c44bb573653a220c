"""Every route of the API: what it answers, and how it refuses."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from autoq import wire
from autoq.api.config import ScoringConfig
from autoq.bundled import model_path
from autoq.errors import StoreError
from autoq.formats import FORMATS
from autoq.service.settings import ServiceSettings
from autoq.service.web.app import create_app
from autoq.studies import JobEvent, StudyRecord, StudyStore
from autoq.testing.synthetic_study import add_synthetic_study

NAME = "a/b c%41ü"
AT = f"/v1/studies/{quote(NAME, safe='')}"
SEARCH = {"model": "bundled", "effective_bits": 5.0}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder: Path = tmp_path_factory.mktemp("routes")
    (folder / "exports").mkdir()
    shutil.copytree(model_path(), folder / "models" / "tiny")
    made = create_app(
        ServiceSettings(
            store=f"sqlite:///{folder / 'store.db'}",
            exports=folder / "exports",
            models=(folder / "models",),
            rate_limit=None,
        )
    )
    add_synthetic_study(made.state.context.store, groups=12, formats=3, name=NAME)
    yield made


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def store(app: FastAPI) -> StudyStore:
    found: StudyStore = app.state.context.store
    return found


def refused(response: Any, status: int, kind: str) -> wire.Problem:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == wire.PROBLEM_MEDIA_TYPE
    problem = wire.Problem.model_validate_json(response.content)
    assert problem.type == f"urn:autoq:problem:{kind}"
    assert problem.status == status
    return problem


def job_of(response: Any, status: int = 202) -> wire.Job:
    assert response.status_code == status, response.text
    return wire.Job.model_validate_json(response.content)


class TestService:
    def test_health_needs_nothing_and_readiness_a_worker(self, client: TestClient) -> None:
        assert client.get("/v1/health").json()["status"] == "ok"
        response = client.get("/v1/ready")
        assert response.status_code == 503
        assert response.json()["store"] is True
        assert response.json()["workers"] == 0

    def test_ready_once_a_worker_waits(self, client: TestClient, store: StudyStore) -> None:
        store.note_runner("one")
        try:
            response = client.get("/v1/ready")
            assert (response.status_code, response.json()["workers"]) == (200, 1)
        finally:
            store.forget_runner("one")

    def test_without_tokens_everybody_here_may_do_everything(self, client: TestClient) -> None:
        identity = wire.Identity.model_validate_json(client.get("/v1/me").content)
        assert (identity.scope, identity.authentication) == (wire.Scope.ADMIN, False)

    def test_formats_are_those_of_the_registry(self, client: TestClient) -> None:
        entries = [wire.FormatEntry(**entry) for entry in client.get("/v1/formats").json()]
        assert [entry.name for entry in entries] == list(FORMATS)
        known = {entry.name: entry for entry in entries}
        assert known["nvfp4"].effective_bits == 4.5
        assert known["fp8"].containers == ("modelopt", "compressed-tensors")

    def test_targets_name_what_runs_there(self, client: TestClient) -> None:
        entries = {entry["target"]: entry for entry in client.get("/v1/targets").json()}
        assert "fp8" in entries["vllm:h200"]["formats"]
        assert "none" not in entries["vllm:h200"]["formats"]

    def test_models_are_the_bundled_one_and_those_below_roots(self, client: TestClient) -> None:
        paths = [entry["path"] for entry in client.get("/v1/models").json()]
        assert paths == ["bundled", "models/tiny"]

    def test_the_schema_is_complete(self, client: TestClient) -> None:
        document = client.get("/openapi.json").json()
        operations = [
            (path, method, operation)
            for path, methods in document["paths"].items()
            for method, operation in methods.items()
        ]
        ids = [operation["operationId"] for _, _, operation in operations]
        assert len(set(ids)) == len(ids) >= 30
        for path, method, operation in operations:
            assert operation["summary"], path
            assert operation["tags"], path
            if path not in ("/v1/health", "/v1/ready"):
                for status in ("401", "403", "422", "429", "500", "503"):
                    content = operation["responses"][status]["content"]
                    assert list(content) == [wire.PROBLEM_MEDIA_TYPE], (path, status)
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]
                assert content["examples"], (path, method)
        assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"

    def test_no_page_of_other_hosts_documents_it(self, client: TestClient) -> None:
        for path in ("/docs", "/redoc"):
            refused(client.get(path), 404, "not-found")

    def test_addresses_and_methods_that_are_none_are_problems(self, client: TestClient) -> None:
        refused(client.get("/v1/nothing"), 404, "not-found")
        unread = client.post(f"{AT}/plans", content=b"x", headers={"content-type": "text/plain"})
        assert refused(unread, 415, "media-type").instance == f"{AT}/plans"
        put = client.put("/v1/studies", json={})
        refused(put, 405, "method")
        assert put.headers["allow"] == "GET, HEAD, POST"
        assert client.patch(AT).headers["allow"] == "DELETE, GET, HEAD"
        assert client.get(f"{AT}/cancel").headers["allow"] == "POST"
        assert client.put("/compare").headers["allow"] == "GET, HEAD"

    @pytest.mark.parametrize(
        "path", ["/v1/health", "/v1/studies", AT, f"{AT}/sensitivity", "/", "/v1/nothing"]
    )
    def test_head_is_get_without_its_content(self, client: TestClient, path: str) -> None:
        whole, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers == whole.headers
        assert int(head.headers["content-length"]) > 0

    def test_head_is_counted_as_such(self, client: TestClient) -> None:
        client.head("/v1/formats")
        counted = 'autoq_requests_total{method="HEAD",route="/v1/formats",status="200"} 1.0'
        assert counted in client.get("/metrics").text

    def test_metrics_have_templates_and_never_names(self, client: TestClient) -> None:
        client.get(f"{AT}/plans/1")
        client.get("/v1/secretpath")
        text = client.get("/metrics").text
        assert 'route="/v1/studies/{study}/plans/{plan}",status="200"' in text
        assert 'autoq_jobs{status="queued"}' in text
        assert 'autoq_study_tables_total{cache="hit"}' in text
        assert "autoq_process_resident_bytes" in text
        assert "secretpath" not in text
        assert "a/b" not in text


class TestStudies:
    def test_the_list_has_it(self, client: TestClient) -> None:
        page = wire.StudyPage.model_validate_json(client.get("/v1/studies").content)
        assert NAME in [entry.name for entry in page.items]

    @pytest.mark.parametrize(
        ("query", "found"),
        [
            ({"q": "B C%41"}, True),
            ({"q": "nothing of this"}, False),
            ({"status": "done"}, True),
            ({"status": "failed"}, False),
            ({"model": "no model"}, False),
        ],
    )
    def test_filters(self, client: TestClient, query: dict[str, str], found: bool) -> None:
        page = wire.StudyPage.model_validate_json(client.get("/v1/studies", params=query).content)
        assert (NAME in [entry.name for entry in page.items]) is found

    def test_all_there_is_to_see_of_one(self, client: TestClient) -> None:
        detail = wire.StudyDetail.model_validate_json(client.get(AT).content)
        assert (detail.name, detail.groups, detail.status) == (NAME, 12, "done")
        table = wire.Sensitivities.model_validate_json(client.get(f"{AT}/sensitivity").content)
        assert len(table.groups) == len(table.scores) == 12
        frontier = wire.Frontier.model_validate_json(
            client.get(f"{AT}/frontier", params={"points": 5}).content
        )
        bits = [point.effective_bits for point in frontier.points]
        assert bits == sorted(bits)
        trials = wire.TrialPage.model_validate_json(client.get(f"{AT}/trials").content)
        assert trials.total == 0
        assert len(client.get(f"{AT}/exports").json()) == 1
        plan = wire.PlanReply.model_validate_json(client.get(f"{AT}/plans/1").content)
        assert len(plan.assignment) == 12
        assert client.get(f"{AT}/summary").json()["study"] == NAME

    def test_downloads_are_files(self, client: TestClient) -> None:
        plan = client.get(f"{AT}/plans/1/download")
        assert plan.json() == client.get(f"{AT}/plans/1").json()
        assert 'filename="a-b-c-41--plan-1.json"' in plan.headers["content-disposition"]
        report = client.get(f"{AT}/report")
        assert report.headers["content-type"].startswith("text/html")
        assert report.headers["content-disposition"].startswith("attachment")
        assert report.text.startswith("<!DOCTYPE html>")

    def test_no_reply_shows_where_things_lie(self, client: TestClient, store: StudyStore) -> None:
        folder = str(store.file.parent) if store.file is not None else ""
        assert len(folder) > 5
        for path in ("", "/exports", "/summary", "/report"):
            assert folder not in client.get(f"{AT}{path}").text

    @pytest.mark.parametrize("part", ["sensitivity", "frontier"])
    def test_tables_are_sent_once(self, client: TestClient, part: str) -> None:
        first = client.get(f"{AT}/{part}")
        tag = first.headers["etag"]
        again = client.get(f"{AT}/{part}", headers={"if-none-match": f'"other", {tag}'})
        assert (again.status_code, again.content) == (304, b"")
        document = client.get("/openapi.json").json()
        declared = document["paths"][f"/v1/studies/{{study}}/{part}"]["get"]["responses"]
        assert all("ETag" in declared[status]["headers"] for status in ("200", "304"))
        other = client.get(f"{AT}/{part}", headers={"if-none-match": '"other"'})
        assert (other.status_code, other.content) == (200, first.content)

    def test_large_replies_are_compressed(self, client: TestClient) -> None:
        response = client.get(f"{AT}/sensitivity", headers={"accept-encoding": "gzip"})
        assert response.headers["content-encoding"] == "gzip"
        plain = client.get(f"{AT}/sensitivity", headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert plain.json() == response.json()

    @pytest.mark.parametrize(
        "path",
        ["", "/frontier", "/sensitivity", "/trials", "/exports", "/report", "/events", "/plans/1"],
    )
    @pytest.mark.parametrize("name", ["none", "a%2Fb", "1", "a%00b", "%2F"])
    def test_names_of_nothing_are_not_found(self, client: TestClient, path: str, name: str) -> None:
        refused(client.get(f"/v1/studies/{name}{path}"), 404, "not-found")

    def test_plans_of_others_are_not_found(self, client: TestClient) -> None:
        refused(client.get(f"{AT}/plans/99"), 404, "not-found")
        refused(client.get(f"{AT}/plans/{10**30}"), 422, "input")

    def test_what_is_not_computed_yet_is_not_finished(
        self, client: TestClient, store: StudyStore
    ) -> None:
        begin_study(store, "begun")
        assert client.get("/v1/studies/begun").json()["status"] == "todo"
        for path in ("frontier", "sensitivity", "report"):
            refused(client.get(f"/v1/studies/begun/{path}"), 409, "not-finished")
        refused(client.post("/v1/studies/begun/plans", json={}), 409, "not-finished")

    def test_a_study_that_nobody_works_on_is_deleted(
        self, client: TestClient, store: StudyStore
    ) -> None:
        begin_study(store, "to go")
        assert client.delete("/v1/studies/to%20go").status_code == 204
        refused(client.get("/v1/studies/to%20go"), 404, "not-found")
        refused(client.delete("/v1/studies/to%20go"), 404, "not-found")

    def test_a_study_that_goes_meanwhile_is_not_there(
        self, client: TestClient, store: StudyStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = begin_study(store, "going")
        delete = StudyStore.delete_study

        def too_late(self: StudyStore, study_id: int) -> None:
            delete(self, study_id)
            delete(self, study_id)

        monkeypatch.setattr(StudyStore, "delete_study", too_late)
        problem = refused(client.delete("/v1/studies/going"), 404, "not-found")
        assert f"no study has id {study.id}" in problem.detail

    def test_a_study_with_a_job_stays(self, client: TestClient, store: StudyStore) -> None:
        begin_study(store, "busy")
        job, _ = store.add_job(kind="measure", request={}, created_by="a", study="busy")
        refused(client.delete("/v1/studies/busy"), 409, "conflict")
        store.request_cancel(job.id)
        assert client.delete("/v1/studies/busy").status_code == 204

    def test_a_study_with_a_lease_stays(self, client: TestClient, store: StudyStore) -> None:
        study = begin_study(store, "held")
        with store.lease(study.id):
            refused(client.delete("/v1/studies/held"), 409, "study-locked")


def begin_study(store: StudyStore, name: str) -> StudyRecord:
    """A study of the bundled model of which nothing is computed."""
    return store.create_or_get(
        name=name,
        key=name,
        model_path=str(model_path()),
        fingerprint="f",
        architecture="LlamaForCausalLM",
        configuration=ScoringConfig().to_json(),
        versions={},
        seed=0,
    )


class TestPlans:
    def test_none_of_the_budgets_is_the_last_plan(self, client: TestClient) -> None:
        plan = wire.PlanReply.model_validate_json(client.post(f"{AT}/plans", json={}).content)
        assert (plan.id, plan.label) == (1, "4.8 bits")

    def test_any_budget_is_answered_and_only_what_is_to_be_kept_is(
        self, client: TestClient
    ) -> None:
        body: dict[str, Any] = {"effective_bits": 6.0}
        passing = wire.PlanReply.model_validate_json(client.post(f"{AT}/plans", json=body).content)
        assert passing.id is None
        assert passing.effective_bits <= 6.0
        kept = wire.PlanReply.model_validate_json(
            client.post(f"{AT}/plans", json={**body, "keep": True}).content
        )
        assert kept.id is not None
        assert kept.assignment == passing.assignment
        shown = client.get(f"{AT}/plans/{kept.id}").json()
        assert shown["assignment"] == dict(kept.assignment)

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            ({"effective_bits": 1.0}, "budget-infeasible"),
            ({"max_gb": 1e-6}, "resource-infeasible"),
            ({"max_kl": 1e-12, "effective_bits": 5.0}, "quality-infeasible"),
            ({"max_latency_ms": 1.0}, "input"),
            ({"max_latency_ms": 1.0, "gpu": "h2000"}, "unknown-name"),
            ({"effective_bits": -1}, "input"),
            ({"effective_bits": "1e400"}, "input"),
            ({"rules": ["nothing"]}, "input"),
            ({"rules": ["*=fp9"]}, "unknown-name"),
            ({"colour": 1}, "input"),
            ([], "input"),
        ],
    )
    def test_what_cannot_be_is_refused_with_its_kind(
        self, client: TestClient, body: Any, kind: str
    ) -> None:
        refused(client.post(f"{AT}/plans", json=body), 422, kind)

    def test_a_budget_outside_tells_what_there_is(self, client: TestClient) -> None:
        problem = refused(
            client.post(f"{AT}/plans", json={"effective_bits": 1.0}), 422, "budget-infeasible"
        )
        frontier = client.get(f"{AT}/frontier").json()
        assert problem.limits == {
            "floor": frontier["budget_floor"],
            "ceiling": frontier["budget_ceiling"],
        }

    def test_fields_that_are_wrong_are_named(self, client: TestClient) -> None:
        problem = refused(client.post(f"{AT}/plans", json={"max_gb": "much"}), 422, "input")
        assert [error["where"] for error in problem.errors] == ["body.max_gb"]

    def test_readers_at_once_get_what_one_gets(self, client: TestClient) -> None:
        bodies = [{"effective_bits": 4.5 + 0.25 * (number % 8)} for number in range(48)]

        def asked(body: dict[str, float]) -> tuple[int, dict[str, str]]:
            response = client.post(f"{AT}/plans", json=body)
            return response.status_code, response.json()["assignment"]

        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(asked, bodies))
        assert together == [asked(body) for body in bodies]


class TestWork:
    def test_a_search_is_queued_and_can_be_looked_at(self, client: TestClient) -> None:
        response = client.post("/v1/studies", json={**SEARCH, "name": "mine"})
        job = job_of(response)
        assert (job.kind, job.status, job.study) == ("search", "queued", "mine")
        assert response.headers["location"] == f"/v1/jobs/{job.id}"
        assert job_of(client.get(f"/v1/jobs/{job.id}"), 200) == job

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            ({}, "input"),
            ({"model": "nowhere/x"}, "model"),
            ({"model": "/etc"}, "model"),
            ({"model": "../x"}, "model"),
            ({**SEARCH, "calibration_data": "x/y"}, "data"),
            ({**SEARCH, "export": "elsewhere/x"}, "export"),
            ({**SEARCH, "formats": ["fp9"]}, "unknown-name"),
            ({**SEARCH, "kv_formats": ["fp9"]}, "unknown-name"),
            ({**SEARCH, "target": "vllm:toaster"}, "unknown-name"),
            ({**SEARCH, "target": "vllm"}, "input"),
            ({**SEARCH, "container": "box"}, "input"),
            ({**SEARCH, "estimator": "fisher"}, "unknown-name"),
            ({**SEARCH, "calibration": "wishful"}, "input"),
            ({**SEARCH, "name": "a b"}, "input"),
            ({**SEARCH, "device": "cuda:x"}, "input"),
            ({**SEARCH, "trust_remote_code": True}, "input"),
        ],
    )
    def test_searches_that_cannot_work_are_refused_at_once(
        self, client: TestClient, body: dict[str, Any], kind: str
    ) -> None:
        refused(client.post("/v1/studies", json=body), 422, kind)

    def test_the_same_key_and_body_is_the_same_job(self, client: TestClient) -> None:
        headers = {"idempotency-key": "k 1"}
        first = job_of(client.post("/v1/studies", json=SEARCH, headers=headers))
        again = job_of(client.post("/v1/studies", json=SEARCH, headers=headers), 200)
        assert again.id == first.id
        other = {**SEARCH, "effective_bits": 6.0}
        refused(
            client.post("/v1/studies", json=other, headers=headers), 409, "idempotency-conflict"
        )
        assert job_of(client.post("/v1/studies", json=SEARCH)).id != first.id

    @pytest.mark.parametrize("key", ["x" * 201, "a\tb"])
    def test_keys_that_are_none_are_refused(self, client: TestClient, key: str) -> None:
        response = client.post("/v1/studies", json=SEARCH, headers={"idempotency-key": key})
        refused(response, 422, "input")

    def test_the_same_key_on_many_connections_makes_one_job(self, client: TestClient) -> None:
        def send(_: int) -> str:
            headers = {"idempotency-key": "at once"}
            return str(client.post("/v1/studies", json=SEARCH, headers=headers).json()["id"])

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(send, range(24)))) == 1

    def test_work_on_a_study(self, client: TestClient, store: StudyStore) -> None:
        begin_study(store, "worked")
        refused(client.post("/v1/studies/worked/cancel"), 409, "conflict")
        at = "/v1/studies/worked"
        job = job_of(client.post(f"{at}/refinements", json={"trials": 3}))
        assert (job.kind, job.study, dict(job.request)) == ("refine", "worked", {"trials": 3})
        export = job_of(client.post(f"{at}/exports", json={"output": "exports/new"}))
        assert export.kind == "export"
        assert client.get(at).json()["job"] == export.id
        assert job_of(client.post(f"{at}/cancel")).status == "cancelled"
        refused(client.post(f"{at}/cancel"), 409, "conflict")
        assert job_of(client.post(f"{at}/resume")).status == "queued"
        refused(client.post(f"{at}/resume"), 409, "conflict")

    @pytest.mark.parametrize(
        ("path", "body", "kind"),
        [
            ("exports", {"output": "exports"}, "export"),
            ("exports", {"output": "exports/../../x"}, "export"),
            ("exports", {"output": "exports/x", "container": "box"}, "input"),
            ("exports", {"output": "exports/x", "plan": 1, "effective_bits": 5}, "input"),
            ("exports", {"output": "exports/x", "plan": 10**30}, "unknown-name"),
            ("refinements", {"trials": 0}, "input"),
            ("measurements", {"plan": 99}, "unknown-name"),
        ],
    )
    def test_work_that_cannot_be_done_is_refused_at_once(
        self, client: TestClient, store: StudyStore, path: str, body: dict[str, Any], kind: str
    ) -> None:
        begin_study(store, "worked")
        refused(client.post(f"/v1/studies/worked/{path}", json=body), 422, kind)

    def test_work_on_what_is_not_there(self, client: TestClient) -> None:
        body = {"output": "exports/x"}
        refused(client.post("/v1/studies/none/exports", json=body), 404, "not-found")
        refused(client.post("/v1/studies/none/cancel"), 404, "not-found")

    def test_verification(self, client: TestClient) -> None:
        job = job_of(client.post("/v1/verifications", json={"checkpoint": "bundled"}))
        assert (job.kind, job.study) == ("verify", None)
        refused(client.post("/v1/verifications", json={"checkpoint": "exports/no"}), 422, "model")


class TestJobs:
    def test_unknown_ones_are_not_found(self, client: TestClient) -> None:
        for path in ("", "/events", "/log"):
            refused(client.get(f"/v1/jobs/0123{path}"), 404, "not-found")
        for path in ("/cancel", "/resume"):
            refused(client.post(f"/v1/jobs/0123{path}"), 404, "not-found")
        mistyped = refused(client.get("/v1/jobs/No%20such"), 404, "not-found")
        assert mistyped.detail.startswith("no job has id 'No such'")

    def test_cancelled_and_queued_again(self, client: TestClient, store: StudyStore) -> None:
        job, _ = store.add_job(kind="verify", request={"checkpoint": "a"}, created_by="x")
        at = f"/v1/jobs/{job.id}"
        refused(client.post(f"{at}/resume"), 409, "conflict")
        assert job_of(client.post(f"{at}/cancel")).status == "cancelled"
        refused(client.post(f"{at}/cancel"), 409, "conflict")
        assert job_of(client.post(f"{at}/resume")).status == "queued"

    def test_pages_neither_repeat_nor_hide_while_jobs_come(
        self, client: TestClient, store: StudyStore
    ) -> None:
        ids = [
            store.add_job(kind="verify", request={}, created_by="x", study="paged")[0].id
            for _ in range(7)
        ]
        seen: list[str] = []
        cursor: str | None = None
        while True:
            query: dict[str, Any] = {"limit": 3, "study": "paged"}
            if cursor is not None:
                query["cursor"] = cursor
            page = wire.JobPage.model_validate_json(client.get("/v1/jobs", params=query).content)
            seen += [job.id for job in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
            store.add_job(kind="verify", request={}, created_by="x", study="paged")
        assert seen == ids[::-1]

    def test_filters(self, client: TestClient, store: StudyStore) -> None:
        job, _ = store.add_job(kind="refine", request={}, created_by="x", study="filtered")
        store.request_cancel(job.id)
        for query, found in (
            ({"kind": "refine"}, True),
            ({"kind": "export"}, False),
            ({"status": "cancelled"}, True),
            ({"status": "done"}, False),
        ):
            items = client.get("/v1/jobs", params={"study": "filtered", **query}).json()["items"]
            assert (job.id in [item["id"] for item in items]) is found
        refused(client.get("/v1/jobs", params={"status": "asleep"}), 422, "input")

    def test_cursors_of_other_lists_are_refused(
        self, client: TestClient, store: StudyStore
    ) -> None:
        for _ in range(2):
            store.add_job(kind="verify", request={}, created_by="x", study="cursed")
        query = {"limit": 1, "study": "cursed"}
        cursor = client.get("/v1/jobs", params=query).json()["next_cursor"]
        assert cursor
        for path in ("/v1/studies", f"{AT}/trials"):
            refused(client.get(path, params={"cursor": cursor}), 422, "input")

    def test_what_a_job_told_is_streamed_whole_and_from_any_event_on(
        self, client: TestClient, store: StudyStore
    ) -> None:
        job = told_job(store)
        lines = client.get(f"/v1/jobs/{job}/events").text
        events = events_in(lines)
        assert [event.kind for event in events] == ["status", "status", "note", "log", "status"]
        assert events[-1].data == {"status": "done"}
        third = events[2].id
        for response in (
            client.get(f"/v1/jobs/{job}/events", params={"after": third}),
            client.get(f"/v1/jobs/{job}/events", headers={"last-event-id": str(third)}),
        ):
            assert response.headers["content-type"].startswith("text/event-stream")
            assert "content-encoding" not in response.headers
            assert events_in(response.text) == events[3:]
        refused(client.get(f"/v1/jobs/{job}/events", headers={"last-event-id": "x"}), 422, "input")

    def test_a_log_has_no_folders_of_the_server(
        self, client: TestClient, store: StudyStore
    ) -> None:
        response = client.get(f"/v1/jobs/{told_job(store)}/log")
        assert response.headers["content-type"].startswith("text/plain")
        assert response.text == "reading model.safetensors\n"

    def test_what_happens_while_somebody_listens_is_heard(
        self, client: TestClient, store: StudyStore
    ) -> None:
        job, _ = store.add_job(kind="verify", request={}, created_by="x")
        heard: list[str] = []

        def listen() -> None:
            heard.append(client.get(f"/v1/jobs/{job.id}/events").text)

        listener = threading.Thread(target=listen)
        listener.start()
        store.request_cancel(job.id)
        listener.join(120)
        assert [event.data["status"] for event in events_in(heard[0])] == ["queued", "cancelled"]


def told_job(store: StudyStore) -> str:
    """A job that is done."""
    while (claim := store.claim_job()) is not None:
        store.finish_job(claim, {})
    job, _ = store.add_job(kind="verify", request={}, created_by="x")
    claim = store.claim_job()
    assert claim is not None
    assert claim.job.id == job.id
    log = {"text": "reading /srv/models/a/model.safetensors", "stream": "stdout"}
    store.append_events(
        claim,
        [JobEvent(kind="note", data={"text": "a note"}), JobEvent(kind="log", data=log)],
    )
    store.finish_job(claim, {"ok": True})
    return job.id


def events_in(text: str) -> list[wire.Event]:
    """What a client of server-sent events reads; comments are passed over."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            event = wire.Event.model_validate_json(fields["data"])
            assert fields["id"] == str(event.id)
            assert fields["event"] == event.kind
            events.append(event)
    return events


class TestPage:
    @pytest.mark.parametrize("path", ["/", "/studies/any/thing", "/jobs/0123", "/compare"])
    def test_every_address_of_the_page_is_the_page(self, client: TestClient, path: str) -> None:
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert "script-src 'self'" in response.headers["content-security-policy"]

    def test_charts_come_from_the_installed_package_compressed_and_once(
        self, client: TestClient
    ) -> None:
        response = client.get("/assets/plotly.min.js", headers={"accept-encoding": "gzip"})
        assert response.headers["content-encoding"] == "gzip"
        assert "plotly.js v" in response.text[:200]
        tag = response.headers["etag"]
        again = client.get("/assets/plotly.min.js", headers={"if-none-match": tag})
        assert (again.status_code, again.content) == (304, b"")

    @pytest.mark.parametrize(
        "name", ["nothing.js", "../app.py", "%2e%2e/app.py", "..%2findex.html", "%2Fetc%2Fpasswd"]
    )
    def test_nothing_else_is_served(self, client: TestClient, name: str) -> None:
        refused(client.get(f"/assets/{name}"), 404, "not-found")


class TestUnexpected:
    def test_what_nobody_foresaw_says_nothing_of_the_inside(
        self, client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError("a secret")

        monkeypatch.setattr(type(app.state.context.store), "job", broken)
        problem = refused(client.get("/v1/jobs/0123"), 500, "internal")
        assert "secret" not in problem.detail

    def test_a_store_that_is_away_is_said(
        self, client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(*_: object, **__: object) -> None:
            raise StoreError("postgresql://me:secret@host/db does not answer")

        monkeypatch.setattr(type(app.state.context.store), "jobs", away)
        problem = refused(client.get("/v1/jobs"), 503, "store")
        assert problem.detail == "postgresql://me:***@host/db does not answer"
