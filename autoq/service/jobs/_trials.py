"""Trials of a refinement, told as they are finished."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from autoq.service.jobs._speech import Speech
from autoq.studies import StudyStore, is_in_memory, trial_storage
from autoq.wire import EventKind

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

TASK = "refining"
"""The task during which trials are finished."""

_OF_STUDY = "autoq_study"
_LOOK_SECONDS = 1.0


class TrialWatch:
    """Looks for finished trials while a refinement advances.

    What was finished before is not told: an earlier attempt of the job told it, or it belongs to
    another refinement of the study.
    """

    def __init__(self, store: StudyStore, speech: Speech) -> None:
        self._url, self._speech = store.url, speech
        self._storage: BaseStorage | None = None
        self._told: set[int] = set()
        self._looked = 0.0
        self.study: str | None = None

    def listen(self, task: str) -> None:
        """See `EventProgress.listeners`."""
        if task != TASK or is_in_memory(self._url):
            return
        if self._storage is None:
            self._storage = trial_storage(self._url)
            self._told = {trial._trial_id for trial in self._finished()}
        elif time.monotonic() - self._looked >= _LOOK_SECONDS:
            self.tell_new()

    def tell_new(self) -> None:
        """Tell the trials that were finished since the last look."""
        self._looked = time.monotonic()
        for trial in self._finished() if self._storage is not None else ():
            if trial._trial_id not in self._told:
                self._told.add(trial._trial_id)
                self._speech.event(
                    EventKind.TRIAL,
                    number=trial.number,
                    state=trial.state.name.lower(),
                    values=list(trial.values or ()),
                    accepted=None,
                )

    def _finished(self) -> list[FrozenTrial]:
        assert self._storage is not None
        storage = self._storage
        own = [
            study._study_id
            for study in storage.get_all_studies()
            if study.user_attrs.get(_OF_STUDY) == self.study
        ]
        trials = [t for study in own for t in storage.get_all_trials(study, deepcopy=False)]
        return [trial for trial in trials if trial.state.is_finished()]
