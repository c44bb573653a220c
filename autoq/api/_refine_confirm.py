"""After the trials: whether the best of them is believed, and what is stored then.

Of many plans measured on the same tokens the best is partly the luckiest. So the few best are
measured again on tokens that chose nothing, and the start with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autoq.api._refine_data import RefineData
from autoq.api._refine_measure import TrialMeasurer
from autoq.api._refine_metrics import Aim
from autoq.api._refine_trials import broken_by_the_start, check_start, read_history
from autoq.api.measured import (
    KL_DIVERGENCE,
    REFINED_FROM,
    REFINEMENT,
    noise_floor_on,
    with_interval,
)
from autoq.api.measuring import PlanMeasurer
from autoq.data import TokenData
from autoq.errors import EvaluationError
from autoq.evaluators import compare, parse_objective
from autoq.models import Assignment
from autoq.progress import Progress
from autoq.search import plan_from_assignment
from autoq.search.refine import Refinement, Source, Trial, Verdict, accepted
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from optuna.study import Study as Trials

    from autoq.api.refining import RefineOptions
    from autoq.api.study import Study

RESULT = "result"
"""User attribute of the Optuna study: the verdict, as JSON."""


_MOST_KEPT = 2
"""Trials that are measured on fresh tokens where the start breaks a constraint."""


EARLIER = -1
"""Number of a finalist that no trial of this refinement found."""


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
    """Measure the finalists on fresh tokens and store the winner, if there is one.

    Done once for the same trials and tokens; processes that share them find the verdict.

    Raises:
        InputError: the start itself could not be measured.
    """
    finished = read_history(trials).finished
    done_for = [len(finished), data.fresh.sha256, data.report.sha256]
    known = json.loads(trials.user_attrs.get(RESULT, "{}"))
    if known.get("done_for") == done_for:
        return Confirmed(study.store.plan(known["plan_id"]), known)
    check_start(trials)
    broken = broken_by_the_start(trials)
    finalists = _finalists(refinement, finished, broken)
    before = study.refined(start)
    if before.id != start.id and not options.constraints:
        finalists = _with_refined(finalists, before)
    if data.remark is not None:
        progress.note(data.remark)
    losses = _losses(study, finalists, data.fresh, options, progress, "confirming")
    floor = float(trials.user_attrs["noise_floor"])
    chosen, verdict = _chosen(finalists, losses, floor, broken)
    if chosen is not None and not broken:
        held_out = _losses(
            study, [finalists[0], chosen], data.report, options, progress, "checking"
        )
        if is_worse(held_out[1], held_out[0], floor):
            chosen = None
            verdict = replace(
                verdict,
                better=False,
                reason="the best trial won on fresh tokens and lost on the held-out ones",
            )
    plan = start if chosen is None else _stored(study, start, chosen.assignment, trials.study_name)
    study.set_refined(start, plan)
    reported = _reported(study, [start] if plan is start else [start, plan], data.report, progress)
    found = {
        "accepted": plan is not start,
        "reason": verdict.reason,
        "difference": verdict.difference,
        "low": verdict.low,
        "high": verdict.high,
        "objective": options.objective,
        "noise_floor": floor,
        "finalists": [_row(trial, values) for trial, values in zip(finalists, losses, strict=True)],
        "selection": about_tokens(data.selection),
        "fresh": about_tokens(data.fresh),
        "held_out": {**about_tokens(data.report), **reported},
        "remark": data.remark,
        "trials": len(finished),
        "plan_id": plan.id,
        "done_for": done_for,
    }
    trials.set_user_attr(RESULT, json.dumps(_without_infinities(found)))
    return Confirmed(plan, found)


def is_worse(losses: Sequence[float], start: Sequence[float], noise_floor: float) -> bool:
    """Whether a plan that was accepted is significantly worse than its start after all."""
    if len(start) == 1:
        return losses[0] > start[0] + noise_floor
    return compare(losses, start, noise_floor).verdict == "worse"


def _losses(
    study: Study,
    plans: Sequence[Trial],
    tokens: TokenData,
    options: RefineOptions,
    progress: Progress,
    task: str,
) -> list[tuple[float, ...]]:
    """Of each plan, per sequence; of one that cannot be measured there, infinite."""
    found = []
    with (
        TrialMeasurer(
            study,
            tokens,
            Aim(parse_objective(options.objective)),
            cache_bytes=options.cache_bytes,
        ) as measurer,
        progress.task(task, len(plans) * measurer.steps) as advance,
    ):
        for plan in plans:
            try:
                found.append(measurer.measure(plan.assignment, advance=advance).losses)
            except EvaluationError:
                found.append((math.inf,) * len(tokens.ids))
    return found


def _finalists(refinement: Refinement, finished: Sequence[Trial], broken: str) -> list[Trial]:
    """The start and what may replace it; where the start breaks a constraint, any that keeps it."""
    if not broken:
        return refinement.finalists(finished)
    start = next(trial for trial in finished if trial.source is Source.START)
    kept = [trial for trial in finished if trial.complete and trial.losses and trial is not start]
    return [start, *sorted(kept, key=lambda trial: (trial.loss, trial.number))[:_MOST_KEPT]]


def _with_refined(finalists: list[Trial], refined: PlanRecord) -> list[Trial]:
    """What an earlier refinement of the same plan found is measured again beside the others."""
    assignment = refined.to_plan().assignment
    if any(dict(trial.assignment) == dict(assignment) for trial in finalists):
        return finalists
    earlier = Trial(
        number=EARLIER, source=Source.SWAP, assignment=assignment, losses=(), complete=True
    )
    return [*finalists, earlier]


def _chosen(
    finalists: Sequence[Trial], losses: Sequence[tuple[float, ...]], floor: float, broken: str
) -> tuple[Trial | None, Verdict]:
    """The accepted finalist of least loss on fresh tokens; of none, the best one's verdict."""
    start, others = losses[0], list(zip(finalists[1:], losses[1:], strict=True))
    others = [(trial, values) for trial, values in others if math.isfinite(sum(values))]
    if not others:
        reason = (
            f"the start breaks {broken}, and so does every trial"
            if broken
            else "no trial was better than the start on the tokens that trials are measured on"
        )
        return None, Verdict(better=False, difference=0.0, low=0.0, high=0.0, reason=reason)
    judged = [
        (trial, sum(values), _verdict(start, values, floor, len(others), broken))
        for trial, values in others
    ]
    trial, _, verdict = min(judged, key=lambda entry: (not entry[2].better, entry[1]))
    return (trial if verdict.better else None), verdict


def _verdict(
    start: Sequence[float], values: Sequence[float], floor: float, candidates: int, broken: str
) -> Verdict:
    difference = (sum(values) - sum(start)) / len(start)
    if broken:
        reason = f"the start breaks {broken}; of the trials that keep it this one loses least"
        return Verdict(
            better=True, difference=difference, low=-math.inf, high=math.inf, reason=reason
        )
    if len(start) > 1:
        return accepted(start, values, floor, candidates=candidates)
    reason = "the objective has no values per sequence, so nothing is known of its spread"
    return Verdict(
        better=difference < -floor,
        difference=difference,
        low=-math.inf,
        high=math.inf,
        reason=f"{reason}; the difference is {difference:.4g}",
    )


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


def _row(trial: Trial, losses: Sequence[float]) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "source": trial.source.value,
        "selected_at": sum(trial.losses) / len(trial.losses) if trial.losses else None,
        "fresh": sum(losses) / len(losses),
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
