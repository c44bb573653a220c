"""A problem whose true losses are known, and what drives a refinement of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autoq.formats import FormatName
from autoq.models import GroupName
from autoq.search import CostTable, SensitivityTable, solve
from autoq.search.refine import EVERY_STRATEGY, Refinement, Trial

FORMATS = tuple(FormatName(name) for name in ("fp8", "nvfp4", "w4a8_awq", "none"))
BITS = np.array([8.0, 4.5, 4.25, 16.0])
WEIGHTS = {"self_attn.qkv_proj": 6, "self_attn.o_proj": 4, "mlp.up_proj": 22, "mlp.down_proj": 11}
SEQUENCES = 32
PAIRS = 400
BANDS = 4  # of depth


@dataclass(frozen=True)
class World:
    """Predicted losses, true ones (the predicted times log-normal errors), and interactions."""

    sensitivity: SensitivityTable
    costs: CostTable
    true: np.ndarray  # [groups, formats]
    by_sequence: np.ndarray  # [sequences, groups, formats], mean 1 in expectation
    difficulty: np.ndarray  # [sequences]
    pairs: np.ndarray  # [pairs, 2, 2]: two cells, each a group and a format
    pair_losses: np.ndarray  # [pairs]

    @classmethod
    def of(cls, seed, *, layers, sigma, class_sigma=0.0, interactions=0.5, spread=0.3):
        rng = np.random.default_rng(seed)
        names = tuple(
            GroupName(f"model.layers.{layer}.{kind}") for layer in range(layers) for kind in WEIGHTS
        )
        groups = len(names)
        weights = np.array(list(WEIGHTS.values()) * layers) * 512
        bits = np.outer(weights, BITS).astype(np.int64)
        sizes = rng.lognormal(0.0, 1.0, (groups, 1)) * weights[:, None] / weights.mean() * 1e-4
        predicted = sizes * [0.03, 1.0, 1.1] * rng.lognormal(0.0, 0.2, (groups, 3))
        contributions = predicted * rng.lognormal(-(spread**2) / 2, spread, (SEQUENCES, groups, 3))
        true = np.zeros((groups, 4))
        true[:, :3] = predicted * rng.lognormal(0.0, sigma, predicted.shape)
        if class_sigma:
            errors = rng.lognormal(0.0, class_sigma, (BANDS, 1, len(WEIGHTS)))
            bands = np.arange(layers) * BANDS // layers
            true[:, :3] *= errors[bands].reshape(groups, 1)
        pairs = np.stack(
            [rng.integers(0, groups, (PAIRS, 2)), rng.integers(0, 3, (PAIRS, 2))], axis=2
        )
        own = true[pairs[:, :, 0], pairs[:, :, 1]]
        strength = interactions * rng.standard_normal(PAIRS) * np.sqrt(own.prod(axis=1))
        return cls(
            sensitivity=SensitivityTable(
                groups=names,
                formats=FORMATS[:3],
                contributions=contributions,
                unit="nats_per_token",
                estimator="test",
            ),
            costs=CostTable(
                groups=names,
                formats=FORMATS,
                weights=weights,
                effective_bits=bits,
                stored_bits=bits,
                peer_bits=bits.astype(float),
                allowed=np.ones(bits.shape, dtype=np.bool_),
            ),
            true=true,
            by_sequence=rng.lognormal(-(spread**2) / 2, spread, (SEQUENCES, groups, 4)),
            difficulty=rng.lognormal(-0.125, 0.5, SEQUENCES),
            pairs=pairs,
            pair_losses=strength * (pairs[:, 0, 0] != pairs[:, 1, 0]),
        )

    def columns(self, assignment):
        return np.array([FORMATS.index(assignment[group]) for group in self.costs.groups])

    def loss(self, assignment):
        """What it is in expectation over sequences."""
        columns = self.columns(assignment)
        return self.true[np.arange(len(columns)), columns].sum() + self._pair_loss(columns)

    def losses(self, assignment):
        """What is measured, per sequence."""
        columns = self.columns(assignment)
        rows = np.arange(len(columns))
        own = (self.by_sequence[:, rows, columns] * self.true[rows, columns]).sum(axis=1)
        return tuple((own * self.difficulty + self._pair_loss(columns)).tolist())

    def best(self, bits):
        """The plan of least true loss, but for interactions."""
        true = replace(self.sensitivity, contributions=self.true[None, :, :3])
        return solve(true, self.costs, bits)

    def _pair_loss(self, columns):
        taken = columns[self.pairs[:, :, 0]] == self.pairs[:, :, 1]
        return self.pair_losses[taken.all(axis=1)].sum()


def drive(world, bits, *, trials, strategies=EVERY_STRATEGY, seed=0):
    """The refinement, and its trials, as one worker would make them; suggestions are random."""
    start = solve(world.sensitivity, world.costs, bits)
    refinement = Refinement(
        world.sensitivity,
        world.costs,
        bits,
        start,
        trials=trials,
        strategies=strategies,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    finished = []
    for number in range(trials):
        proposal = refinement.propose(
            finished, [], number, lambda _, low, high: float(rng.uniform(low, high))
        )
        if proposal is None:
            break
        finished.append(trial_of(world, proposal, number))
    return refinement, finished


def trial_of(world, proposal, number):
    """The trial that measuring a proposal makes."""
    return Trial(
        number=number,
        source=proposal.source,
        assignment=proposal.plan.assignment,
        losses=world.losses(proposal.plan.assignment),
    )
