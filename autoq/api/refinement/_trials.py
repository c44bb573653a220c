"""The trials of a refinement as Optuna keeps them, and as the search for plans wants them."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoq.api.refinement._data import Confirmations
from autoq.api.refinement._optuna import few_words
from autoq.errors import InputError
from autoq.formats import FormatName
from autoq.models import Assignment, GroupName
from autoq.search.refine import Source, Trial
from autoq.studies import (
    WORKER,
    grace_seconds_of,
    has_heartbeat,
    refuse_damaged_trial,
    worker_is_gone,
)

if TYPE_CHECKING:
    from optuna.study import Study as Trials
    from optuna.trial import FrozenTrial

# User attributes of the Optuna study.
OF_STUDY, OF_PLAN = "autoq_study", "autoq_plan"
"""Whose plan is refined, and its label."""
CONFIRMED_UNTIL = "confirmed_until"
"""For each confirmation, `RefineData.fresh_until`."""

# User attributes of a trial. The dashboard shows them as columns.
POSITION = "position"
"""Which of the refinement's trials it is; a trial that is tried again keeps its place."""
PLAN = "plan"
SOURCE = "source"
LOSSES = "losses"
FAILURE = "failure"
"""Why a trial could not be measured; a trial that failed without was interrupted."""
VIOLATES = "violates"
"""Constraints that the plan breaks, as a JSON list; a plan that breaks none has no such."""
SURPLUS = "surplus"
"""Of a trial that was begun when there was nothing left to do."""


@dataclass(frozen=True, slots=True)
class History:
    """What is known when a trial begins."""

    finished: tuple[Trial, ...]  # failed ones without losses
    running: tuple[Assignment, ...]
    counted: int  # trials that are finished or will be
    unfinished: int  # those of them that are running or wait to be tried again
    waiting: int
    attempts: Mapping[int, int]  # place -> how often nothing was found to try for it


def read_history(trials: Trials, *, before: int | None = None) -> History:
    """The trials so far.

    Args:
        before: the number of a trial; `counted` is then of those before it, and what is running
            is what other trials are.
    """
    from optuna.trial import TrialState

    everything = trials.get_trials(deepcopy=False)
    entries = [entry for entry in everything if _counts(entry)]
    others = [entry for entry in entries if entry.number != before]
    unfinished = [entry for entry in others if not entry.state.is_finished()]
    return History(
        finished=tuple(as_trial(entry) for entry in others if entry.state.is_finished()),
        running=tuple(_assignment(entry) for entry in unfinished if PLAN in entry.user_attrs),
        counted=sum(before is None or entry.number < before for entry in others),
        unfinished=len(unfinished),
        waiting=sum(entry.state is TrialState.WAITING for entry in unfinished),
        attempts=Counter(
            entry.user_attrs[POSITION]
            for entry in everything
            if {SURPLUS, POSITION} <= entry.user_attrs.keys()
        ),
    )


def done_trials(trials: Trials) -> int:
    """How many trials have ended; those that died are not among them."""
    entries = trials.get_trials(deepcopy=False)
    return sum(_counts(entry) and entry.state.is_finished() for entry in entries)


def as_trial(entry: FrozenTrial) -> Trial:
    """A finished trial as the search for plans knows it.

    Raises:
        StoreError: it is not as it was written.
    """
    from optuna.trial import TrialState

    refuse_damaged_trial(entry)
    attributes = entry.user_attrs
    failed = FAILURE in attributes
    source = Source(attributes[SOURCE])
    # The start is what others are measured against, whatever it breaks.
    allowed = VIOLATES not in attributes or source is Source.START
    return Trial(
        number=attributes[POSITION],
        source=source,
        assignment=_assignment(entry),
        losses=() if failed else tuple(json.loads(attributes[LOSSES])),
        complete=entry.state is TrialState.COMPLETE and allowed,
    )


def broken_by_the_start(trials: Trials) -> str:
    """The constraints that the start breaks, or nothing."""
    for entry in trials.get_trials(deepcopy=False):
        if entry.user_attrs.get(SOURCE) == Source.START and VIOLATES in entry.user_attrs:
            return ", ".join(json.loads(entry.user_attrs[VIOLATES]))
    return ""


def check_start(trials: Trials) -> None:
    """Refuse to go on from a start that cannot be measured: nothing could be compared with it.

    Raises:
        InputError: says why the measurement failed, and what to do, as the failure itself does.
    """
    for entry in trials.get_trials(deepcopy=False):
        if entry.user_attrs.get(SOURCE) == Source.START and FAILURE in entry.user_attrs:
            raise InputError(
                "a refinement begins by measuring the plan as it is, and that failed: "
                f"{entry.user_attrs[FAILURE]}"
            )


def confirmations_of(trials: Trials) -> Confirmations:
    """What the refinements of the same plan, whatever their aim, were confirmed on so far."""
    plan = {name: trials.user_attrs.get(name) for name in (OF_STUDY, OF_PLAN)}
    of_plan = [
        study.user_attrs.get(CONFIRMED_UNTIL, [])
        for study in trials._storage.get_all_studies()
        if {name: study.user_attrs.get(name) for name in plan} == plan
    ]
    ends = [end for own in of_plan for end in own]
    return Confirmations(count=len(ends), sequences=max(ends, default=0))


def note_confirmation(trials: Trials, until: int) -> None:
    """Keep what finalists were confirmed on, so that the next time takes other tokens."""
    before = trials.user_attrs.get(CONFIRMED_UNTIL, [])
    trials.set_user_attr(CONFIRMED_UNTIL, [*before, until])


def plan_text(assignment: Assignment) -> str:
    """A plan as one attribute: a parameter for each layer is slow to store and useless to learn from."""
    return json.dumps(dict(sorted(assignment.items())))


class DeadTrials:
    """Finds trials whose worker died, so that they are tried again."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._storage: Any = trials._storage  # what has heartbeats has no public name
        self._silent_since: dict[int, float] = {}  # trial -> when it was first seen so

    def bring_back(self) -> None:
        """Let all that are found be tried again.

        A worker on this machine is looked for. Others give signs of life, and Optuna finds those
        that ceased, but none that never began: a worker may die before the first.
        """
        from optuna.trial import TrialState

        fail_stale_trials(self._trials)
        for entry in self._trials.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = entry.user_attrs.get(WORKER)
            if self._is_forgotten(entry) if worker is None else worker_is_gone(worker):
                self._try_again(entry)

    def _is_forgotten(self, entry: FrozenTrial) -> bool:
        if has_heartbeat(self._storage, entry._trial_id):
            return False
        since = self._silent_since.setdefault(entry._trial_id, time.monotonic())
        return time.monotonic() - since > grace_seconds_of(self._storage)

    def _try_again(self, entry: FrozenTrial) -> None:
        import optuna

        try:
            failed = optuna.trial.TrialState.FAIL
            if not self._storage.set_trial_state_values(entry._trial_id, failed):
                return
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # another worker was faster
        callback = self._storage.get_heartbeat_stale_trial_callback()
        callback(self._trials, copy.deepcopy(self._storage.get_trial(entry._trial_id)))


def fail_stale_trials(trials: Trials) -> None:
    """As Optuna does it at the beginning of a trial, without its warning."""
    import optuna

    with few_words():
        optuna.storages.fail_stale_trials(trials)


def _counts(entry: FrozenTrial) -> bool:
    """Not surplus, no user's own, and not one that died: that is tried again under another number."""
    from optuna.trial import TrialState

    if SURPLUS in entry.user_attrs:
        return False
    if entry.state in (TrialState.COMPLETE, TrialState.PRUNED):
        return entry.user_attrs.keys() >= {POSITION, PLAN, SOURCE, LOSSES}
    return entry.state is not TrialState.FAIL or FAILURE in entry.user_attrs


def _assignment(entry: FrozenTrial) -> Assignment:
    plan: Mapping[str, str] = json.loads(entry.user_attrs[PLAN])
    return {GroupName(group): FormatName(fmt) for group, fmt in plan.items()}


def best_complete(finished: Sequence[Trial]) -> Trial | None:
    """The trial of least mean loss on all sequences."""
    complete = [trial for trial in finished if trial.complete and trial.losses]
    if not complete:
        return None
    return min(complete, key=lambda t: (sum(t.losses) / len(t.losses), t.number))
