"""What a packed model costs to run: seconds and bytes, beside the original."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoq.evaluators.estimate import Estimate
from autoq.evaluators.protocol import EVALUATORS, Metric, Need, Reference, Subject
from autoq.evaluators.resampling import quantile_estimates
from autoq.models.forward import forward_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCost:
    """Seconds of one step of one token, and bytes of weights, of a model that `autoq.load` gave.

    A step is a forward pass over a single token: what generating one token costs but for the
    attention to what came before. Both models take turns, so that what else the machine does
    meets both, and the ratio is the median of the ratios of neighbours. Bytes are those of all
    parameters and buffers in memory, in the dtypes they were loaded in.
    """

    rounds: int = 25
    name: str = "packed_cost"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See `Evaluator.metrics`."""
        return (
            Metric(name="seconds_per_step", better="lower", repeatable=False),
            Metric(name="step_time_ratio", better="lower", repeatable=False),
            Metric(name="weight_bytes", better="lower"),
            Metric(name="weight_bytes_ratio", better="lower"),
        )

    @property
    def needs(self) -> frozenset[Need]:
        """See `Evaluator.needs`."""
        return frozenset({Need.PACKED})

    def evaluate(self, subject: Subject, reference: Reference) -> Mapping[str, Estimate]:
        """See `Evaluator.evaluate`."""
        token = reference.batches[0][:1, :1]
        own, others = [], []
        with reference.beside() as original, torch.no_grad():
            for model in (original, subject.model):
                _seconds(model, token)  # kernels are compiled and memory is taken here
            for _ in range(self.rounds):
                others.append(_seconds(original, token))
                own.append(_seconds(subject.model, token))
            original_bytes = weight_bytes(original)
        found_bytes = weight_bytes(subject.model)
        return {
            "seconds_per_step": _median(own),
            "step_time_ratio": _median([a / b for a, b in zip(own, others, strict=True)]),
            "weight_bytes": _exact(found_bytes),
            "weight_bytes_ratio": _exact(found_bytes / original_bytes),
        }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once however many share it."""
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(tensors.values())


def _seconds(model: nn.Module, token: Tensor) -> float:
    if token.is_cuda:
        torch.cuda.synchronize(token.device)
    started = time.perf_counter()
    forward_logits(model, token)
    if token.is_cuda:
        torch.cuda.synchronize(token.device)
    return time.perf_counter() - started


def _median(values: list[float]) -> Estimate:
    found = quantile_estimates([np.array([value]) for value in values], [0.5])[0]
    return Estimate(found.value, found.low, found.high)  # rounds are no sequences


def _exact(value: float) -> Estimate:
    return Estimate(float(value), float(value), float(value))


EVALUATORS.register("packed_cost", PackedCost())
