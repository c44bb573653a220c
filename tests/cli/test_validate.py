"""`autoq validate`, and what `show` makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from autoq.errors import InputError

QUALITY = {"plans": 2, "rank_correlation": 1.0, "slope": 1.5, "ratio": 0.5, "coverage": 0.5}


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.8, "high": value * 1.2}


VALIDATION: dict[str, Any] = {
    "sequences": 8,
    "data": "held-out text",
    "unit": "nats_per_token",
    "noise_floor": interval(1e-4),
    "quality": {"all": QUALITY, "random": QUALITY},
    "calibration": {"slope": 1.5, "intercept": 0.25},
    "calibrated_on": "all",
    "calibrated_coverage": None,
    "plans": [
        {
            "label": f"validation random {index}, seed 0",
            "kind": "random",
            "effective_bits": 5.0 + index,
            "predicted": interval(0.1 * (index + 1)),
            "measured": interval(0.05 * (index + 1)),
        }
        for index in range(2)
    ],
}


@pytest.fixture
def validating(api: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def validate(study: Any, *, progress: Any, **options: Any) -> dict[str, Any]:
        with progress.task("validating", 2) as advance:
            advance(2)
        api.called("validate", **options)
        return VALIDATION

    monkeypatch.setattr(api.Study, "validate", validate, raising=False)
    return api


def test_it_passes_every_option_on(validating: Any, run: Any) -> None:
    result = run(
        *("validate", "llama-ab12", "--random", "5", "--near", "6", "--sequences", "7"),
        *("--seed", "8", "--store", "sqlite:///autoq.db"),
    )
    assert result.exit_code == 0, result.stderr
    assert validating.arguments("validate") == {"random": 5, "near": 6, "sequences": 7, "seed": 8}


def test_it_prints_a_table_and_the_rest_on_stderr(validating: Any, run: Any) -> None:
    result = run("validate")
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["all", "2", "1.000", "1.500", "0.500", "50.00", "%"] in rows
    assert ["random", "2", "1.000", "1.500", "0.500", "50.00", "%"] in rows
    assert "noise floor: 1.000e-04 (95 %: 8.000e-05 to 1.200e-04)" in result.stdout
    assert "log measured = 0.250 + 1.500 log predicted, from the all plans" not in result.stdout
    assert "log measured = 0.250 + 1.500 log predicted, from all plans" in result.stdout
    assert "validating: 2 of 2" in result.stderr
    assert "a library talks" not in result.stdout


def test_quiet_shows_no_progress(validating: Any, run: Any) -> None:
    result = run("validate", "--quiet")
    assert "validating" not in result.stderr
    assert result.stdout.splitlines() == [
        "validation: rank correlation 1.000 over 2 plans, slope 1.500, measured / predicted 0.500"
    ]


def test_json_is_one_object(validating: Any, run: Any, tmp_path: Any) -> None:
    result = run("validate", "--json", "--png", "a.png", "--html", "a.html")
    assert json.loads(result.stdout) == {
        "study": "llama-ab12",
        **VALIDATION,
        "png": "a.png",
        "html": "a.html",
    }
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_pictures_are_named(validating: Any, run: Any) -> None:
    lines = run("validate", "--png", "a.png", "--html", "a.html").stdout.splitlines()
    assert lines[-2:] == ["picture: a.png", "picture: a.html"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    validating: Any, run: Any
) -> None:
    result = run("validate", "--png", "missing/a.png")
    assert result.exit_code == 2
    assert "the folder missing does not exist" in result.stderr
    assert validating.calls == []


def test_refusals_are_one_sentence(validating: Any, run: Any) -> None:
    validating.failure = InputError("a validation needs two plans at least")
    result = run("validate", "--random", "0", "--near", "0")
    assert result.exit_code == 2
    assert "error: a validation needs two plans at least" in result.stderr
    assert "Traceback" not in result.stderr


def test_show_prints_floor_calibration_validation_and_ties(
    api: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = api.Study(api, "llama-ab12").summary()
    row = {
        "label": "6 bits",
        "effective_bits": 5.9375,
        "predicted_loss": 0.0437,
        "metrics": {"kl_divergence": interval(0.05)},
    }
    tie = {"difference": 0.0001, "low": -0.001, "high": 0.001, "verdict": "tie"}
    changed = {
        **summary,
        "noise_floor": interval(0.002),
        "validation": VALIDATION,
        "predicted_calibrated": interval(0.031),
        "measurements": [
            {**row, "this_plan": None},
            {**row, "label": "uniform fp8", "this_plan": tie},
        ],
    }
    monkeypatch.setattr(api.Study, "summary", lambda *_, **__: changed)
    lines = [line.strip("│ ") for line in run("show").stdout.splitlines()]
    assert find(lines, "noise floor") == "0.002000 (95 %: 0.001600 to 0.002400)"
    assert find(lines, "predicted, calibrated") == "0.03100 (95 %: 0.02480 to 0.03720)"
    assert find(lines, "validation").startswith("rank correlation 1.000 over 2 plans, slope 1.500")
    assert next(line for line in lines if line.startswith("uniform fp8")).endswith("tie")
    order = [index for index, line in enumerate(lines) if line.startswith(("KL div", "noise fl"))]
    assert order[1] == order[0] + 1


def test_eval_prints_the_floor_of_a_study(
    api: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {**api.evaluate("llama-ab12", progress=None), "noise_floor": interval(0.002)}
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: found)
    lines = run("eval", "llama-ab12").stdout.splitlines()
    assert "  noise floor: 0.002000 (95 %: 0.001600 to 0.002400)" in lines


def find(lines: list[str], name: str) -> str:
    return next(line for line in lines if line.startswith(name)).removeprefix(name).strip()
