"""Numbers for the trials that ask for some, drawn by one of Optuna's samplers.

Most trials of a refinement have no parameters: their plan follows from what was measured before.
Optuna's samplers look for parameters that all trials have in common and would find none. So those
trials that do have parameters are put into a small study in memory, which is asked for the next
ones. Its sampler is seeded by the trial's place: a refinement that was interrupted goes on with
the same numbers that it would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

import torch
from optuna.samplers import BaseSampler

from autoq.api.refinement._optuna import SAMPLER_STATE, check_sampler, few_words

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_FIRST_RANDOM = 5
"""Trials with parameters before a model is fitted to them."""

_POPULATION = 10
"""Of NSGA-II: a refinement has tens of such trials, not thousands."""


class MultiplierSampler(BaseSampler):
    """Draws the parameters of one trial jointly, from the trials before that have parameters."""

    def __init__(self, name: str, seed: int) -> None:
        """
        Args:
            name: one of `SAMPLERS`.
            seed: with a trial's place it decides what that trial gets.
        """
        self._name, self._seed = check_sampler(name), seed
        self._place = ""
        self._drawn: dict[str, Any] | None = None  # what the trial at hand gets
        self.state: dict[str, Any] = {}  # what the next trials' sampler wants to find

    def begin(self, place: int, attempt: int = 0) -> None:
        """Draw for another trial from now on: the one at this place of the refinement.

        Args:
            attempt: how often numbers were drawn for this place that led to nothing.
        """
        self._place = f"{place}/{attempt}" if attempt else f"{place}"
        self._drawn, self.state = None, {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Nothing is drawn before it is asked for."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing, as its search space."""
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The parameter's value: from the trial's joint draw, or random where nothing is known."""
        if self._drawn is None:
            self._drawn = self._joint(study, trial.number)
        limits: Any = param_distribution  # only numbers are asked for
        drawn = self._drawn.get(param_name)
        if drawn is not None and limits.low <= drawn <= limits.high:
            return drawn
        generator = random.Random(f"{self._seed}/{self._place}/{param_name}")
        return generator.uniform(limits.low, limits.high)

    def _joint(self, study: Study, number: int) -> dict[str, Any]:
        import optuna

        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        before = [
            trial
            for trial in study.get_trials(deepcopy=False, states=states)
            if trial.params and trial.number < number
        ]
        if not before:
            return {}
        space = before[-1].distributions
        like_it = [trial for trial in before if trial.distributions == space]
        # A trial runs without gradients; the Gaussian process wants its own.
        with few_words(), torch.enable_grad():
            inner = optuna.create_study(
                directions=study.directions, sampler=self._sampler(self._seed_here())
            )
            inner.add_trials([_copied(trial) for trial in like_it])
            asked = inner.ask(space)
            self.state = dict(inner.trials[-1].system_attrs)
        return dict(asked.params)

    def _seed_here(self) -> int:
        digest = hashlib.sha256(f"{self._seed}/{self._place}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _sampler(self, seed: int) -> BaseSampler:
        from optuna import samplers

        if self._name == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=_FIRST_RANDOM)
        if self._name == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)
        return samplers.TPESampler(seed=seed, n_startup_trials=_FIRST_RANDOM)


def _copied(trial: FrozenTrial) -> FrozenTrial:
    import optuna

    return optuna.create_trial(
        state=trial.state,
        values=trial.values,
        params=trial.params,
        distributions=trial.distributions,
        system_attrs=json.loads(trial.user_attrs.get(SAMPLER_STATE, "{}")),
        intermediate_values=trial.intermediate_values,
        constraints=trial.constraints,
    )
