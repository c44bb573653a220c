"""What tests of refinement have in common: small options, and a look at the trials."""

from __future__ import annotations

from autoq.api.refinement._metrics import Aim
from autoq.api.refinement._trials import LOSSES, PLAN, POSITION, SOURCE
from autoq.api.refinement.refining import RefineOptions, open_trials
from autoq.evaluators import parse_objective
from autoq.progress import SilentProgress
from autoq.search.refine import Refinement

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


def entries(study, **options):
    """What each trial of the refinement is, by its place."""
    trials = open_trials(study, study.unrefined_plan(), RefineOptions(**{**SMALL, **options}))
    counted = [entry for entry in trials.get_trials() if LOSSES in entry.user_attrs]
    counted.sort(key=lambda entry: entry.user_attrs[POSITION])
    return [
        (entry.user_attrs[PLAN], entry.user_attrs[SOURCE], entry.user_attrs[LOSSES], entry.params)
        for entry in counted
    ]


def the_second_is_a_finalist(monkeypatch):
    """The trial after the start is confirmed, however good it was."""
    monkeypatch.setattr(
        Refinement,
        "finalists",
        lambda self, finished: sorted(finished, key=lambda trial: trial.number)[:2],
    )


def open_with(study, **options):
    return open_trials(study, study.unrefined_plan(), RefineOptions(**{**SMALL, **options}))


class NoteTaking(SilentProgress):
    def __init__(self):
        self.notes = []
        self.note = self.notes.append
