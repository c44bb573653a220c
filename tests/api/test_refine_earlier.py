"""What an earlier refinement found stays where nothing better is, unless it does harm."""

from __future__ import annotations

import math

import pytest

from autoq.api.refinement import _decide as _refine_decide
from autoq.api.refinement import _earlier as _refine_earlier
from autoq.api.refinement import _fresh as _refine_fresh
from autoq.api.refinement._data import refine_data
from autoq.api.refinement._earlier import Earlier
from autoq.api.refinement._fresh import FreshMeasurements, OnFresh
from autoq.api.refinement.refining import RefineOptions
from autoq.cli._refine import _lines
from autoq.progress import SilentProgress
from autoq.search.refine import Source, Trial, Verdict
from autoq.search.sampling import random_plans
from tests.api.refinements import KL, SMALL, NoteTaking, the_second_is_a_finalist

HOLDS = ("ppl<=1000x",)


@pytest.fixture
def nothing_is_accepted(monkeypatch):
    def refuse(*_args, **_options):
        return Verdict(
            better=False, difference=0.0, low=-1.0, high=1.0, reason="not accepted: luck"
        )

    monkeypatch.setattr(_refine_fresh, "accepted", refuse)
    the_second_is_a_finalist(monkeypatch)


@pytest.fixture
def other(study):
    """A plan that an earlier refinement made of the start, as far as the store knows."""
    plan = study.add_plan(
        "6 bits, refined", random_plans(study.sensitivity, study.costs(), count=1)[0]
    )
    study.set_refined(study.unrefined_plan(), plan)
    return plan


def never_worse(monkeypatch, answer=False):
    for module in (_refine_earlier, _refine_decide):
        monkeypatch.setattr(module, "is_worse", lambda *_: answer)


@pytest.mark.parametrize("constraints", [(), HOLDS])
def test_where_nothing_is_accepted_it_stays_and_that_is_said(
    study, other, nothing_is_accepted, monkeypatch, constraints
):
    never_worse(monkeypatch)
    result = study.refine(trials=2, constraints=constraints, **SMALL)
    assert study.plan().id == result.plan.id == other.id
    assert not result.improved
    assert result.verdict["kept_earlier"]
    assert result.verdict["held_out"]["refined"]["value"] > 0
    lines = _lines(result.as_plain())
    assert lines[1] == (
        "kept 6 bits, refined, which an earlier refinement found: not accepted: luck"
    )
    assert [row["trial"] for row in result.verdict["finalists"]] == [0, 1, -1]
    again = study.refine(trials=2, constraints=constraints, **SMALL)
    assert again.as_plain() == result.as_plain()


@pytest.mark.parametrize("constraints", [(), HOLDS])
def test_what_is_worse_than_the_start_gives_its_place_back(
    study, other, nothing_is_accepted, monkeypatch, constraints
):
    never_worse(monkeypatch, answer=True)
    progress = NoteTaking()
    result = study.refine(trials=2, constraints=constraints, progress=progress, **SMALL)
    assert study.plan().id == result.plan.id == study.unrefined_plan().id
    assert not result.verdict["kept_earlier"]
    said = "what an earlier refinement found is not kept: it is worse than the start on fresh data"
    assert said in progress.notes
    assert said in result.verdict["remark"]


def losses(study, plans):
    """KL divergence where trials are measured."""
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    trials = [
        Trial(number=n, source=Source.SWAP, assignment=plan.to_plan().assignment, losses=())
        for n, plan in enumerate(plans)
    ]
    fresh = FreshMeasurements(study, None, SilentProgress())
    return [found.loss for found in fresh.of(trials, tokens, KL, "measuring")]


def test_what_breaks_a_constraint_that_the_start_keeps_is_not_taken_further(
    study, nothing_is_accepted, monkeypatch
):
    """The bound lies between the two, where trials are measured."""
    never_worse(monkeypatch)
    start = study.unrefined_plan()
    plans = [
        study.add_plan(f"random {n}", plan)
        for n, plan in enumerate(random_plans(study.sensitivity, study.costs(), count=4))
    ]
    least, *others = losses(study, [start, *plans])
    worst = max(others)
    assert worst > least
    study.set_refined(start, plans[others.index(worst)])
    bound = f"kl<={(least + worst) / 2!r}"
    result = study.refine(trials=2, constraints=(bound,), **SMALL)
    assert study.plan().id == start.id
    assert "is not kept: it breaks kl_divergence<=" in result.verdict["remark"]


def test_it_is_no_candidate_where_both_break_a_constraint_and_stays_all_the_same(
    study, other, monkeypatch
):
    """No plan loses so little; what is kept breaks the bound no more than the start does."""
    never_worse(monkeypatch)
    start, found = losses(study, [study.unrefined_plan(), other])
    result = study.refine(trials=2, constraints=("kl<=1e-12",), **SMALL)
    if found <= start:
        assert study.plan().id == other.id
    else:
        assert "it breaks kl_divergence<=1e-12" in result.verdict["remark"]
    assert not result.improved


# By hand


def earlier(breaks=(), more=()):
    trial = Trial(number=-1, source=Source.SWAP, assignment={}, losses=())
    return Earlier(plan=None, trial=trial, breaks=breaks, more_than_start=more)


START = OnFresh((1.0, 1.2, 0.8, 1.0), 1.0, {"acc>=0.9": -0.1})


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (START, ""),
        (OnFresh((1.1, 1.2, 0.9, 0.9), 1.025, {"acc>=0.9": -0.1}), ""),  # by chance
        (OnFresh((2.0, 2.2, 1.8, 2.0), 2.0, {"acc>=0.9": -0.1}), "it is worse than the start"),
        (OnFresh((0.5, 0.6, 0.4, 0.5), 0.5, {"acc>=0.9": 0.05}), "it breaks acc>=0.9"),
        (OnFresh((math.inf,), math.inf), "it cannot be measured"),
    ],
)
def test_it_stays_unless_data_speak_against_it(found, reason):
    assert earlier().against(found, START, 0.0).startswith(reason)
    assert bool(earlier().against(found, START, 0.0)) is bool(reason)


def test_what_it_breaks_where_trials_are_measured_counts_too():
    """A task with few examples is measured nowhere else."""
    assert earlier(("t>=1x",), ("t>=1x",)).against(START, START, 0.0) == "it breaks t>=1x"
    assert earlier(("t>=1x",)).against(START, START, 0.0) == ""
