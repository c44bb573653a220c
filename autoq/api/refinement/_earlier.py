"""What an earlier refinement of the same plan found: it stays until data speak against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoq.api.refinement._fresh import FreshMeasurements, OnFresh, is_worse
from autoq.api.refinement._metrics import Aim
from autoq.data import TokenData
from autoq.search.refine import Source, Trial
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study

EARLIER = -1
"""Number of a finalist that no trial of this refinement found."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """A plan that an earlier refinement made of the start, whatever its aim was."""

    plan: PlanRecord
    trial: Trial
    breaks: tuple[str, ...] = ()  # constraints, where trials are measured
    more_than_start: tuple[str, ...] = ()  # those of them that it breaks by more than the start

    def against(self, found: OnFresh, start: OnFresh, noise_floor: float) -> str:
        """Why it does not stay in the start's place; nothing where it does.

        It was significantly better than the start when it was accepted; to be so again, on each
        refinement's tokens, would be to lose it by chance.

        Args:
            found: what it is on fresh data, and `start` what the start is there.
        """
        broken = self.more_than_start or tuple(found.breaks_more_than(start))
        if broken:
            return f"it breaks {', '.join(broken)}"
        if not found.is_finite:
            return "it cannot be measured"
        if is_worse(found.losses, start.losses, noise_floor):
            return "it is worse than the start on fresh data"
        return ""


def earlier_refinement(
    study: Study,
    start: PlanRecord,
    finalists: Sequence[Trial],
    aim: Aim,
    selection: TokenData,
    fresh: FreshMeasurements,
) -> Earlier | None:
    """What stands in the start's place now; None where that is the start itself.

    Args:
        finalists: of this refinement, the start first.
        aim: of its trials, and `selection` their tokens: what keeps constraints must keep them
            there, as the trials do; tasks with few examples are measured nowhere else.
    """
    plan = study.refined(start)
    if plan.id == start.id:
        return None
    assignment = plan.to_plan().assignment
    for trial in finalists[1:]:
        if dict(trial.assignment) == dict(assignment):
            return Earlier(plan, trial)
    trial = Trial(
        number=EARLIER, source=Source.SWAP, assignment=assignment, losses=(), complete=True
    )
    if not aim.constraints:
        return Earlier(plan, trial)
    own, found = fresh.of([finalists[0], trial], selection, aim, "measuring what was found before")
    breaks = tuple(name for name, excess in found.excess.items() if excess > 0)
    return Earlier(plan, trial, breaks, tuple(found.breaks_more_than(own)))
