"""The command line over models that cannot be scored: one sentence, exit code 2, nothing lost."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from autoq.cli import app
from autoq.testing.tiny_models import write_tiny_model


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Search a folder with small settings, or call another command."""
    monkeypatch.setenv("AUTOQ_STORE", f"sqlite:///{tmp_path}/studies.db")
    torch.save(torch.arange(4, 260).repeat(4), tmp_path / "ids.pt")

    def call(command, *arguments):
        if command == "search":
            arguments += ("--bits", "6", "--calib", str(tmp_path / "ids.pt"), "--no-measure")
            arguments += ("--calib-sequences", "4", "--sequence-length", "32", "--json")
        return CliRunner().invoke(app, [command, *arguments])

    return call


def test_identical_logits_end_with_one_sentence_and_the_store_stays_usable(tmp_path, invoke):
    folder = write_tiny_model("llama", tmp_path / "llama")
    good = json.loads(invoke("search", str(folder)).stdout)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    result = invoke("search", str(folder))
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the loss is constant on calibration data: its gradient is zero")
    assert "Traceback" not in result.stderr
    shown = json.loads(invoke("show", good["study"], "--json").stdout)
    assert shown["assignment"] == good["assignment"]
    assert invoke("show").exit_code == 2  # the newest has no plan, and says how to go on
