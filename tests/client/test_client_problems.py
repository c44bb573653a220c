"""A refusal of the server is the exception that the same mistake raises in process."""

from __future__ import annotations

import copy
import math

import pytest

import autoq
from autoq.client import UnreachableError
from autoq.errors import (
    AutoqError,
    BudgetInfeasibleError,
    DataError,
    ExportError,
    InputError,
    ModelError,
    QualityInfeasibleError,
    ResourceInfeasibleError,
    StoreError,
    StudyLockedError,
    UnknownNameError,
    VerificationError,
)
from autoq.service.problems import KINDS, problem_of
from autoq.testing.scripted_server import Answer

RAISED = [
    InputError("batch_size must be at least 1, got 0"),
    UnknownNameError("no format named 'fp9' (close: fp8)"),
    ModelError("the folder has no config.json"),
    DataError("the text has 3 tokens, and 128 are needed"),
    BudgetInfeasibleError(2.0, 4.5, 16.0),
    ResourceInfeasibleError("stored_bytes", 1e6, 2e6, ("0.001 GB", "0.002 GB")),
    ResourceInfeasibleError("stored_bytes", 1e6, 2e6, ("0.001 GB", "0.002 GB"), "5 bits"),
    QualityInfeasibleError(1e-6, 2e-6, "5 effective bits", measured=True),
    ExportError("the folder out exists; --overwrite replaces it"),
    StudyLockedError("host:12 works on study s"),
    StoreError("the store does not answer"),
    VerificationError("tensor a differs"),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_class_and_sentence_are_those_of_the_exception(server, error):
    problem = problem_of(error)
    server.route = lambda asked: _reply(problem)
    with autoq.Client(server.url, retries=0) as client, pytest.raises(AutoqError) as caught:
        client.plan("s", effective_bits=2.0)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


def test_limits_of_a_budget_come_along(server):
    server.route = lambda asked: _reply(problem_of(BudgetInfeasibleError(2.0, 4.5, 16.0)))
    with autoq.Client(server.url) as client, pytest.raises(BudgetInfeasibleError) as caught:
        client.plan("s", effective_bits=2.0)
    assert (caught.value.floor_bits, caught.value.ceiling_bits) == (4.5, 16.0)
    assert math.isnan(caught.value.budget_bits)  # the sentence has it, the problem has not
    assert str(copy.copy(caught.value)) == str(caught.value)  # as processes pass it on


def test_every_kind_of_the_server_is_an_exception_of_the_tree(server):
    expected = {
        "not-found": UnknownNameError,
        "internal": AutoqError,
        "too-many-requests": AutoqError,
        "unauthorized": InputError,
        "forbidden": InputError,
        "not-finished": InputError,
    }
    for kind in KINDS.values():
        body = {"type": kind.type, "title": "t", "status": int(kind.status), "detail": "so it is"}
        server.answers.append(_answer(int(kind.status), body))
        with autoq.Client(server.url, retries=0) as client, pytest.raises(AutoqError) as caught:
            client.me()
        assert str(caught.value) == "so it is"
        assert type(caught.value) is expected.get(kind.name, type(caught.value)), kind.name


def test_a_kind_from_a_newer_server_is_an_autoq_error(server):
    body = {"type": "urn:autoq:problem:moon", "title": "t", "status": 418, "detail": "full moon"}
    server.answers.append(_answer(418, body))
    with (
        autoq.Client(server.url) as client,
        pytest.raises(AutoqError, match=r"^full moon$") as caught,
    ):
        client.me()
    assert type(caught.value) is AutoqError


def test_fields_that_a_body_has_wrong_are_named(server):
    body = {
        "type": "urn:autoq:problem:input",
        "title": "t",
        "status": 422,
        "detail": "the body is not as it must be",
        "errors": [{"where": "plan", "what": "not a number"}],
    }
    server.answers.append(_answer(422, body))
    with autoq.Client(server.url) as client, pytest.raises(InputError) as caught:
        client.measure("s", 1)
    assert str(caught.value) == "the body is not as it must be; plan: not a number"


def test_what_is_no_autoq_service_is_said_to_be_none(server):
    server.answers.append(_answer(502, "Bad Gateway"))
    with autoq.Client(server.url) as client, pytest.raises(UnreachableError, match="502"):
        client.me()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"store": "sqlite:///x.db"}, "store is nothing that a server can be asked for here"),
        ({"trust_remote_code": True}, "trust_remote_code is nothing"),
        ({"effective_bits": -1}, "effective_bits: input should be greater than 0"),
    ],
)
def test_what_no_server_takes_is_refused_before_it_is_asked(server, arguments, said):
    with autoq.Client(server.url) as client, pytest.raises(InputError, match=said):
        client.search("bundled", **arguments)
    assert server.asked == []


def _reply(problem):
    return _answer(problem.status, problem.model_dump(mode="json"))


def _answer(status, body):
    return Answer(status, body, {"Content-Type": "application/problem+json"})
