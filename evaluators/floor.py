"""The noise floor as a metric: what rounding alone does to the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoq.evaluators.estimate import Estimate
from autoq.evaluators.fidelity import measure_fidelity
from autoq.evaluators.noise import rounding_noise
from autoq.evaluators.protocol import EVALUATORS, Metric, Need, Reference, Subject
from autoq.models import discover
from autoq.models.forward import forward_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """KL divergence of the original to itself, rounded once more (see `rounding_noise`).

    It is the original's and the tokens', the same for every subject. Differences in KL divergence
    below it mean nothing.
    """

    seed: int = 0
    name: str = "noise_floor"
    metrics: tuple[Metric, ...] = (Metric(name="noise_floor", better="lower"),)
    needs: frozenset[Need] = frozenset({Need.LOGITS})

    def evaluate(self, subject: Subject, reference: Reference) -> Mapping[str, Estimate]:
        """See `Evaluator.evaluate`."""
        floor = reference.once(self, lambda model: self._floor(model, reference.batches))
        return {"noise_floor": floor}

    def _floor(self, model: nn.Module, batches: Sequence[Tensor]) -> Estimate:
        found = discover(model)
        generator = torch.Generator(batches[0].device).manual_seed(self.seed)

        def noisy(ids: Tensor) -> Tensor:
            with rounding_noise(model, found.slots.values(), found.blocks, generator):
                return forward_logits(model, ids)

        pairs = ((ids, forward_logits(model, ids), noisy(ids)) for ids in batches)
        return measure_fidelity(pairs, has_vocabulary=True, causal=False).kl_divergence


EVALUATORS.register("noise_floor", NoiseFloor())
