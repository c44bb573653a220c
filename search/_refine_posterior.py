"""What measured plans say about the predicted losses of all cells.

The true loss of a cell is its predicted one times exp(u). Beforehand u is normal: a sum of errors
that all cells share, that a layer type, a class (type and depth), a group or one cell has for
itself. A measured plan is one linear observation: the summed losses of its cells, less those of a
reference plan measured on the same sequences. So every trial informs all cells, and the optimum of
what is expected afterwards is the next plan worth measuring.

Two errors are in an observation. The sequences are a sample: how the differences of all plans vary
together over them gives the covariance of that error, which the plans share. And losses are not
additive: the remainder is taken as independent, in proportion to the losses of the cells changed.

The sizes of the errors are those of highest posterior density (empirical Bayes). As losses are
exponentials, the posterior is Laplace's approximation, found by Gauss-Newton steps, each of which
is a Gaussian regression of trials x trials. Draws follow Matheron's rule.

Sources: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), chapters 2, 3.4 and
5; Thompson (1933) for choosing by draws; Wilson et al. (2020) for Matheron's rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from autoq.search._refine_observations import (
    Floats,
    Observations,
    Prior,
    changes,
    sampling_covariance,
    square_root,
    summed_by_label,
)

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_EXPECTED_VARIANCE: Mapping[str, float] = {
    "all": 0.1,
    "type": 0.03,
    "class": 0.05,
    "group": 0.1,
    "cell": 0.1,
    "interaction": 3e-4,
}
"""Variance of each error of log loss before anything is measured; of `interaction`, as a fraction
of the losses changed, squared. 0.1 is a factor of 1.4 either way."""

_DOUBT = 1.5
"""Standard deviation of the logarithm of these variances."""

_LEAST_VARIANCE, _MOST_VARIANCE = 1e-6, 8.0
_MOST_STEPS = 20
_LONGEST_STEP, _SMALL_STEP = 1.0, 0.02
_LARGEST_ERROR = 5.0
"""Of u: a loss is at most 150 times, or a 150th, of what was predicted."""

_SCALES = np.linspace(-4.0, 6.0, 41)
"""Logarithms of the objective's unit over that of the scores, among which the likeliest is taken."""

_SCALE_VARIANCE = 8.0
"""Of these logarithms beforehand: nearly anything may be, and the same unit is most likely."""

_JITTER = 1e-10


class Posterior:
    """Losses of all cells in the light of what was measured."""

    def __init__(self, prior: Prior, observations: Observations) -> None:
        """
        Args:
            observations: at least two plans.
        """
        self._prior = prior
        self._rows = np.arange(len(prior.losses))
        reference = observations.columns[0]
        self._unit = float(prior.losses[self._rows, reference].sum()) or 1.0
        self._losses = prior.losses / self._unit
        self._changes = changes(observations.columns, prior.losses.shape)
        differences = [each / self._unit for each in observations.differences()]
        self._measured = np.array([each.mean() for each in differences])
        self._sampling = sampling_covariance(differences)
        self._fit()

    @cached_property
    def expected(self) -> Floats:
        """The most likely loss of every cell, [groups, formats], in the objective's unit."""
        return self._exponential(self._errors) * self._unit

    def draw(self, generator: np.random.Generator, width: float) -> Floats:
        """Losses as they may be, [groups, formats]; their distance to `expected` is `width` times
        that of a draw from the posterior."""
        linear = self._linear
        noise = generator.standard_normal(len(self._measured)) * np.sqrt(linear.remainder)
        noise += square_root(self._sampling) @ generator.standard_normal(len(self._measured))
        prior_errors, seen = np.zeros(self._losses.shape), noise
        for name, feature in linear.features.items():
            size = feature.shape[1]
            deviations = generator.standard_normal(size) * np.sqrt(self._variances_of(name, size))
            prior_errors += deviations[self._prior.shared[name]]
            seen = seen + feature @ deviations
        deviation = prior_errors - self._errors_from(linear, _solved(linear.total, seen))
        return self._exponential(self._errors + width * deviation) * self._unit

    def plan_differences(self) -> Floats:
        """Expected difference of every plan to the reference, without the sampling error, [plans].

        In the objective's unit: what was measured, shrunk towards what all plans together say.
        """
        linear = self._linear
        weights = _solved(linear.total, linear.residual)
        explained = linear.at_no_error + (linear.total - self._sampling) @ weights
        return np.asarray(explained * self._unit, dtype=np.float64)

    # Fitting

    def _fit(self) -> None:
        self._variances = dict(_EXPECTED_VARIANCE)
        self._errors = np.zeros(self._losses.shape)
        self._losses = self._losses * self._scale()
        for _ in range(_MOST_STEPS):
            linear = self._linearised()
            self._variances = self._better_variances(linear)
            linear = self._with_variances(linear)
            found = self._errors_from(linear, _solved(linear.total, linear.residual))
            step = np.clip(found - self._errors, -_LONGEST_STEP, _LONGEST_STEP)
            self._errors = np.clip(self._errors + step, -_LARGEST_ERROR, _LARGEST_ERROR)
            if np.abs(step).max() < _SMALL_STEP:
                break
        self._linear = self._with_variances(self._linearised())

    def _scale(self) -> float:
        """The objective's unit over that of the scores, as far as the measurements tell."""
        linear = self._with_variances(self._linearised())
        predicted = self._changes @ self._losses.ravel()
        modelled = linear.total - self._sampling
        densities = []
        for scale in _SCALES:
            # Every loss is multiplied by the same factor, and so is all that is made of them.
            factor = math.exp(scale)
            total = modelled * factor**2 + self._sampling
            density = _log_density(total, self._measured - factor * predicted)
            densities.append(density - scale**2 / (2 * _SCALE_VARIANCE))
        return math.exp(_SCALES[int(np.argmax(densities))])

    def _exponential(self, errors: Floats) -> Floats:
        return np.asarray(self._losses * np.exp(np.clip(errors, -8.0, 8.0)), dtype=np.float64)

    def _linearised(self) -> _Linear:
        losses = self._exponential(self._errors).ravel()
        weighted = self._changes * losses[None, :]
        at_no_error = self._changes @ losses - weighted @ self._errors.ravel()
        features = {
            name: summed_by_label(weighted, labels.ravel())
            for name, labels in self._prior.shared.items()
        }
        products = {}
        for name, feature in features.items():
            products[name] = (feature @ feature.T).toarray()
        spread = weighted * np.sqrt(self._prior.spread.ravel())[None, :]
        size = np.asarray(abs(weighted).sum(axis=1)).ravel()
        return _Linear(
            features=features,
            products=products,
            spread=(spread @ spread.T).toarray(),
            size=size,
            at_no_error=at_no_error,
            residual=self._measured - at_no_error,
            remainder=np.zeros(len(size)),
            total=np.zeros((len(size), len(size))),
        )

    def _with_variances(
        self, linear: _Linear, variances: Mapping[str, float] | None = None
    ) -> _Linear:
        """The covariance of the observations for these variances."""
        variances = variances or self._variances
        total = linear.spread + self._sampling
        for name, product in linear.products.items():
            total = total + variances[name] * product
        remainder = variances["interaction"] * linear.size**2 + _JITTER
        total[np.diag_indices_from(total)] += remainder
        return replace(linear, total=total, remainder=remainder)

    def _better_variances(self, linear: _Linear) -> dict[str, float]:
        """One round of halving or doubling each variance, where that is more likely."""
        variances = dict(self._variances)
        best = self._density(linear, variances)
        for name, size in self._variances.items():
            for factor in (0.5, 2.0):
                changed = min(max(size * factor, _LEAST_VARIANCE), _MOST_VARIANCE)
                tried = {**variances, name: changed}
                density = self._density(linear, tried)
                if density > best:
                    best, variances = density, tried
        return variances

    def _density(self, linear: _Linear, variances: Mapping[str, float]) -> float:
        doubts = [
            math.log(variances[name] / usual) ** 2 for name, usual in _EXPECTED_VARIANCE.items()
        ]
        total = self._with_variances(linear, variances).total
        return _log_density(total, linear.residual) - sum(doubts) / (2 * _DOUBT**2)

    def _errors_from(self, linear: _Linear, weights: Floats) -> Floats:
        """Expected errors of all cells, [groups, formats], for weights of the observations."""
        errors = np.zeros(self._losses.shape)
        for name, feature in linear.features.items():
            gathered = (feature.T @ weights) * self._variances_of(name, feature.shape[1])
            errors += gathered[self._prior.shared[name]]
        return errors

    def _variances_of(self, name: str, size: int) -> Floats:
        variances = np.full(size, self._variances[name])
        return variances + self._prior.spread.ravel() if name == "cell" else variances


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """The observations as linear functions of the errors, and their covariance."""

    features: Mapping[str, csr_array]  # error -> [plans, errors of this kind]
    products: Mapping[str, Floats]  # error -> features times their transpose
    spread: Floats  # [plans, plans], from the scores' own standard errors
    size: Floats  # [plans], losses of the cells changed
    at_no_error: Floats  # [plans], what the linear function gives for errors of zero
    residual: Floats  # [plans], measured less that
    remainder: Floats  # [plans], variance of what is not additive
    total: Floats  # [plans, plans], covariance of the residuals


def _solved(matrix: Floats, values: Floats) -> Floats:
    return np.asarray(np.linalg.solve(matrix, values), dtype=np.float64)


def _log_density(covariance: Floats, residual: Floats) -> float:
    """Of a normal distribution with mean zero, but for a constant."""
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return -math.inf
    scaled = np.linalg.solve(factor, residual)
    return float(-0.5 * scaled @ scaled - np.log(np.diag(factor)).sum())
