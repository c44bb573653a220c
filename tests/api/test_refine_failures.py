"""Refinements that cannot be: bad options, other models, plans that cannot be measured."""

from __future__ import annotations

import shutil

import optuna
import pytest
import torch

import autoq
from autoq.api import open_study
from autoq.api.refinement.measure import TrialMeasurer
from autoq.errors import EvaluationError, InputError, ModelError, UnknownNameError
from autoq.evaluators.fidelity import check_finite
from autoq.studies import trial_storage
from tests.api.refinements import QUICK, SMALL, entries


def test_a_plan_that_gives_nan_fails_alone(study, monkeypatch):
    real = TrialMeasurer.measure
    calls = []

    def sometimes(self, assignment, **options):
        calls.append(assignment)
        if len(calls) == 3:
            raise EvaluationError("the quantised model's output holds NaN or Inf")
        return real(self, assignment, **options)

    monkeypatch.setattr(TrialMeasurer, "measure", sometimes)
    result = study.refine(trials=5, **SMALL)
    assert result.trials == 5
    assert len(entries(study)) == 4  # one has no losses


def test_a_start_that_cannot_be_measured_ends_the_refinement_at_once(study, monkeypatch):
    tried = []

    def fail(self, assignment, **options):
        tried.append(assignment)
        check_finite(torch.tensor([torch.nan]), "quantised")

    monkeypatch.setattr(TrialMeasurer, "measure", fail)
    for _ in range(2):  # run again, it says so without measuring
        with pytest.raises(
            InputError, match=r"^a refinement begins by .*NaN or Inf; search .*plan$"
        ):
            study.refine(trials=20, **SMALL)
    assert tried == [study.unrefined_plan().to_plan().assignment]


def test_an_objective_without_a_value_for_the_start_is_not_blamed_on_the_model(study):
    with pytest.raises(InputError, match=r"'log\(0-kl\)' has no value .*; write another$"):
        study.refine(trials=2, objective="log(0-kl)", **SMALL)


def test_a_worker_with_another_model_is_refused(study, llama_folder, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(llama_folder, folder)
    again = autoq.search(folder, **QUICK, store=study.store.url, seed=5, name="other")
    from safetensors.torch import load_file, save_file

    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="has changed since study"):
        open_study(again.name, study.store.url).refine(trials=2, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials must be >= 1, got 0"),
        ({"sequences": 1}, "sequences must be >= 2, got 1"),
        ({"sampler": "bayes"}, "no sampler named 'bayes'; known: tpe, gp, nsga2"),
        ({"strategies": ("luck",)}, "no strategy named 'luck'"),
        ({"objective": "kl +"}, "objective must be arithmetic"),
        ({"cache_gb": -1.0}, "cache_gb must be >= 0, got -1"),
        ({"workers": 0}, "workers must be >= 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(study, options, message):
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        study.refine(**options)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("perplexty", "did you mean perplexity"),
        ("1 - cosine_similarity", "hidden states as its output"),
        ("kl - autoq_choices.accu", r"did you mean autoq_choices\.acc\?"),
        ("1 - ai2_arc", "ai2_arc must have one number"),
    ],
)
def test_metrics_that_nobody_has_are_refused_at_once(study, objective, message):
    error = UnknownNameError if "mean" in message else InputError
    with pytest.raises(error, match=message):
        study.refine(trials=2, objective=objective, **SMALL)
    assert optuna.get_all_study_summaries(storage=trial_storage(study.store.url)) == []
