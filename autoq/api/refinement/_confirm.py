"""After the trials: whether the best of them is believed, and what is stored then.

Of many plans measured on the same tokens the best is partly the luckiest. So the few best are
measured again on tokens and examples that chose nothing, and the start with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from autoq.api.measured import (
    KL_DIVERGENCE,
    REFINED_FROM,
    REFINEMENT,
    noise_floor_on,
    with_interval,
)
from autoq.api.measuring import PlanMeasurer
from autoq.api.refinement._data import RefineData, refine_data
from autoq.api.refinement._decide import decide
from autoq.api.refinement._fresh import FreshMeasurements, OnFresh, fresh_aim
from autoq.api.refinement._trials import (
    broken_by_the_start,
    check_start,
    confirmations_of,
    note_confirmation,
    read_history,
)
from autoq.data import TokenData
from autoq.errors import InputError
from autoq.evaluators import compare
from autoq.models import Assignment
from autoq.progress import Progress
from autoq.search import plan_from_assignment
from autoq.search.refine import Refinement, Source, Trial
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from optuna.study import Study as Trials

    from autoq.api.refinement.options import RefineOptions
    from autoq.api.study import Study

RESULT = "result"
"""User attribute of the Optuna study: the verdict, as JSON."""


_MOST_KEPT = 2
"""Trials that are measured on fresh tokens where the start breaks a constraint."""


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The plan to take from now on, and why."""

    plan: PlanRecord
    verdict: Mapping[str, Any]


def confirm(
    study: Study,
    start: PlanRecord,
    refinement: Refinement,
    trials: Trials,
    data: RefineData,
    options: RefineOptions,
    progress: Progress,
) -> Confirmed:
    """Measure the finalists on fresh tokens and examples, and store the winner, if there is one.

    Done once for the same trials and data; processes that share them find the verdict. Another
    time takes tokens that no confirmation of this plan has used, as long as there are any.

    Raises:
        InputError: the start itself could not be measured.
    """
    check_start(trials)
    finished = read_history(trials).finished
    done_for = [
        len(finished),
        options.fresh_sequences,
        data.selection.sha256,
        data.report.sha256,
    ]
    known = json.loads(trials.user_attrs.get(RESULT, "{}"))
    if known.get("done_for") == done_for:
        return Confirmed(study.store.plan(known["plan_id"]), known)
    before = confirmations_of(trials)
    if before.count:
        data = refine_data(study, options, before)
    aim = fresh_aim(options.aim)
    remarks = [*filter(None, [data.remark]), *aim.remarks(again=before.count > 0)]
    broken = broken_by_the_start(trials)
    finalists = _finalists(refinement, finished, broken)
    floor = float(trials.user_attrs["noise_floor"])
    fresh = FreshMeasurements(study, options.cache_bytes, progress)
    for remark in remarks:
        progress.note(remark)
    decided = decide(study, start, finalists, aim, data, options.aim, fresh, floor, broken)
    for remark in decided.remarks:
        progress.note(remark)
    remarks += decided.remarks
    chosen, measured, verdict = decided.chosen, decided.measured, decided.verdict
    if chosen is not None:
        plan = _stored(study, start, chosen.assignment, trials.study_name)
    else:
        plan = decided.kept or start
    if measured:  # without, nothing was learnt that could undo an earlier refinement
        study.set_refined(start, plan)
    reported = _reported(
        study, [start] if plan.id == start.id else [start, plan], data.report, progress
    )
    found = {
        "accepted": chosen is not None,
        "kept_earlier": decided.kept is not None,
        "reason": verdict.reason,
        "difference": verdict.difference,
        "low": verdict.low,
        "high": verdict.high,
        "objective": options.objective,
        "noise_floor": floor,
        "finalists": [
            _row(trial, found) for trial, found in zip_longest(decided.finalists, measured) if trial
        ],
        "selection": about_tokens(data.selection),
        "fresh": about_tokens(data.fresh),
        "fresh_examples": {
            task: {"fresh": count.fresh, "all": count.everything}
            for task, count in aim.examples.items()
        },
        "held_out": {**about_tokens(data.report), **reported},
        "remark": "; ".join(remarks) or None,
        "confirmations": before.count + 1,
        "trials": len(finished),
        "plan_id": plan.id,
        "done_for": done_for,
    }
    if len(measured) > 1:
        note_confirmation(trials, data.fresh_until)
    trials.set_user_attr(RESULT, json.dumps(_without_infinities(found)))
    return Confirmed(plan, found)


def _finalists(refinement: Refinement, finished: Sequence[Trial], broken: str) -> list[Trial]:
    """The start and what may replace it; where the start breaks a constraint, any that keeps it.

    Raises:
        InputError: the start was not measured.
    """
    found = _that_keep(finished) if broken else refinement.finalists(finished)
    if not found:
        raise InputError(
            "a refinement begins by measuring the plan as it is, and no trial did that; run it "
            "again with more trials"
        )
    return found


def _that_keep(finished: Sequence[Trial]) -> list[Trial]:
    start = next(trial for trial in finished if trial.source is Source.START)
    kept = [trial for trial in finished if trial.complete and trial.losses and trial is not start]
    return [start, *sorted(kept, key=lambda trial: (trial.loss, trial.number))[:_MOST_KEPT]]


def _stored(study: Study, start: PlanRecord, assignment: Assignment, refinement: str) -> PlanRecord:
    found = plan_from_assignment(
        study.sensitivity, study.costs(study.rules), assignment, start.budget_bits
    )
    before = start.to_plan()
    plan = replace(found, budgets=before.budgets, budget_bits=before.budget_bits)
    own = {"budgets", "takes", "least"}  # what the plan itself says
    details = {key: value for key, value in start.details.items() if key not in own}
    details |= {REFINED_FROM: start.id, REFINEMENT: refinement}
    return study.add_plan(f"{start.label}, refined", plan, details=details)


def _reported(
    study: Study, plans: Sequence[PlanRecord], tokens: TokenData, progress: Progress
) -> dict[str, Any]:
    """Held-out divergence of the start and of the refined plan, stored like every plan's."""
    known = divergences_on(study, tokens)
    missing = [plan for plan in plans if plan.id not in known]
    with PlanMeasurer(study, tokens) as measurer:
        measurer.noise_floor(progress)
        for plan in missing:
            measurer.measure(plan, progress)
    known = divergences_on(study, tokens)
    found: dict[str, Any] = {"start": with_interval(known[plans[0].id])}
    floor = noise_floor_on(study, tokens.sha256)
    if len(plans) > 1:
        found["refined"] = with_interval(known[plans[1].id])
        values = [known[plan.id].details["per_sequence"] for plan in plans]
        beside = compare(values[1], values[0], (floor.value if floor else None) or 0.0)
        found["refined_is"] = beside.verdict
        found["change"] = {
            "value": beside.difference,
            "low": beside.low,
            "high": beside.high,
        }
    return found


def divergences_on(study: Study, tokens: TokenData) -> dict[int, Any]:
    """Plan id -> its divergence on these tokens."""
    return {
        record.plan_id: record
        for record in study.store.measurements(study.id)
        if record.metric == KL_DIVERGENCE
        and record.plan_id is not None
        and record.data_sha256 == tokens.sha256
    }


def _row(trial: Trial, found: OnFresh | None) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "source": trial.source.value,
        "selected_at": sum(trial.losses) / len(trial.losses) if trial.losses else None,
        "fresh": found.loss if found is not None else None,
        "breaks": {name: excess for name, excess in found.excess.items() if excess > 0}
        if found is not None
        else {},
    }


def about_tokens(tokens: TokenData) -> dict[str, Any]:
    """Which tokens, as plain data."""
    return {
        "sequences": int(tokens.ids.shape[0]),
        "tokens": int(tokens.ids.size),
        "data": tokens.description,
        "data_sha256": tokens.sha256,
    }


def _without_infinities(value: Any) -> Any:
    """JSON has none."""
    if isinstance(value, dict):
        return {key: _without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
