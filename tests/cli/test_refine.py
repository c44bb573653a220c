"""`autoq refine`, and what `autoq search --refine` hands on."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.8, "high": value * 1.2}


REFINED: dict[str, Any] = {
    "study": "llama-ab12",
    "trials": 20,
    "improved": True,
    "start": {"plan_id": 1, "label": "5 bits"},
    "plan": {"plan_id": 2, "label": "5 bits, refined"},
    "reason": "better",
    "objective": "kl",
    "held_out": {
        "start": interval(0.002),
        "refined": interval(0.0015),
        "refined_is": "better",
        "change": {"value": -0.0005, "low": -0.0007, "high": -0.0003},
    },
}
KEPT = {
    **REFINED,
    "improved": False,
    "plan": REFINED["start"],
    "reason": "no trial was better than the start",
    "held_out": {"start": interval(0.002)},
}
FRONT = {
    **KEPT,
    "front": [
        {"effective_bits": bits, "held_out": interval(loss)}
        for bits, loss in ((4.5, 0.003), (6.25, 0.001))
    ],
}


@pytest.fixture
def refining(api, monkeypatch):
    """The studies of the API refine as they are told."""

    def give(result):
        def refine(self, bits=None, *, progress, **options):
            api.called("refine", bits=bits, **options)
            return SimpleNamespace(as_plain=lambda: result)

        monkeypatch.setattr(api.Study, "refine", refine, raising=False)
        return api

    return give


def test_a_refined_plan_stands_beside_its_start(run, refining):
    refining(REFINED)
    result = run("refine", "--quiet")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "llama-ab12: 20 trials round 5 bits",
        "refined: 5 bits, refined is better on held-out text",
        "  KL divergence of the start: 0.002000 (95 %: 0.001600 to 0.002400)",
        "  KL divergence, refined:     0.001500 (95 %: 0.001200 to 0.001800)",
        "  difference: -5.000e-04 (95 %: -7.000e-04 to -3.000e-04), -25.0 %",
    ]


@pytest.mark.parametrize(
    ("objective", "verdict", "line"),
    [
        ("kl", "tie", "ties with the start on held-out text"),
        ("ppl", "worse", "is worse by KL divergence on held-out text"),
    ],
)
def test_a_plan_chosen_by_another_objective_is_not_called_better_by_divergence(
    run, refining, objective, verdict, line
):
    held_out = {**REFINED["held_out"], "refined_is": verdict}
    refining({**REFINED, "objective": objective, "held_out": held_out})
    said = run("refine", "--quiet").stdout.splitlines()[1]
    assert said.endswith(line)
    assert ("chosen by ppl," in said) == (objective == "ppl")


def test_where_nothing_was_found_the_reason_is_said(run, refining):
    refining(KEPT)
    lines = run("refine", "--quiet").stdout.splitlines()
    assert lines[1] == "kept 5 bits: no trial was better than the start"
    assert len(lines) == 3


def test_a_front_is_a_line_for_each_plan(run, refining):
    api = refining(FRONT)
    lines = run("refine", "--against", "bits", "--sampler", "nsga2", "--quiet").stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["4.5000", "6.2500"]
    assert api.arguments("refine")["against"] == "bits"
    assert api.arguments("refine")["sampler"] == "nsga2"


def test_options_reach_the_refinement_and_json_is_all_of_standard_output(run, refining):
    api = refining(REFINED)
    result = run(
        "refine", "llama", "--bits", "5", "--trials", "200", "--objective", "kl + 0.1*ppl",
        "--workers", "4", "--min-task", "arc_easy>=0.99x", "--min-task", "ppl<=1.1x",
        "--cache-gb", "2", "--no-prune", "--seed", "3", "--json",
    )  # fmt: skip
    assert json.loads(result.stdout) == REFINED
    given = api.arguments("refine")
    assert (given["bits"], given["trials"], given["workers"], given["seed"]) == (5.0, 200, 4, 3)
    assert given["objective"] == "kl + 0.1*ppl"
    assert given["constraints"] == ("arc_easy>=0.99x", "ppl<=1.1x")
    assert given["cache_gb"] == 2.0
    assert given["prune"] is False


def test_one_of_metric_and_objective_is_given(run, refining):
    api = refining(REFINED)
    run("refine", "--metric", "ppl", "--quiet")
    assert api.arguments("refine")["objective"] == "ppl"
    result = run("refine", "--metric", "kl", "--objective", "kl")
    assert result.exit_code == 2
    assert "give --metric or --objective, not both" in result.stderr


def test_a_search_refines_as_it_is_told(run, api):
    run("search", "models/llama", "--bits", "5", "--refine", "30", "--objective", "ppl",
        "--min-task", "kl<=0.01", "--workers", "2", "--quiet")  # fmt: skip
    given = api.arguments("search")
    assert (given["refine"], given["workers"]) == (30, 2)
    assert given["refine_options"] == {"objective": "ppl", "constraints": ("kl<=0.01",)}


def test_what_trials_are_for_needs_trials(run, api):
    result = run("search", "models/llama", "--bits", "5", "--min-task", "arc_easy>=0.9x")
    assert result.exit_code == 2
    assert "add --refine N" in result.stderr
    assert not api.calls
