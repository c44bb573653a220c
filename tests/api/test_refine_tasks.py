"""Tasks in a refinement: one half of their examples chooses, the other confirms."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from autoq.api.refinement import _fresh as _refine_fresh
from autoq.api.refinement._fresh import OnFresh, choose
from autoq.api.refinement._metrics import Aim, AimedMetrics
from autoq.api.refinement.refining import RefineOptions, open_trials
from autoq.evaluators import Estimate, parse_objective
from autoq.evaluators.tasks import ExamplePart
from autoq.search.refine import Source, Trial
from autoq.search.sampling import random_plans
from tests.api.refinements import SMALL, NoteTaking, the_second_is_a_finalist

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Writes a task of so many short texts, and gives its path in quotes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def write(count):
        rows = [{"text": f"{n} and {n * n}"} for n in range(count)]
        (tmp_path / "letters.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "letters.yaml").write_text(TASK)
        return str(tmp_path / "letters.yaml")

    return write


def test_trials_see_one_half_of_the_examples_and_the_verdict_the_other(study, task, monkeypatch):
    """The paired test is over as many parts as there are fresh examples."""
    from autoq.evaluators import _task_examples

    asked, judged = [], []
    indices, accept = ExamplePart.indices, _refine_fresh.accepted

    def noted(part, examples):
        asked.append((part.fresh, tuple(indices(part, examples)["letters"])))
        return indices(part, examples)

    def judging(start, values, floor, *, candidates):
        judged.append((len(start), len(values), candidates))
        return accept(start, values, floor, candidates=candidates)

    monkeypatch.setattr(_task_examples.ExamplePart, "indices", noted)
    monkeypatch.setattr(_refine_fresh, "accepted", judging)
    the_second_is_a_finalist(monkeypatch)
    progress = NoteTaking()
    result = study.refine(trials=2, objective=f"'{task(70)}'", progress=progress, **SMALL)
    halves = {fresh: set(found) for fresh, found in asked}
    assert halves[True].isdisjoint(halves[False])
    assert len(halves[True]) == len(halves[False]) == 35
    assert judged == [(35, 35, 1)]
    (counts,) = result.verdict["fresh_examples"].values()
    assert counts == {"fresh": 35, "all": 70}
    assert "35 of 70 examples of " in progress.notes[0]
    for row in result.verdict["finalists"]:
        assert row["fresh"] != row["selected_at"]


def test_tokens_and_examples_are_judged_together_in_as_many_parts_as_both_have(
    study, task, monkeypatch
):
    judged = []
    accept = _refine_fresh.accepted

    def judging(start, values, floor, *, candidates):
        judged.append(len(start))
        return accept(start, values, floor, candidates=candidates)

    monkeypatch.setattr(_refine_fresh, "accepted", judging)
    the_second_is_a_finalist(monkeypatch)
    options = {**SMALL, "fresh_sequences": 9}
    study.refine(trials=2, objective=f"log('{task(70)}.byte_perplexity') + kl", **options)
    assert judged == [9]


def test_a_task_in_a_constraint_alone_leaves_the_sequences_to_judge_by(study, task, monkeypatch):
    judged = []
    accept = _refine_fresh.accepted

    def judging(start, values, floor, *, candidates):
        judged.append((len(start), len(values)))
        return accept(start, values, floor, candidates=candidates)

    monkeypatch.setattr(_refine_fresh, "accepted", judging)
    the_second_is_a_finalist(monkeypatch)
    constraint = f"{task(70)}.byte_perplexity<=1000000"
    study.refine(trials=2, constraints=(constraint,), **SMALL)
    assert judged == [(SMALL["fresh_sequences"],) * 2]


def test_a_task_too_small_to_hold_examples_out_accepts_nothing_and_says_why(
    study, task, monkeypatch
):
    the_second_is_a_finalist(monkeypatch)
    path = task(20)
    result = study.refine(trials=2, objective=f"'{path}'", **SMALL)
    assert not result.improved
    assert result.verdict["reason"] == (
        f"not confirmed: {path} has too few examples to hold any out, 20 in all"
    )
    assert [row["fresh"] for row in result.verdict["finalists"]] == [None, None]
    trials = open_trials(
        study, study.unrefined_plan(), RefineOptions(objective=f"'{path}'", **SMALL)
    )
    assert "confirmed_until" not in trials.user_attrs  # no token was used up


def test_a_refinement_that_can_confirm_nothing_leaves_what_an_earlier_one_found(study, task):
    start = study.unrefined_plan()
    other = study.add_plan("another", random_plans(study.sensitivity, study.costs(), count=1)[0])
    study.set_refined(start, other)
    result = study.refine(trials=2, objective=f"'{task(20)}'", **SMALL)
    assert not result.improved
    assert study.refined(start).id == other.id


def test_a_constraint_on_a_small_task_is_said_to_be_unconfirmed(study, task):
    progress = NoteTaking()
    constraint = f"{task(20)}<=1.5x"
    result = study.refine(trials=2, constraints=(constraint,), progress=progress, **SMALL)
    assert any("and not confirmed: " in note for note in progress.notes)
    assert "not confirmed: " in result.verdict["remark"]


def test_a_constraint_on_a_large_task_counts_the_originals_fresh_value(study, task, monkeypatch):
    """Bounds around the start's own ratio decide what is broken on the fresh half."""
    seen = []
    violations = AimedMetrics.violations

    def noted(metrics, found, original):
        seen.append((metrics.aim.examples.fresh, dict(original)))
        return violations(metrics, found, original)

    monkeypatch.setattr(AimedMetrics, "violations", noted)
    the_second_is_a_finalist(monkeypatch)
    study.refine(trials=2, constraints=(f"{task(70)}<=1.5x",), **SMALL)
    (chosen_by,) = {tuple(original.values()) for fresh, original in seen if not fresh}
    (confirmed_by,) = {tuple(original.values()) for fresh, original in seen if fresh}
    assert chosen_by != confirmed_by


def test_where_an_objective_has_no_value_on_single_examples_it_is_taken_on_more_at_a_time():
    """log(0) has none; of 32 answers, right and wrong in turn, every two have log(1/2)."""
    aimed = SimpleNamespace(aim=Aim(parse_objective("log(answers)")))
    nothing = SimpleNamespace(per_sequence=dict)
    answers = Estimate(0.5, 0.4, 0.6, per_sequence=(0.0, 1.0) * 16)
    assert AimedMetrics._in_parts(aimed, nothing, {"answers": answers}) == [math.log(0.5)] * 16
    never = Estimate(0.0, 0.0, 0.0, per_sequence=(0.0,) * 32)
    assert AimedMetrics._in_parts(aimed, nothing, {"answers": never}) == []
    unknown = Estimate(0.5, -math.inf, math.inf)
    assert AimedMetrics._in_parts(aimed, nothing, {"answers": unknown}) == []


# Judging, by hand


def trial(number, source=Source.SWAP):
    return Trial(number=number, source=source, assignment={}, losses=(1.0,))


FINALISTS = [trial(0, Source.START), trial(1), trial(2)]
START = OnFresh((1.0, 1.2, 0.8, 1.0), 1.0, {"acc>=0.9": -0.1})
BETTER = OnFresh((0.5, 0.6, 0.4, 0.5), 0.5, {"acc>=0.9": -0.1})


def test_the_better_one_is_taken():
    chosen, verdict = choose(FINALISTS[:2], [START, BETTER], 0.0, "")
    assert (chosen, verdict.better) == (FINALISTS[1], True)


def test_what_breaks_a_constraint_on_fresh_examples_is_not_taken_however_good_it_is():
    breaking = OnFresh(BETTER.losses, BETTER.loss, {"acc>=0.9": 0.01})
    chosen, verdict = choose(FINALISTS[:2], [START, breaking], 0.0, "")
    assert chosen is None
    assert verdict.reason.startswith("not accepted: what kept acc>=0.9 where it was chosen")


def test_what_the_start_breaks_as_much_is_no_reason():
    start = OnFresh(START.losses, START.loss, {"acc>=0.9": 0.02})
    other = OnFresh(BETTER.losses, BETTER.loss, {"acc>=0.9": 0.02})
    assert choose(FINALISTS[:2], [start, other], 0.0, "")[0] is FINALISTS[1]
    worse = OnFresh(BETTER.losses, BETTER.loss, {"acc>=0.9": 0.03})
    assert choose(FINALISTS[:2], [start, worse], 0.0, "")[0] is None


def test_where_the_start_breaks_a_constraint_what_keeps_it_on_fresh_examples_is_taken():
    start = OnFresh(START.losses, START.loss, {"acc>=0.9": 0.02})
    keeping = OnFresh((2.0,) * 4, 2.0, {"acc>=0.9": -0.01})
    breaking = OnFresh((1.5,) * 4, 1.5, {"acc>=0.9": 0.03})
    chosen, verdict = choose(FINALISTS, [start, breaking, keeping], 0.0, "acc>=0.9")
    assert chosen is FINALISTS[2]
    assert "of the trials that keep it" in verdict.reason


def test_without_values_on_parts_nothing_is_accepted():
    chosen, verdict = choose(FINALISTS[:2], [OnFresh((1.0,), 1.0), OnFresh((0.5,), 0.5)], 0.0, "")
    assert chosen is None
    assert "so chance is unknown; the difference is -0.5" in verdict.reason


def test_what_cannot_be_measured_on_fresh_data_is_left_out():
    lost = OnFresh((math.inf,), math.inf)
    chosen, _ = choose(FINALISTS, [START, lost, BETTER], 0.0, "")
    assert chosen is FINALISTS[2]
    assert choose(FINALISTS[:2], [START, lost], 0.0, "")[1].reason.startswith("no trial was better")
