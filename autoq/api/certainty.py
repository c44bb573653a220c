"""When a scoring pass may end: once the plan that is asked for would be chosen again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.models import ModelMap
from autoq.progress import Progress
from autoq.search import SensitivityTable
from autoq.search.estimators import Estimator
from autoq.search.stability import Solver, Stability, is_checkpoint, plan_stability


class Certainty:
    """How sure a plan is after so many sequences.

    Whether a pass ends depends on its batches and on nothing else, so one that was interrupted
    ends where it would have ended.
    """

    def __init__(self, model_map: ModelMap, confidence: float | None, solver: Solver) -> None:
        """
        Args:
            confidence: that is asked for; None asks for none.
            solver: scores -> the plan for the budget, exact to well within `RELATIVE_SLACK`.
        """
        self._groups = tuple(group.name for group in model_map.groups)
        self._confidence = confidence
        self._solver = solver

    def is_enough(
        self, estimator: Estimator, batches: int, contributions: NDArray[np.float64]
    ) -> bool:
        """Whether the plan is as sure as asked; looked at whenever the batches have doubled."""
        if self._confidence is None or not is_checkpoint(batches, len(contributions)):
            return False
        return self._stability(estimator, contributions).reaches(self._confidence)

    def report(
        self, estimator: Estimator, contributions: NDArray[np.float64], progress: Progress
    ) -> dict[str, Any] | None:
        """What was reached, as plain data; said aloud where it is less than what was asked for."""
        if self._confidence is None:
            return None
        found = self._stability(estimator, contributions)
        if not found.reaches(self._confidence):
            progress.note(
                f"the data is too small for the confidence asked: the plan is within "
                f"{found.relative_slack:.0%} of the best in {found.confidence:.0%} of the draws "
                f"of its {found.sequences} sequences, and {self._confidence:.0%} were asked for; "
                f"about {found.sequences_needed} sequences would do (--calib-sequences)"
            )
        return {
            "asked": self._confidence,
            "reached": found.confidence,
            "sequences": found.sequences,
            "sequences_needed": found.sequences_needed,
            "relative_slack": found.relative_slack,
        }

    def _stability(self, estimator: Estimator, contributions: NDArray[np.float64]) -> Stability:
        assert self._confidence is not None
        table = SensitivityTable(
            groups=self._groups,
            formats=estimator.formats,
            contributions=estimator.finish(contributions),
            unit=estimator.unit,
            estimator=estimator.name,
        )
        return plan_stability(table, self._solver, self._confidence)
