"""The command line over bad models, data and budgets: one sentence, exit code 2, nothing lost."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from autoq.cli import app
from autoq.testing.tiny_models import write_tiny_model

BUDGET = ("--bits", "6", "--no-measure")
SMALL = ("--calib-sequences", "4", "--sequence-length", "32", "--held-out-sequences", "2", "--json")


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Search a folder with small settings, or call another command."""
    monkeypatch.setenv("AUTOQ_STORE", f"sqlite:///{tmp_path}/studies.db")
    torch.save(torch.arange(4, 260).repeat(4), tmp_path / "ids.pt")

    def call(command, *arguments):
        if command == "search":
            arguments = (*SMALL, "--calib", str(tmp_path / "ids.pt"), *arguments)
        return CliRunner().invoke(app, [command, *arguments])

    return call


def test_identical_logits_end_with_one_sentence_and_the_store_stays_usable(tmp_path, invoke):
    folder = write_tiny_model("llama", tmp_path / "llama")
    good = json.loads(invoke("search", str(folder), *BUDGET).stdout)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    result = invoke("search", str(folder), *BUDGET)
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the loss is constant on calibration data: its gradient is zero")
    assert "Traceback" not in result.stderr
    shown = json.loads(invoke("show", good["study"], "--json").stdout)
    assert shown["assignment"] == good["assignment"]
    assert invoke("show").exit_code == 2  # the newest has no plan, and says how to go on


@pytest.mark.parametrize(
    ("measuring", "how"), [((), "measured KL divergence"), (("--no-measure",), "predicted loss")]
)
def test_a_quality_that_no_plan_reaches_names_the_best_and_scores_are_kept(
    tmp_path, invoke, measuring, how
):
    folder = str(write_tiny_model("llama", tmp_path / "llama"))
    # Without "none" there is always some loss.
    quality = ("--formats", "nvfp4", "--rule", "*=nvfp4", "--max-kl", "1e-9", *measuring)
    result = invoke("search", folder, *quality)
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    found = re.match(
        rf"error: a {how} of at most 1e-09 cannot be reached .*: the best reachable "
        r"is ([0-9.e-]+); raise the limit",
        last,
    )
    assert found, last
    # A limit just above the best is reached, with the scores that are there.
    reachable = f"{float(found[1]) * 1.001:g}"
    again = invoke("search", folder, *quality, "--max-kl", reachable)
    assert again.exit_code == 0, again.stderr
    assert "scoring:" not in again.stderr
    assert set(json.loads(again.stdout)["assignment"].values()) == {"nvfp4"}


def test_data_too_small_for_the_confidence_is_said_and_the_plan_stands(tmp_path, invoke):
    folder = str(write_tiny_model("llama", tmp_path / "llama"))
    few = ("--calib-sequences", "2", "--confidence", "0.999999")
    result = invoke("search", folder, *BUDGET, *few)
    assert result.exit_code == 0, result.stderr
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: the data is")]
    assert re.search(r"too small for the confidence asked: .* of its 2 sequences", note)
    assert re.search(r"about ([89]|\d\d+) sequences would do \(--calib-sequences\)", note)
    assert json.loads(result.stdout)["effective_bits"] <= 6


def test_too_small_a_bound_on_memory_names_the_least_that_works(tmp_path, invoke):
    folder = str(write_tiny_model("llama", tmp_path / "llama"))

    refused = invoke("search", folder, *BUDGET, "--max-memory", "100MB")
    assert refused.exit_code == 2
    assert refused.stdout == ""
    last = refused.stderr.splitlines()[-1]
    least = re.search(r"give --max-memory ([0-9.]+GB) or more", last)
    assert least is not None

    found = invoke("search", folder, *BUDGET, "--max-memory", least[1])
    assert found.exit_code == 0
    in_memory = json.loads(invoke("search", folder, *BUDGET).stdout)
    assert json.loads(found.stdout)["assignment"] == in_memory["assignment"]
