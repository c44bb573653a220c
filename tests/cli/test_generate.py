"""The command that runs a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autoq.errors import ExportError


def test_generate_passes_every_option_on(api, run):
    result = run(
        *("generate", "out", "--prompt", "Once", "--max-new-tokens", "5"),
        *("--device", "cpu", "--dtype", "float32", "--trust-remote-code"),
    )
    assert result.exit_code == 0, result.stderr
    assert api.arguments("generate") == {
        "path": Path("out"),
        "prompt": "Once",
        "max_new_tokens": 5,
        "device": "cpu",
        "dtype": "float32",
        "trust_remote_code": True,
    }


def test_generate_leaves_device_and_dtype_to_the_machine_and_the_checkpoint(api, run):
    run("generate", "out", "-p", "Once")
    assert api.arguments("generate")["device"] == "auto"
    assert api.arguments("generate")["dtype"] is None


def test_text_alone_goes_to_standard_output(api, run):
    result = run("generate", "out", "-p", "Once")
    assert result.stdout == "Once and so on\n"
    assert "3 tokens in 0.50 s (6.0 per second); the model takes 3.00 MiB on cpu" in result.stderr


def test_quiet_says_nothing_beside_the_text(api, run):
    result = run("generate", "out", "-p", "Once", "--quiet")
    assert result.stdout == "Once and so on\n"
    assert "tokens" not in result.stderr


def test_json_is_the_only_output(api, run):
    result = run("generate", "out", "-p", "Once", "--json")
    found = json.loads(result.stdout)
    assert found["text"] == "Once and so on"
    assert found["weight_bytes"] == 3 << 20


@pytest.mark.parametrize(
    "arguments", [("out",), ("-p", "Once"), ("out", "-p", "x", "--max-new-tokens", "0")]
)
def test_incomplete_commands_are_refused(api, run, arguments):
    assert run("generate", *arguments).exit_code == 2
    assert not api.calls


def test_what_cannot_be_loaded_is_one_line(api, run):
    api.failure = ExportError("out lacks weights of its architecture: norm.weight")
    result = run("generate", "out", "-p", "Once")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        "error: out lacks weights of its architecture: norm.weight"
    )
