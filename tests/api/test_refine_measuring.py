"""What a trial of a refinement measures."""

from __future__ import annotations

import math

import pytest
import torch

from autoq.api.measuring import PlanMeasurer
from autoq.api.refinement._data import refine_data
from autoq.api.refinement._metrics import Aim
from autoq.api.refinement.measure import TrialMeasurer
from autoq.api.refinement.refining import RefineOptions
from autoq.errors import EvaluationError
from autoq.evaluators import parse_objective
from autoq.search.sampling import random_plans
from tests.api.refinements import KL, SMALL


def test_losses_are_those_of_a_model_quantised_for_the_plan_alone(study):
    """Whatever was measured before it: cached weights and block outputs change no bit."""
    plans = random_plans(study.sensitivity, study.costs(), count=6, seed=3)
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    with TrialMeasurer(study, tokens, KL, cache_bytes=1 << 26) as measurer:
        found = [measurer.measure(plan.assignment) for plan in [*plans, *reversed(plans)]]
        assert measurer.blocks_skipped > 0
    for plan, measured in zip([*plans, *reversed(plans)], found, strict=True):
        record = study.add_plan("alone", plan)
        with PlanMeasurer(study, tokens) as alone:
            expected = alone.measure(record)
        assert measured.kl_per_sequence == expected.kl_per_sequence
        assert measured.complete


def test_a_trial_that_is_stopped_has_the_first_sequences_only(study):
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    plan = study.plan().to_plan()
    with TrialMeasurer(study, tokens, KL) as measurer:
        whole = measurer.measure(plan.assignment)
        part = measurer.measure(plan.assignment, stop=lambda so_far: True)
    assert not part.complete
    assert part.losses == whole.losses[: study.config.batch_size]


def test_the_model_has_its_own_weights_after_measuring(study):
    model = study.loaded().model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    with TrialMeasurer(study, tokens, KL) as measurer:
        measurer.measure(study.plan().to_plan().assignment)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_outputs_that_are_not_finite_fail_the_trial(study, monkeypatch):
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    plan = study.plan().to_plan()
    with TrialMeasurer(study, tokens, KL) as measurer:
        measurer.measure(plan.assignment)
        monkeypatch.setattr(
            TrialMeasurer,
            "_forward",
            lambda self, ids: torch.full((*ids.shape, 288), math.nan),
        )
        with pytest.raises(EvaluationError, match="NaN"):
            measurer.measure(plan.assignment)


def test_metrics_of_trials_are_those_of_other_measurements(study):
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    with TrialMeasurer(study, tokens, Aim(parse_objective("ppl"))) as measurer:
        found = measurer.measure(study.plan().to_plan().assignment)
    with PlanMeasurer(study, tokens) as alone:
        expected = alone.measure(study.plan())
    assert found.loss == pytest.approx(expected.perplexity, rel=1e-9)
    assert found.metrics["kl_divergence"] == pytest.approx(expected.kl_divergence.value, rel=1e-12)
