"""What requests can name: nothing that runs code, opens other paths, or fetches."""

import json

import pytest
from pydantic import BaseModel

import autoq.wire
from autoq.errors import InputError
from autoq.service.jobs._tasks import _AS_GIVEN, PATHS
from autoq.service.requests import check_objective
from autoq.wire import SearchRequest

REQUESTS = sorted(name for name in autoq.wire.__all__ if name.endswith("Request"))
FORBIDDEN = ("trust", "remote_code", "code", "store", "ray", "url", "command", "path", "pickle")


def test_there_are_requests_to_look_at():
    assert {"ExportRequest", "SearchRequest", "VerifyRequest"} <= set(REQUESTS)


@pytest.mark.parametrize("name", REQUESTS)
def test_no_request_can_name_code_or_places(name):
    request: type[BaseModel] = getattr(autoq.wire, name)
    schema = json.dumps(request.model_json_schema()).lower()
    assert "trust" not in schema
    assert "remote" not in schema
    for field in request.model_fields:
        assert not any(word == field or word in field.split("_") for word in FORBIDDEN), field
    assert request.model_config["extra"] == "forbid"


def test_what_a_job_passes_on_to_a_search_is_listed():
    assert set(SearchRequest.model_fields) == {*_AS_GIVEN, *PATHS}


@pytest.mark.parametrize("text", [None, "kl", "ppl", "top1", "kl + 0.1*ppl", "log(perplexity)"])
def test_objectives_of_metrics_pass(text):
    check_objective(text)


@pytest.mark.parametrize(
    "text",
    [
        "arc_easy",
        "arc_easy.acc_norm",
        "'/tmp/task.yaml'",
        "kl + '../task.yaml'",
        "__import__('os').system('id')",
        "().__class__",
        "kl.__class__",
        "(" * 250 + "kl" + ")" * 250,
        "-" * 290 + "kl + arc",
        "9**9**9",
        "kl if 1 else 2",
        "[kl for kl in (1,)]",
        "lambda: kl",
        "kl\x00",
    ],
)
def test_objectives_that_name_tasks_files_or_code_are_refused(text):
    with pytest.raises(InputError):
        check_objective(text)
