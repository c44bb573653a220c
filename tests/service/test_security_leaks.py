"""What leaves the service: no folder of the server's, no password, no token, no markup."""

from __future__ import annotations

import logging
import logging.config
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from autoq.service.guard.redaction import (
    RedactingFilter,
    log_configuration,
    redacted,
    secrets_of,
)
from autoq.service.settings import ServiceSettings
from autoq.service.web.app import create_app
from autoq.studies import JobEvent, StudyStore, study_key
from autoq.testing.synthetic_study import add_synthetic_study

HOSTILE = """<script>alert("1")</script> <img src=x onerror='x'> {{7*7}} </style>"""
PASSWORD = "hunter2:with%40signs"
STORE_URL = f"postgresql+psycopg://autoq:{PASSWORD}@database.example:5432/autoq"
SECRET_PLACE = "secret-place"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name no reply may have; not a path of the test that a reply could have."""
    folder: Path = tmp_path_factory.mktemp("leaks") / SECRET_PLACE
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "exports").mkdir()
    return folder


@pytest.fixture(scope="module")
def app(place: Path) -> FastAPI:
    """A service whose study and jobs name the server's folders wherever a text may stand."""
    made = create_app(
        ServiceSettings(
            store=f"sqlite:///{place / 'store.db'}",
            models=(place / "models",),
            exports=place / "exports",
            rate_limit=None,
        )
    )
    store = made.state.context.store
    _add_study(store, place)
    told = (
        f"cannot read {place}/models/mine/config.json of {STORE_URL}\n"
        f"id: 99\nevent: status\ndata: {{}}\n\n{HOSTILE} \ud800 \x1b]0;x\x07"
    )
    store.add_job(kind="search", request={"model": "models/mine"}, created_by="x", study=HOSTILE)
    claim = store.claim_job()
    events = [
        JobEvent(kind="note", data={"text": told}),
        JobEvent(kind="log", data={"text": told, "stream": "stderr"}),
    ]
    store.append_events(claim, events)
    problem = {"type": "urn:autoq:problem:model", "title": "x", "status": 422, "detail": told}
    store.fail_job(claim, problem)
    return made


def _add_study(store: StudyStore, place: Path) -> None:
    """A study whose model, data and export lie in folders of this machine."""
    create, begin_export = store.create_or_get, store.begin_export

    def create_there(**study: Any) -> Any:
        configuration = {
            **study.pop("configuration"),
            "calibration_data": str(place / "elsewhere" / "text.txt"),
        }
        where = {"model_path": str(place / "models" / "mine"), "configuration": configuration}
        key = study_key(configuration, study["fingerprint"])
        return create(**{**study, **where, "key": key})

    def begin_there(study: int, **export: Any) -> int:
        return begin_export(study, **{**export, "path": str(place / "exports" / "a")})

    with (
        mock.patch.object(store, "create_or_get", create_there),
        mock.patch.object(store, "begin_export", begin_there),
    ):
        add_synthetic_study(store, groups=8, formats=3, name=HOSTILE)


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as made:
        yield made


def everything(client: TestClient) -> dict[str, str]:
    """Address -> reply, of everything that can be looked at, refusals among them."""
    study = f"/v1/studies/{quote(HOSTILE, safe='')}"
    job = client.get("/v1/jobs?status=failed").json()["items"][0]["id"]
    asked = [
        ("GET", path)
        for path in (
            *("/v1/models", "/v1/me", "/v1/formats", "/v1/targets", "/v1/ready", "/metrics"),
            *("/openapi.json", "/v1/studies", "/v1/studies?model=models/mine", "/v1/jobs"),
            *(f"{study}{part}" for part in ("", "/frontier", "/sensitivity", "/trials")),
            *(f"{study}{part}" for part in ("/summary", "/exports", "/report", "/plans/1")),
            *(f"{study}/plans/1/download", f"/v1/jobs/{job}", f"/v1/jobs/{job}/log"),
            f"/v1/jobs/{job}/events",
        )
    ]
    bodies = {
        "/v1/studies": {"model": "models/mine"},
        "/v1/verifications": {"checkpoint": "exports/none"},
        f"{study}/plans": {"effective_bits": 5.0},
        f"{study}/exports": {"output": "exports/../x"},
        f"{study}/refinements": {"trials": 1},
        f"{study}/measurements": {"plan": 1},
    }
    replies = {path: client.request(method, path) for method, path in asked}
    assert [r.status_code for p, r in replies.items() if p != "/v1/ready"] == [200] * (
        len(replies) - 1
    )
    posted = {f"POST {path}": client.post(path, json=body) for path, body in bodies.items()}
    assert all(reply.status_code < 500 for reply in posted.values())
    return {path: reply.text for path, reply in {**replies, **posted}.items()}


def test_no_reply_says_where_things_lie_on_the_server(client: TestClient, place: Path) -> None:
    for path, text in everything(client).items():
        assert SECRET_PLACE not in text, path
        assert str(place.parent) not in text, path


def test_no_reply_has_the_database_s_password(client: TestClient) -> None:
    for path, text in everything(client).items():
        assert "hunter2" not in text, path


def test_paths_are_shown_by_the_names_of_roots(client: TestClient) -> None:
    study = client.get(f"/v1/studies/{quote(HOSTILE, safe='')}").json()
    assert study["model"] == "models/mine"
    assert study["exports"][0]["path"] == "exports/a"
    assert study["configuration"]["calibration_data"] == "text.txt"


def test_a_note_with_line_breaks_is_one_event(client: TestClient) -> None:
    job = client.get("/v1/jobs?status=failed").json()["items"][0]["id"]
    text = client.get(f"/v1/jobs/{job}/events").text
    blocks = [block for block in text.split("\n\n") if "data: " in block]
    for block in blocks:
        assert re.fullmatch(r"id: \d+\nevent: [a-z]+\ndata: \{.*\}", block), block
    kinds = [re.search("event: (.*)", block)[1] for block in blocks]
    assert kinds.count("note") == 1
    assert "id: 99" not in text.split("\n")


def test_names_are_no_markup_in_a_report(client: TestClient) -> None:
    response = client.get(f"/v1/studies/{quote(HOSTILE, safe='')}/report")
    assert "alert(" in response.text, "the name is there"
    assert '<script>alert("1")' not in response.text
    assert "<img src=x" not in response.text
    assert "sandbox" in response.headers["content-security-policy"]
    disposition = response.headers["content-disposition"]
    assert disposition.isascii()
    assert disposition.isprintable()
    assert "<" not in disposition.partition("filename*=")[0].replace("attachment", "")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("autoq_" + "aB-_9" * 8 + "xyz", "***"),
        ("GET /?token=autoq_abcdefghijkl HTTP", "GET /?token=*** HTTP"),
        ("Authorization: Bearer whatever-it-is", "Authorization: Bearer ***"),
        ("'bearer', b'bearer%20abc'", "'bearer', b'bearer%20***'"),
        (STORE_URL, "postgresql+psycopg://autoq:***@database.example:5432/autoq"),
        ("a://u:p@h and b://v:q@i", "a://u:***@h and b://v:***@i"),
        ("host=h password=hunter2 user=x", "host=h password=*** user=x"),
        ("postgresql://h/d?user=u&password=p%40&x=1", "postgresql://h/d?user=u&password=***&x=1"),
        ("http://127.0.0.1:8731/studies/x", "http://127.0.0.1:8731/studies/x"),
        ("autoq_cli is a name", "autoq_cli is a name"),
        ("mail a@b.example", "mail a@b.example"),
    ],
)
def test_secrets_are_taken_out_of_texts(text: str, clean: str) -> None:
    assert redacted(text) == clean


def test_a_password_alone_is_known_by_the_store_it_belongs_to() -> None:
    assert set(secrets_of(STORE_URL)) == {PASSWORD, "hunter2:with@signs"}
    assert secrets_of("sqlite:///autoq.db") == secrets_of("autoq.db") == ()
    secrets = secrets_of(STORE_URL)
    assert redacted("FATAL: hunter2:with@signs was wrong", secrets) == "FATAL: *** was wrong"


def test_logs_have_no_secrets_however_they_came_in(capfd: pytest.CaptureFixture[str]) -> None:
    token = "autoq_" + "x" * 43
    logging.config.dictConfig(log_configuration(STORE_URL))
    try:
        for name in ("autoq.service.x", "uvicorn.error", "sqlalchemy.engine", "another"):
            log = logging.getLogger(name)
            log.error("one %s", token)
            log.error(f"two {STORE_URL}")
            log.error("three %(a)s", {"a": STORE_URL})
            log.error("four %s", ValueError(token))
            log.error("five %d", "no number " + token)
            try:
                raise RuntimeError(f"cannot connect to {STORE_URL} with {token}")
            except RuntimeError:
                log.exception("six")
    finally:
        logging.getLogger().handlers.clear()
        for name in ("autoq", "uvicorn"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    said = capfd.readouterr().err
    assert said.count("RuntimeError: cannot connect to") == 4
    for number in ("one", "two", "three", "four", "five", "six"):
        assert said.count(f": {number} ") + said.count(f": {number}\n") == 4, number
    assert token not in said
    assert "hunter2" not in said


def test_a_record_is_cleaned_once_and_stays_clean() -> None:
    record = logging.LogRecord("x", 40, "f", 1, "%s %s", ("a", "autoq_abcdefghijkl"), None)
    cleaner = RedactingFilter()
    assert cleaner.filter(record)
    assert cleaner.filter(record)
    assert record.getMessage() == "a ***"
