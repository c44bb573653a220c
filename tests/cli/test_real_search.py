"""The command line over the real pipeline, once, on a tiny model."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from autoq.cli import app

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "seven",
    "dogs",
    "ran",
    "over",
    "green",
    "hills",
    "and",
    "sang",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, a text, and a study that was searched and exported."""
    import torch

    from autoq.testing.tiny_models import write_tiny_model

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("real")
    write_tiny_model("llama", path / "llama")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=30)) for _ in range(400)]
    (path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def searched(folder):
    """What `autoq search --json` printed."""
    return invoke(
        folder,
        *("search", str(folder / "llama"), "--bits", "6", "--formats", "nvfp4,fp8,none"),
        *("--calib", str(folder / "text.txt"), "--calib-sequences", "4"),
        *("--sequence-length", "32", "--held-out-sequences", "2", "--name", "tiny"),
        *("--export", str(folder / "out"), "--report", str(folder / "r.html"), "--json"),
    )


def invoke(folder, *arguments, code=0):
    store = f"sqlite:///{folder}/studies.db"
    result = CliRunner().invoke(app, list(arguments), env={"AUTOQ_STORE": store})
    assert result.exit_code == code, result.stderr
    return result


def test_search_leaves_json_checkpoint_and_report(folder, searched):
    found = json.loads(searched.stdout)
    assert found["study"] == "tiny"
    assert found["effective_bits"] <= 6.0
    assert set(found["assignment"].values()) <= {"nvfp4", "fp8", "none"}
    assert set(found["measured"]) >= {"kl_divergence", "top1_agreement", "perplexity"}
    assert (folder / "out" / "hf_quant_config.json").is_file()
    page = (folder / "r.html").read_text(encoding="utf-8")
    assert all(group["name"] in page for group in found["groups"])


def test_other_commands_read_the_same_study(folder, searched):
    shown = json.loads(invoke(folder, "show", "tiny", "--json").stdout)
    asked = json.loads(searched.stdout)
    assert shown["assignment"] == asked["assignment"]
    assert "< this plan" in invoke(folder, "frontier", "tiny", "--points", "3").stdout
    assert "tiny" in invoke(folder, "list").stdout


def test_another_budget_is_exported_without_a_pass_over_the_data(folder, searched):
    (folder / "text.txt").rename(folder / "gone.txt")
    try:
        result = invoke(folder, "export", "tiny", "--bits", "8", str(folder / "out8"), "--json")
    finally:
        (folder / "gone.txt").rename(folder / "text.txt")
    assert json.loads(result.stdout)["path"] == str(folder / "out8")
    again = invoke(folder, "export", "tiny", str(folder / "out8"), code=2)
    assert again.stderr.splitlines()[-1].startswith("error: ")
    assert "out8" in again.stderr
    assert "--overwrite" in again.stderr


def test_eval_measures_the_checkpoint(folder, searched):
    result = invoke(
        folder,
        *("eval", str(folder / "out"), "--reference", str(folder / "llama")),
        *("--data", str(folder / "text.txt"), "--sequences", "2", "--sequence-length", "32"),
        "--json",
    )
    metrics = json.loads(result.stdout)["metrics"]
    assert 0.0 < metrics["kl_divergence"]["value"] < 5.0


def test_formats_that_are_not_portable_are_named_with_where_they_load(folder):
    result = invoke(
        folder,
        *("search", str(folder / "llama"), "--bits", "1", "--formats", "w4a8_awq"),
        *("--calib", str(folder / "text.txt")),
        code=2,
    )
    assert "w4a8_awq is not portable" in result.stderr
    assert "TensorRT-LLM" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: a budget of 1 effective bits")
