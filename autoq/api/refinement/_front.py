"""The front of measured loss against effective bits, stored plan by plan."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from autoq.api.measured import REFINEMENT, with_interval
from autoq.api.measuring import PlanMeasurer
from autoq.api.refinement._confirm import RESULT, Confirmed, about_tokens, divergences_on
from autoq.api.refinement._data import RefineData
from autoq.api.refinement._trials import read_history
from autoq.errors import InputError
from autoq.progress import Progress
from autoq.search import effective_bits, plan_from_assignment
from autoq.search.refine import measured_front
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from optuna.study import Study as Trials

    from autoq.api.refinement.options import RefineOptions
    from autoq.api.study import Study


def confirm_front(
    study: Study,
    start: PlanRecord,
    trials: Trials,
    data: RefineData,
    options: RefineOptions,
    progress: Progress,
) -> Confirmed:
    """Store the plans that no other trial beats in both, and measure them on held-out tokens.

    Which plans are on the front was chosen by the trials' tokens; what is reported of them is
    their divergence on others. No plan takes the place of `start`.

    Raises:
        InputError: no trial could be measured.
    """
    finished = read_history(trials).finished
    done_for = [len(finished), data.report.sha256]
    known = json.loads(trials.user_attrs.get(RESULT, "{}"))
    if known.get("done_for") == done_for:
        return Confirmed(start, known)
    costs = study.costs(study.rules)
    front = measured_front(finished, costs)
    if not front:
        raise InputError(
            "a front needs plans that can be measured, and no trial could; measure with --dtype "
            "float32 or ask for other formats"
        )
    plans = [
        study.add_plan(
            f"front at {effective_bits(costs, trial.assignment):.4f} bits",
            plan_from_assignment(
                study.sensitivity,
                costs,
                trial.assignment,
                effective_bits(costs, trial.assignment),
            ),
            details={REFINEMENT: trials.study_name},
        )
        for trial in front
    ]
    measured = divergences_on(study, data.report)
    with PlanMeasurer(study, data.report) as measurer:
        measurer.noise_floor(progress)
        for plan in plans:
            if plan.id not in measured:
                measurer.measure(plan, progress)
    measured = divergences_on(study, data.report)
    found = {
        "objective": options.objective,
        "front": [
            {
                "plan_id": plan.id,
                "label": plan.label,
                "trial": trial.number,
                "effective_bits": plan.effective_bits,
                "stored_bytes": plan.stored_bytes,
                "selected_at": trial.loss,
                "held_out": with_interval(measured[plan.id]),
            }
            for plan, trial in zip(plans, front, strict=True)
        ],
        "selection": about_tokens(data.selection),
        "held_out": about_tokens(data.report),
        "trials": len(finished),
        "done_for": done_for,
    }
    trials.set_user_attr(RESULT, json.dumps(found))
    return Confirmed(start, found)
