"""Refinements with other aims than the divergence: objectives, constraints, fronts, and their sampler."""

from __future__ import annotations

import json

import numpy as np
import optuna
import pytest

import autoq
from autoq.api.refinement._trials import LOSSES
from autoq.api.refinement.refining import RefineOptions, open_trials
from autoq.errors import InputError
from autoq.search.refine import Refinement
from tests.api.refinements import SMALL, entries, open_with


def test_an_objective_of_several_metrics_is_what_its_metrics_say(study):
    result = study.refine(trials=3, objective="kl + 0.1*ppl - top1", **SMALL)
    assert result.trials == 3
    options = RefineOptions(objective="kl + 0.1*ppl - top1", **SMALL)
    for entry in open_trials(study, study.unrefined_plan(), options).get_trials():
        if "metrics" not in entry.user_attrs:
            continue
        found = json.loads(entry.user_attrs["metrics"])
        expected = found["kl_divergence"] + 0.1 * found["perplexity"] - found["top1_agreement"]
        assert entry.value == pytest.approx(expected, rel=1e-12)
        assert len(json.loads(entry.user_attrs[LOSSES])) == 4


def test_a_constraint_counts_the_originals_value_and_excludes_plans_that_break_it(study):
    options = {"constraints": ("ppl<=1.02x",), **SMALL}
    study.refine(trials=4, **options)
    trials = open_trials(study, study.unrefined_plan(), RefineOptions(**options))
    original = trials.user_attrs["original"]["perplexity"]
    for entry in trials.get_trials():
        if "metrics" not in entry.user_attrs:
            continue
        excess = json.loads(entry.user_attrs["metrics"])["perplexity"] - 1.02 * original
        assert entry.constraints["perplexity<=1.02x"] == pytest.approx(excess, abs=1e-9)
        assert ("violates" in entry.user_attrs) == (excess > 0)


def test_where_the_start_breaks_a_constraint_a_plan_that_keeps_it_is_taken(study):
    """The bound lies between the start and another trial, so that one of them keeps it."""
    study.refine(trials=4, objective="kl", **SMALL)
    values = [sum(json.loads(losses)) / 4 for _, _, losses, _ in entries(study)]
    lowest = min(values[1:])
    bound = (values[0] + lowest) / 2 if lowest < values[0] else values[0] * 0.5
    options = {"constraints": (f"kl<={bound!r}",), "prune": False, **SMALL}
    result = study.refine(trials=4, **options)
    start, *others = (sum(row["breaks"].values()) for row in result.verdict["finalists"])
    keeps_it_on_fresh_tokens = any(excess <= start for excess in others)
    assert result.improved is (lowest < values[0] and keeps_it_on_fresh_tokens)
    assert "kl_divergence<=" in result.verdict["reason"]


def test_a_start_that_breaks_a_constraint_stops_no_trial_early(study, monkeypatch):
    monkeypatch.setattr(Refinement, "hopeless", lambda *_: True)
    study.refine(trials=4, constraints=("kl<=1e-12",), **SMALL)
    trials = open_with(study, constraints=("kl<=1e-12",))
    finished = [entry for entry in trials.get_trials() if LOSSES in entry.user_attrs]
    assert len(finished) == 4
    assert all(entry.state is optuna.trial.TrialState.COMPLETE for entry in finished)


def test_models_with_hidden_states_are_refined_by_their_own_divergence(quick, tmp_path):
    from transformers import AutoModel

    from autoq.testing.tiny_models import write_tiny_model

    folder = write_tiny_model("llama", tmp_path / "llama")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    found = autoq.search(folder, **quick)
    assert found.refine(trials=2, **SMALL).trials == 2
    with pytest.raises(InputError, match="perplexity needs"):
        found.refine(trials=2, objective="ppl", **SMALL)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2"])
def test_a_front_of_loss_against_bits_is_measured_and_stored(study, sampler):
    result = study.refine(trials=9, against="bits", sampler=sampler, **SMALL)
    front = result.verdict["front"]
    bits = [row["effective_bits"] for row in front]
    losses = [row["selected_at"] for row in front]
    assert bits == sorted(set(bits))
    assert losses == sorted(losses, reverse=True)
    assert not result.improved
    for row in front:
        assert study.store.plan(row["plan_id"]).effective_bits == row["effective_bits"]
        assert row["held_out"]["value"] > 0


def test_the_sampler_learns_from_the_trials_that_have_parameters():
    """A quadratic with its least value at 0.3; trials without parameters are in between."""
    from autoq.api.refinement._optuna import few_words
    from autoq.api.refinement._sampler import MultiplierSampler

    for name in ("tpe", "gp"):
        sampler = MultiplierSampler(name, seed=0)
        with few_words():
            trials = optuna.create_study(sampler=sampler)
            for place in range(40):
                trial = trials.ask()
                sampler.begin(place)
                value = trial.suggest_float("x", 0.0, 1.0) if place % 2 else 0.5
                trials.tell(trial, (value - 0.3) ** 2)
        asked = [trial.params["x"] for trial in trials.trials if trial.params]
        assert abs(np.mean(asked[-5:]) - 0.3) < 0.15


def test_nsga2_finds_its_generations_again():
    from autoq.api.refinement._optuna import SAMPLER_STATE, few_words
    from autoq.api.refinement._sampler import MultiplierSampler

    sampler = MultiplierSampler("nsga2", seed=0)
    with few_words():
        trials = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
        for place in range(25):
            trial = trials.ask()
            sampler.begin(place)
            value = trial.suggest_float("x", 0.0, 1.0)
            trial.set_user_attr(SAMPLER_STATE, json.dumps(sampler.state))
            trials.tell(trial, [value, 1 - value])
    states = [json.loads(trial.user_attrs[SAMPLER_STATE]) for trial in trials.trials]
    generations = [state.get("NSGAIISampler:generation", 0) for state in states]
    assert generations == sorted(generations)
    assert generations[-1] == 2
