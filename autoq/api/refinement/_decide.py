"""From finalists to the plan that is taken: what fresh and held-out data say of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from autoq.api.refinement._data import RefineData
from autoq.api.refinement._earlier import earlier_refinement
from autoq.api.refinement._fresh import FreshAim, FreshMeasurements, OnFresh, choose, is_worse
from autoq.api.refinement._metrics import Aim
from autoq.search.refine import Trial, Verdict
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What fresh and held-out data say."""

    finalists: Sequence[Trial]  # the start first
    measured: Sequence[OnFresh]  # of each; empty where nothing can be confirmed
    chosen: Trial | None  # that takes the start's place
    kept: PlanRecord | None  # of an earlier refinement, where nothing was chosen and it stays
    verdict: Verdict
    remarks: Sequence[str] = ()


def decide(
    study: Study,
    start: PlanRecord,
    finalists: list[Trial],
    aim: FreshAim,
    data: RefineData,
    trials_aim: Aim,
    fresh: FreshMeasurements,
    floor: float,
    broken: str,
) -> Decided:
    """Which plan stands in the start's place from now on.

    Args:
        finalists: trials that may, the start first.
        aim: what can be confirmed of `trials_aim`, which is what the trials were chosen by.
        floor: improvement of the objective that means nothing.
        broken: constraints that the start breaks where trials were chosen, or nothing.
    """
    if not aim.can_confirm:
        known = study.refined(start)
        kept = None if known.id == start.id else known
        return Decided(
            finalists=finalists, measured=(), chosen=None, kept=kept, verdict=aim.verdict
        )
    earlier = earlier_refinement(study, start, finalists, trials_aim, data.selection, fresh)
    candidates = list(finalists)
    if earlier is not None and earlier.trial not in finalists:
        finalists = [*finalists, earlier.trial]
        if not earlier.breaks:  # as the trials do where the start breaks a constraint
            candidates = finalists
    measured = fresh.of(finalists, data.fresh, aim.aim, "confirming")
    chosen, verdict = choose(candidates, measured[: len(candidates)], floor, broken)
    objective = replace(aim.aim, constraints=())

    def loses_on_held_out(trial: Trial) -> bool:
        own, found = fresh.of([finalists[0], trial], data.report, objective, "checking")
        return is_worse(found.losses, own.losses, floor)

    tried = chosen
    if chosen is not None and not broken and loses_on_held_out(chosen):
        chosen = None
        reason = "the best trial won on fresh tokens and lost on the held-out ones"
        verdict = replace(verdict, better=False, reason=reason)
    decided = partial(Decided, finalists=finalists, measured=measured, verdict=verdict)
    if chosen is not None or earlier is None:
        return decided(chosen=chosen, kept=None)
    reason = earlier.against(measured[finalists.index(earlier.trial)], measured[0], floor)
    if not reason and (earlier.trial is tried or loses_on_held_out(earlier.trial)):
        reason = "it is worse than the start on held-out tokens"
    if not reason:
        return decided(chosen=None, kept=earlier.plan)
    remark = f"what an earlier refinement found is not kept: {reason}"
    return decided(chosen=None, kept=None, remarks=(remark,))
