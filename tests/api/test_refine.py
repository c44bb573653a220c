"""Refining by measuring: what trials cost, who shares them, and what is believed in the end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest
import torch

import autoq
from autoq.api import open_study
from autoq.api._refine_data import refine_data
from autoq.api._refine_measure import TrialMeasurer
from autoq.api._refine_metrics import Aim
from autoq.api._refine_trials import LOSSES, PLAN, POSITION, SOURCE, DeadTrials, read_history
from autoq.api._refine_worker import Worker
from autoq.api.measuring import PlanMeasurer
from autoq.api.refining import RefineOptions, open_trials
from autoq.errors import EvaluationError, InputError, ModelError, UnknownNameError
from autoq.evaluators import parse_objective
from autoq.progress import SilentProgress
from autoq.search import effective_bits
from autoq.search.refine import Refinement
from autoq.search.sampling import random_plans
from autoq.studies import (
    WORKER,
    WorkStatus,
    grace_seconds_of,
    has_heartbeat,
    trial_storage,
    worker_identity,
    worker_is_gone,
)

KL = Aim(parse_objective("kl"))
SMALL = {"sequences": 4, "fresh_sequences": 4, "held_out_sequences": 2}


QUICK = {
    "formats": ("fp8", "nvfp4"),
    "effective_bits": 6.0,
    "calibration_sequences": 6,
    "sequence_length": 32,
    "batch_size": 2,
    "held_out_sequences": 2,
}


@pytest.fixture(scope="module")
def searched(llama_folder, tmp_path_factory):
    """A store with one study, searched once for all tests."""
    path = tmp_path_factory.mktemp("searched") / "studies.db"
    autoq.search(llama_folder, **QUICK, store=f"sqlite:///{path}").store.close()
    return path


@pytest.fixture
def copy_of(searched, tmp_path):
    def copy(name):
        shutil.copyfile(searched, tmp_path / name)
        return open_study(None, f"sqlite:///{tmp_path / name}")

    return copy


@pytest.fixture
def study(copy_of):
    return copy_of("studies.db")


def entries(study, **options):
    """What each trial of the refinement is, by its place."""
    trials = open_trials(study, study.unrefined_plan(), RefineOptions(**{**SMALL, **options}))
    counted = [entry for entry in trials.get_trials() if LOSSES in entry.user_attrs]
    counted.sort(key=lambda entry: entry.user_attrs[POSITION])
    return [
        (entry.user_attrs[PLAN], entry.user_attrs[SOURCE], entry.user_attrs[LOSSES], entry.params)
        for entry in counted
    ]


# What a trial measures


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


def test_the_three_parts_of_the_data_share_no_sequence(study):
    data = refine_data(study, RefineOptions(**SMALL))
    rows = [tuple(row) for part in (data.selection, data.fresh, data.report) for row in part.ids]
    assert len(rows) == len(set(rows)) == 4 + 4 + 2
    assert data.remark is None


def test_without_further_tokens_the_held_out_part_is_split_and_that_is_said(
    llama_folder, quick, tmp_path
):
    ids = np.random.default_rng(0).integers(4, 260, (32, 32))
    np.save(tmp_path / "ids.npy", ids)  # 24 sequences to calibrate on, 8 held out
    quick |= {"calibration_sequences": 24, "calibration_data": str(tmp_path / "ids.npy")}
    found = autoq.search(llama_folder, **quick)
    options = RefineOptions(sequences=4, fresh_sequences=16, held_out_sequences=8)
    data = refine_data(found, options)
    assert (len(data.fresh.ids), len(data.report.ids)) == (4, 4)
    assert {tuple(row) for row in data.fresh.ids}.isdisjoint(tuple(row) for row in data.report.ids)
    assert "held-out part is split" in data.remark


# The procedure


def test_a_refinement_measures_as_many_plans_as_asked_each_within_the_budget(study):
    result = study.refine(trials=6, **SMALL)
    found = entries(study)
    assert result.trials == len(found) == 6
    assert found[0][1] == "start"
    assert json.loads(found[0][0]) == study.unrefined_plan().assignment
    assert len({plan for plan, *_ in found}) == 6
    costs = study.costs()
    assert all(effective_bits(costs, json.loads(plan)) <= 6.0 for plan, *_ in found)


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(copy_of):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        again = copy_of(f"{name}.db")
        again.refine(trials=5, seed=seed, **SMALL)
        found.append(entries(again, seed=seed))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_more_trials_go_on_where_fewer_ended(study):
    study.refine(trials=3, **SMALL)
    first = entries(study)
    result = study.refine(trials=6, **SMALL)
    assert entries(study)[:3] == first
    assert result.trials == 6
    assert study.refine(trials=6, **SMALL).as_plain() == result.as_plain()


def test_a_better_plan_is_taken_from_then_on_and_the_start_stays_beside_it(study, monkeypatch):
    from autoq.api import _refine_confirm, _refine_fresh
    from autoq.search.refine import Verdict

    start = study.unrefined_plan()

    def generous(*_args, **_options):
        return Verdict(better=True, difference=-1.0, low=-2.0, high=-0.5, reason="better")

    monkeypatch.setattr(_refine_fresh, "accepted", generous)
    monkeypatch.setattr(
        "autoq.search.refine.Refinement.finalists",
        lambda self, finished: sorted(finished, key=lambda trial: trial.number)[:2],
    )
    monkeypatch.setattr(_refine_confirm, "is_worse", lambda *_: False)
    result = study.refine(trials=2, **SMALL)
    assert result.improved
    assert result.plan.label == "6 bits, refined"
    assert study.plan().id == study.plan(6.0).id == result.plan.id
    assert study.plan().assignment == json.loads(entries(study)[1][0])
    assert study.unrefined_plan().id == start.id
    summary = study.summary()
    assert summary["refined_from"] == "6 bits"
    labels = [row["label"] for row in summary["measurements"]]
    assert labels == ["6 bits", "6 bits, refined"]
    assert open_study(None, study.store.url).plan().id == result.plan.id


def test_what_wins_by_luck_is_not_kept(study):
    """Tiny random models: with four sequences nothing is significant, and that is said."""
    result = study.refine(trials=5, **SMALL)
    if not result.improved:
        assert study.plan().id == study.unrefined_plan().id
        assert result.verdict["reason"]
        assert "refined" not in result.verdict["held_out"]


def test_a_search_can_refine_at_its_end(llama_folder, quick, tmp_path):
    options = {key: value for key, value in SMALL.items() if key != "held_out_sequences"}
    study = autoq.search(
        llama_folder, **quick, refine=3, refine_options=options, export=tmp_path / "out"
    )
    assert len(entries(study)) == 3
    assert study.summary()["export"]["path"] == str(tmp_path / "out")


# Failures


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


def test_a_start_that_cannot_be_measured_ends_the_refinement_at_once(study, monkeypatch):
    tried = []

    def fail(self, assignment, **options):
        tried.append(assignment)
        raise EvaluationError("the quantised model's output holds NaN or Inf")

    monkeypatch.setattr(TrialMeasurer, "measure", fail)
    for _ in range(2):  # run again, it says so without measuring
        with pytest.raises(InputError, match=r"^a refinement begins by .*NaN or Inf; search with"):
            study.refine(trials=20, **SMALL)
    assert tried == [study.unrefined_plan().to_plan().assignment]


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


def test_several_workers_need_a_store_that_they_can_share(llama_folder, quick):
    quick["store"] = "sqlite:///:memory:"
    study = autoq.search(llama_folder, **quick)
    with pytest.raises(InputError, match="share trials through the store"):
        study.refine(trials=2, workers=2, **SMALL)
    assert study.refine(trials=2, **SMALL).trials == 2


# Workers that die


def test_a_process_that_ended_is_known_to_be_gone():
    child = subprocess.Popen(
        [sys.executable, "-c", "from autoq.studies import worker_identity as w; print(w())"],
        stdout=subprocess.PIPE,
        text=True,
    )
    identity, _ = child.communicate()
    assert worker_is_gone(identity)
    assert not worker_is_gone(worker_identity())
    elsewhere = json.loads(identity)
    elsewhere[0] = "another-host"
    assert not worker_is_gone(json.dumps(elsewhere))


REFINE = """
import sys
from autoq.api import open_study
study = open_study(None, sys.argv[1])
study.refine(trials=int(sys.argv[2]), sequences=4, fresh_sequences=4, held_out_sequences=2)
"""


def start(store, trials):
    return subprocess.Popen(
        [sys.executable, "-c", REFINE, store, str(trials)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_trials(study, count, child):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert child.poll() is None, "it ended before it could be killed"
        if len(_numbers(study)) > count:
            return
        time.sleep(0.05)
    raise AssertionError("no trials")


def _numbers(study):
    storage = trial_storage(study.store.url)
    names = [entry.study_name for entry in optuna.get_all_study_summaries(storage=storage)]
    if not names:
        return []
    return optuna.load_study(study_name=names[0], storage=storage).get_trials()


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_trials_of_a_run_that_was_not(copy_of, study):
    child = start(study.store.url, 12)
    wait_for_trials(study, 3, child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    result = study.refine(trials=12, **SMALL)
    assert result.trials == 12
    undisturbed = copy_of("undisturbed.db")
    undisturbed.refine(trials=12, **SMALL)
    assert entries(study) == entries(undisturbed)


@pytest.mark.slow
def test_two_workers_share_the_trials_and_a_third_joins_them(study):
    other = start(study.store.url, 10)
    result = study.refine(trials=10, workers=2, **SMALL)
    assert other.wait(timeout=120) == 0
    assert result.trials == 10
    history = read_history(open_trials(study, study.unrefined_plan(), RefineOptions(**SMALL)))
    assert sorted(trial.number for trial in history.finished) == list(range(10))
    assert history.unfinished == 0


# Other aims than the divergence


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


def test_metrics_of_trials_are_those_of_other_measurements(study):
    tokens = refine_data(study, RefineOptions(**SMALL)).selection
    with TrialMeasurer(study, tokens, Aim(parse_objective("ppl"))) as measurer:
        found = measurer.measure(study.plan().to_plan().assignment)
    with PlanMeasurer(study, tokens) as alone:
        expected = alone.measure(study.plan())
    assert found.loss == pytest.approx(expected.perplexity, rel=1e-9)
    assert found.metrics["kl_divergence"] == pytest.approx(expected.kl_divergence.value, rel=1e-12)


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
    kept = lowest < values[0]
    assert result.improved is kept
    assert "breaks kl_divergence<=" in result.verdict["reason"]


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("perplexty", "did you mean perplexity"),
        ("cosine_similarity", "hidden states as its output"),
        ("kl - autoq_choices.accu", r"did you mean autoq_choices\.acc\?"),
        ("1 - ai2_arc", "ai2_arc must have one number"),
    ],
)
def test_metrics_that_nobody_has_are_refused_at_once(study, objective, message):
    error = UnknownNameError if "mean" in message else InputError
    with pytest.raises(error, match=message):
        study.refine(trials=2, objective=objective, **SMALL)
    assert optuna.get_all_study_summaries(storage=trial_storage(study.store.url)) == []


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
    from autoq.api._refine_optuna import few_words
    from autoq.api._refine_sampler import MultiplierSampler

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
    from autoq.api._refine_optuna import SAMPLER_STATE, few_words
    from autoq.api._refine_sampler import MultiplierSampler

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


# Trials of workers that died, and what earlier refinements found


def open_with(study, **options):
    return open_trials(study, study.unrefined_plan(), RefineOptions(**{**SMALL, **options}))


def test_a_trial_whose_worker_died_before_its_first_sign_is_tried_again(study, monkeypatch):
    trials = open_with(study, heartbeat_seconds=1, grace_seconds=1)
    forgotten = trials.ask()  # and nothing more is heard of it
    assert not has_heartbeat(trials._storage, forgotten._trial_id)
    assert grace_seconds_of(trials._storage) == 1.0
    dead, now = DeadTrials(trials), time.monotonic()
    dead.bring_back()
    assert trials.get_trials()[0].state is optuna.trial.TrialState.RUNNING
    monkeypatch.setattr(time, "monotonic", lambda: now + 5.0)
    dead.bring_back()
    states = [entry.state for entry in trials.get_trials()]
    assert states == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.WAITING]


def test_nothing_of_a_dead_worker_is_left_in_the_trial_that_is_tried_again(study):
    trials = open_with(study)
    robbed = trials.ask()
    host, namespace, _, started = json.loads(worker_identity())
    robbed.set_user_attr(WORKER, json.dumps([host, namespace, 2**22 + 1, started]))
    robbed.set_user_attr(POSITION, 0)
    DeadTrials(trials).bring_back()
    failed, waiting = trials.get_trials()
    assert failed.state is optuna.trial.TrialState.FAIL
    assert waiting.state is optuna.trial.TrialState.WAITING
    assert waiting.user_attrs == {POSITION: 0}


def test_a_worker_whose_trial_was_given_to_others_goes_on(study, monkeypatch):
    """As after a sleep of the machine: the trial failed in the store while it was measured."""
    notes, robbed = [], []
    record = Worker._record

    def too_late(worker, trial, measured):
        record(worker, trial, measured)
        if not robbed:
            robbed.append(trial.number)
            worker._trials._storage.set_trial_state_values(
                trial._trial_id, optuna.trial.TrialState.FAIL
            )

    monkeypatch.setattr(Worker, "_record", too_late)
    study.refine(trials=3, **SMALL, progress=NoteTaking(notes))
    assert robbed == [0]
    assert any("silent for too long" in note for note in notes)
    assert len(entries(study)) >= 3


class NoteTaking(SilentProgress):
    def __init__(self, notes):
        self.note = notes.append


def test_other_tokens_are_not_mixed_into_a_refinement(study):
    study.refine(trials=2, **SMALL)
    open_with(study).set_user_attr("selection_sha256", "of other tokens")
    with pytest.raises(InputError, match="measured on other tokens"):
        study.refine(trials=3, **SMALL)


def test_the_last_verdict_decides_which_plan_is_taken(study):
    start = study.unrefined_plan()
    other = study.add_plan("another", random_plans(study.sensitivity, study.costs(), count=1)[0])
    study.set_refined(start, other)
    assert study.refined(start).id == other.id
    assert study.store.study(study.id).status is WorkStatus.DONE
    study.set_refined(start, start)
    assert study.refined(start).id == start.id


def test_what_an_earlier_refinement_found_is_measured_again_beside_the_others(study):
    start = study.unrefined_plan()
    other = study.add_plan("another", random_plans(study.sensitivity, study.costs(), count=1)[0])
    study.set_refined(start, other)
    result = study.refine(trials=2, **SMALL)
    assert -1 in [row["trial"] for row in result.verdict["finalists"]]
    assert study.refined(start).id == result.plan.id


def test_a_start_that_breaks_a_constraint_stops_no_trial_early(study, monkeypatch):
    monkeypatch.setattr(Refinement, "hopeless", lambda *_: True)
    study.refine(trials=4, constraints=("kl<=1e-12",), **SMALL)
    trials = open_with(study, constraints=("kl<=1e-12",))
    finished = [entry for entry in trials.get_trials() if LOSSES in entry.user_attrs]
    assert len(finished) == 4
    assert all(entry.state is optuna.trial.TrialState.COMPLETE for entry in finished)
