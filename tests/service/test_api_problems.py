"""The table from exceptions to problems."""

from __future__ import annotations

import inspect

import pytest

from autoq import errors
from autoq.errors import (
    AutoqError,
    BudgetInfeasibleError,
    EvaluationError,
    InputError,
    ModelError,
    QualityInfeasibleError,
    ResourceInfeasibleError,
    StoreError,
    StudyLockedError,
    UnknownNameError,
)
from autoq.service.problems import (
    KINDS,
    UNEXPECTED_DETAIL,
    Refusal,
    kind_of,
    problem_of,
    shown_text,
)

CLASSES = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, AutoqError)
]


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (InputError("x"), "input", 422),
        (UnknownNameError("x"), "unknown-name", 422),
        (ModelError("x"), "model", 422),
        (StudyLockedError("x"), "study-locked", 409),
        (StoreError("x"), "store", 503),
        (EvaluationError("x"), "internal", 500),
        (ZeroDivisionError("x"), "internal", 500),
        (Refusal("not-found", "x"), "not-found", 404),
        (Refusal("too-large", "x"), "too-large", 413),
    ],
)
def test_each_exception_has_its_kind_and_status(error: Exception, kind: str, status: int) -> None:
    problem = problem_of(error)
    assert (problem.type, problem.status) == (f"urn:autoq:problem:{kind}", status)


def test_every_input_error_has_a_kind_of_its_own_that_is_the_clients_to_mend() -> None:
    inputs = [member for member in CLASSES if issubclass(member, InputError)]
    kinds = [kind_of(member.__new__(member)) for member in inputs]
    assert len({kind.name for kind in kinds}) == len(inputs) >= 8
    assert {int(kind.status) for kind in kinds} == {422}


def test_a_budget_outside_tells_its_limits_beside_the_command_lines_sentence() -> None:
    error = BudgetInfeasibleError(2.0, 3.5, 16.0)
    problem = problem_of(error, "/v1/studies/a/plans")
    assert problem.detail == str(error)
    assert problem.limits == {"floor": 3.5, "ceiling": 16.0}
    assert problem.instance == "/v1/studies/a/plans"


def test_other_budgets_tell_the_least() -> None:
    resource = ResourceInfeasibleError("stored_bytes", 1e9, 2e9, ("1 GB", "2 GB"))
    quality = QualityInfeasibleError(0.1, 0.25)
    assert problem_of(resource).limits == {"floor": 2e9, "ceiling": None}
    assert problem_of(quality).limits == {"floor": 0.25, "ceiling": None}


def test_what_nobody_foresaw_tells_nothing_of_the_inside() -> None:
    problem = problem_of(KeyError("secret_column"))
    assert problem.detail == UNEXPECTED_DETAIL


def test_the_system_tells_that_the_disk_is_full() -> None:
    problem = problem_of(OSError(28, "No space left on device", "/srv/exports/a/model.safetensors"))
    assert "No space left on device" in problem.detail
    assert "/srv" not in problem.detail


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/models/llama: no config.json", "llama: no config.json"),
        ("the folder '/a/b c/d' is", "the folder '/a/b c/d' is".replace("/a/", "")),
        ("sqlite:////home/me/autoq.db is locked", "sqlite:///autoq.db is locked"),
        ("models/llama/x is missing", "models/llama/x is missing"),
        ("postgresql://me:secret@host/db refused", "postgresql://me:***@host/db refused"),
        ("and/or 3/4 of\n 5", "and/or 3/4 of 5"),
        (
            "tensor \ud800 or \x1b[31m or \x9b2J\x00",
            "tensor \ufffd or \ufffd[31m or \ufffd2J\ufffd",
        ),
    ],
)
def test_texts_lose_folders_and_passwords(text: str, shown: str) -> None:
    assert shown_text(text) == shown


def test_names_of_kinds_are_unique_and_titles_too() -> None:
    assert len({kind.title for kind in KINDS.values()}) == len(KINDS)
