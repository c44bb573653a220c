"""Judging a study's predictions: real divergences of random and of near-optimal plans."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from autoq.api.measured import KL_DIVERGENCE, VALIDATION, with_interval
from autoq.api.measuring import PlanMeasurer, held_out_tokens
from autoq.api.renewal import RenewingProgress
from autoq.errors import InputError
from autoq.evaluators import (
    calibrate_prediction,
    calibrated_coverage,
    prediction_quality,
)
from autoq.evaluators.prediction import FEWEST_FOR_CALIBRATION
from autoq.progress import Progress, SilentProgress
from autoq.search import Budget, CostTable, Plan, Resource, reachable_bits, solve
from autoq.search.diverse import diverse_plans
from autoq.search.sampling import RELATIVE_GAP, neighbours, random_plans
from autoq.studies import MeasurementRecord

if TYPE_CHECKING:
    from autoq.api.study import Study

RANDOM, NEAR = "random", "near"
"""Kinds of plans; near-optimal ones are those that search would return."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    kind: str
    plan: Plan


def validate(
    study: Study,
    *,
    random: int = 40,
    near: int = 40,
    sequences: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure random and near-optimal plans on held-out tokens, and judge the prediction by them.

    Random plans have their bits spread over the whole range. Half of the near-optimal ones are the
    best for evenly spaced budgets. The others are within the study's own budgets: its plan, plans
    that are as good by the scores (`diverse_plans`), and the best that give one group another
    format. Equal assignments are measured once, and never again on the same tokens:
    a validation that was interrupted continues, and one for more plans measures the new ones.

    Args:
        random: how many random plans.
        near: how many near-optimal ones; a small model may have fewer.
        sequences: how many held-out sequences.
        seed: of the plans.
    Returns:
        What `Study.validation` gives from then on; the keys are documented in the README.
    Raises:
        InputError: fewer than two plans are asked for, or the study has no plan yet.
        StudyLockedError: another process works on the study.
    """
    if random < 0 or near < 0 or random + near < 2:
        raise InputError(
            "a validation needs two plans at least, random or near-optimal, got "
            f"{random} and {near}; ask for more"
        )
    candidates = _distinct(chain(_random(study, random, seed), _near(study, near, seed)))
    tokens = held_out_tokens(study, sequences=sequences)
    started = time.perf_counter()
    with (
        study.store.lease(study.id) as lease,
        PlanMeasurer(study, tokens) as measurer,
    ):
        renewing = RenewingProgress(progress or SilentProgress(), lease)
        floor = measurer.noise_floor(renewing)
        plans = _measure_all(study, candidates, measurer, tokens.sha256, seed, renewing)
        payload = {
            "random": random,
            "near": near,
            "seed": seed,
            "sequences": int(tokens.ids.shape[0]),
            "tokens": int(tokens.ids.size),
            "data": tokens.description,
            "data_sha256": tokens.sha256,
            "unit": study.sensitivity.unit,
            "estimator": study.sensitivity.estimator,
            "noise_floor": with_interval(floor),
            **_judgement(plans),
            "plans": plans,
        }
        _store(study, payload, time.perf_counter() - started)
    found = study.validation
    assert found is not None  # it was stored just now
    return found


def _random(study: Study, count: int, seed: int) -> Iterator[_Candidate]:
    costs = study.costs(study.rules)
    if count:
        for plan in random_plans(study.sensitivity, costs, count=count, seed=seed):
            yield _Candidate(RANDOM, plan)


def _near(study: Study, count: int, seed: int) -> Iterator[_Candidate]:
    """The best plans for evenly spaced budgets, then those round the study's own plan."""
    costs = study.costs(study.rules)
    own = with_known_budgets(study.unrefined_plan().to_plan(), costs)
    assignments: set[tuple[tuple[str, str], ...]] = set()
    at_budgets = _at_budgets(study, costs, count - count // 2)
    for plan in chain(at_budgets, [own], _round(study, costs, own, count // 4, seed)):
        if len(assignments) == count:
            return
        key = _key(plan.assignment)
        if key not in assignments:
            assignments.add(key)
            yield _Candidate(NEAR, plan)


def _round(study: Study, costs: CostTable, own: Plan, diverse: int, seed: int) -> Iterator[Plan]:
    """Plans as good by the scores, then the best with one group elsewhere, as many as are asked."""
    if diverse:
        budgets = own.budgets or own.budget_bits
        yield from diverse_plans(study.sensitivity, costs, budgets, count=diverse, seed=seed)
    yield from neighbours(study.sensitivity, costs, own, seed=seed)


def with_known_budgets(plan: Plan, costs: CostTable) -> Plan:
    """The plan with those of its budgets that the table has costs of.

    Latency is that of one GPU, which the study does not keep: a plan within a latency budget has
    its own bits as budget instead.
    """
    always = (Resource.EFFECTIVE_BITS, Resource.STORED_BYTES)
    kept = [item for item in plan.budgets if item.resource in {*always, *costs.additional}]
    if len(kept) < len(plan.budgets):
        kept.append(Budget(resource=Resource.EFFECTIVE_BITS, limit=plan.effective_bits))
    return replace(plan, budgets=tuple(kept))


def _at_budgets(study: Study, costs: CostTable, count: int) -> Iterator[Plan]:
    """From the smallest plan up; the largest one has next to no loss to predict."""
    floor, ceiling = reachable_bits(study.sensitivity, costs)
    for bits in np.linspace(floor, ceiling, count, endpoint=False):
        yield solve(study.sensitivity, costs, float(bits), relative_gap=RELATIVE_GAP)


def _distinct(candidates: Iterable[_Candidate]) -> list[_Candidate]:
    found: dict[tuple[tuple[str, str], ...], _Candidate] = {}
    for candidate in candidates:
        found.setdefault(_key(candidate.plan.assignment), candidate)
    return list(found.values())


def _measure_all(
    study: Study,
    candidates: Sequence[_Candidate],
    measurer: PlanMeasurer,
    data_sha256: str,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    stored = _stored_divergences(study, data_sha256)
    with progress.task("validating", len(candidates) * measurer.steps) as advance:
        for index, candidate in enumerate(candidates):
            key = _key(candidate.plan.assignment)
            if key in stored:
                advance(measurer.steps)
                continue
            label = f"{VALIDATION} {candidate.kind} {index}, seed {seed}"
            record = study.store.plan(study.store.add_plan(study.id, candidate.plan, label=label))
            measurer.measure_silently(record, advance)
    stored = _stored_divergences(study, data_sha256)
    return [_row(candidate, stored[_key(candidate.plan.assignment)]) for candidate in candidates]


def _stored_divergences(
    study: Study, data_sha256: str
) -> dict[tuple[tuple[str, str], ...], MeasurementRecord]:
    """Assignment -> its divergence on these tokens, whatever the plan was called."""
    plans = {plan.id: plan for plan in study.plans()}
    return {
        _key(plans[record.plan_id].assignment): record
        for record in study.store.measurements(study.id)
        if record.plan_id is not None
        and record.metric == KL_DIVERGENCE
        and record.data_sha256 == data_sha256
    }


def _key(assignment: Mapping[Any, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(assignment.items()))


def _row(candidate: _Candidate, record: MeasurementRecord) -> dict[str, Any]:
    low, high = candidate.plan.predicted_loss_interval
    return {
        "plan_id": record.plan_id,
        "label": record.label,
        "kind": candidate.kind,
        "effective_bits": candidate.plan.effective_bits,
        "predicted": {"value": candidate.plan.predicted_loss, "low": low, "high": high},
        "measured": with_interval(record),
    }


def _judgement(plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Quality over all plans and by kind, and the line that corrects predictions.

    The line is drawn through the near-optimal plans, because those are what search returns and
    what their predicted loss was minimised for; through all where they are too few.
    """
    groups = {
        "all": list(plans),
        RANDOM: [row for row in plans if row["kind"] == RANDOM],
        NEAR: [row for row in plans if row["kind"] == NEAR],
    }
    fitted_on = NEAR if len(groups[NEAR]) >= FEWEST_FOR_CALIBRATION else "all"
    predicted, measured = _values(groups[fitted_on])
    line = calibrate_prediction(predicted, measured)
    return {
        "quality": {name: _quality(rows) for name, rows in groups.items() if rows},
        "calibration": None if line is None else line.to_json(),
        "calibrated_on": fitted_on,
        "calibrated_coverage": calibrated_coverage(predicted, measured),
    }


def _quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    predicted, measured = _values(rows)
    intervals = [(row["predicted"]["low"], row["predicted"]["high"]) for row in rows]
    found = prediction_quality(predicted, measured, intervals)
    return {
        "plans": found.plans,
        "rank_correlation": found.rank_correlation,
        "slope": found.slope,
        "ratio": found.ratio,
        "coverage": found.coverage,
    }


def _values(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return (
        [row["predicted"]["value"] for row in rows],
        [row["measured"]["value"] for row in rows],
    )


def _store(study: Study, payload: Mapping[str, Any], seconds: float) -> None:
    """The stage's result in one go: until it is there, an earlier one stays."""
    status = study.store.study(study.id).status
    study.store.reset_stage(study.id, VALIDATION)
    study.store.begin_stage(study.id, VALIDATION)
    study.store.finish_stage(study.id, VALIDATION, seconds, payload)
    study.store.set_status(study.id, status)
