"""Evaluators of what models give for tokens: divergence, agreement, perplexity, hidden states.

All of them look at the same outputs, so that any number of them costs one pass of each model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from autoq.errors import EvaluationError
from autoq.evaluators.compact import CompactLogits
from autoq.evaluators.estimate import Estimate
from autoq.evaluators.fidelity import check_finite
from autoq.evaluators.outputs import SequenceOutputs
from autoq.evaluators.protocol import EVALUATORS, Metric, Need, Reference, Subject
from autoq.evaluators.resampling import Numbers, quantile_estimates, ratio_estimate
from autoq.models.forward import forward_logits

QUANTILES: Mapping[str, float] = {"median": 0.5, "p90": 0.9, "p99": 0.99}

CONFIDENCES: Mapping[str, tuple[float, float]] = {
    "unsure": (0.0, 0.5),
    "likely": (0.5, 0.9),
    "sure": (0.9, 2.0),  # rounding may make a probability a little more than 1
}
"""Classes of tokens by the probability that the original gives its likeliest: from, to below."""


class Meter(Protocol):
    """Adds up what one pass over the tokens shows."""

    def add(self, outputs: SequenceOutputs) -> None:
        """Look at one sequence."""
        ...

    def result(self) -> dict[str, Estimate]:
        """Metric -> value, after the last sequence; what the data do not define is left out."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputEvaluator:
    """An evaluator that looks at the outputs for the reference's tokens, and at nothing else."""

    name: str
    metrics: tuple[Metric, ...]
    needs: frozenset[Need]
    meter: Callable[[Any], Meter]  # given the tokenizer, or None

    def evaluate(self, subject: Subject, reference: Reference) -> Mapping[str, Estimate]:
        """See `Evaluator.evaluate`."""
        return evaluate_outputs([self], subject, reference)


def evaluate_outputs(
    evaluators: Iterable[OutputEvaluator],
    subject: Subject,
    reference: Reference,
    advance: Callable[[], None] | None = None,
) -> dict[str, Estimate]:
    """What several evaluators give, in one pass over the tokens.

    Args:
        advance: called after every batch.
    Raises:
        EvaluationError: there are no tokens, or an output holds NaN or Inf.
    """
    meters = [evaluator.meter(subject.tokenizer) for evaluator in evaluators]
    with torch.no_grad():
        for ids, expected, changed in reference.pairs(partial(forward_logits, subject.model)):
            if not isinstance(expected, CompactLogits):
                check_finite(expected, "original")
            check_finite(changed, "quantised")
            for row in range(ids.shape[0]):
                outputs = SequenceOutputs(ids[row], expected[row], changed[row])
                for meter in meters:
                    meter.add(outputs)
            if advance is not None:
                advance()
    if not reference.sequences:
        raise EvaluationError("no sequence to measure on; give at least one held-out sequence")
    return {name: value for meter in meters for name, value in meter.result().items()}


@dataclass(slots=True)
class _Divergence:
    """KL divergence: its mean, its quantiles over tokens, and by how sure the original is."""

    values: list[Numbers] = field(default_factory=list)
    confidences: list[Numbers] = field(default_factory=list)

    def add(self, outputs: SequenceOutputs) -> None:
        self.values.append(outputs.divergence.cpu().numpy())
        self.confidences.append(outputs.confidence.cpu().numpy())

    def result(self) -> dict[str, Estimate]:
        everything = [np.ones(len(values), dtype=bool) for values in self.values]
        found = {"kl_divergence": self._mean(everything)}
        for name, (low, high) in CONFIDENCES.items():
            chosen = [(low <= sure) & (sure < high) for sure in self.confidences]
            found[f"kl_{name}"] = self._mean(chosen)
        quantiles = quantile_estimates(self.values, list(QUANTILES.values()))
        found.update({f"kl_{n}": e for n, e in zip(QUANTILES, quantiles, strict=True)})
        return {name: estimate for name, estimate in found.items() if estimate is not None}

    def _mean(self, chosen: Sequence[np.typing.NDArray[np.bool_]]) -> Estimate | None:
        sums = [float(v[c].sum()) for v, c in zip(self.values, chosen, strict=True)]
        return ratio_estimate(sums, [int(c.sum()) for c in chosen])


@dataclass(slots=True)
class _Means:
    """Means over tokens of what `of` gives for a sequence."""

    name: str
    of: Callable[[SequenceOutputs], torch.Tensor]
    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, outputs: SequenceOutputs) -> None:
        values = self.of(outputs).double()
        self.sums.append(float(values.sum()))
        self.counts.append(len(values))

    def result(self) -> dict[str, Estimate]:
        estimate = ratio_estimate(self.sums, self.counts)
        return {} if estimate is None else {self.name: estimate}


@dataclass(slots=True)
class _Perplexity:
    """Perplexity per token, and where the text is known per word and per byte.

    Words and bytes are those of the predicted tokens' text: all but each sequence's first token,
    special tokens left out. Words are what stands between white space.
    """

    tokenizer: Any
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)
    counts: dict[str, list[int]] = field(default_factory=lambda: {"": [], "word_": [], "byte_": []})

    def add(self, outputs: SequenceOutputs) -> None:
        if len(outputs.targets) == 0:
            return  # no token is predicted from the one before
        self.losses.append(float(outputs.losses.sum()))
        self.reference_losses.append(float(outputs.reference_losses.sum()))
        self.counts[""].append(len(outputs.targets))
        if self.tokenizer is not None:
            text = self.tokenizer.decode(outputs.targets.tolist(), skip_special_tokens=True)
            self.counts["word_"].append(len(text.split()))
            self.counts["byte_"].append(len(text.encode()))

    def result(self) -> dict[str, Estimate]:
        found = {}
        for unit, counts in self.counts.items():
            if not counts:
                continue
            for whose, losses in (("", self.losses), ("reference_", self.reference_losses)):
                estimate = ratio_estimate(losses, counts, np.exp)
                if estimate is not None:
                    found[f"{whose}{unit}perplexity"] = estimate
        return found


def _lower(name: str, perfect: float | None = None) -> Metric:
    return Metric(name=name, better="lower", perfect=perfect)


KL_DIVERGENCE = OutputEvaluator(
    name="kl_divergence",
    metrics=(
        _lower("kl_divergence", 0.0),
        *(_lower(f"kl_{name}", 0.0) for name in CONFIDENCES),
        *(_lower(f"kl_{name}", 0.0) for name in QUANTILES),
    ),
    needs=frozenset({Need.LOGITS}),
    meter=lambda tokenizer: _Divergence(),
)
TOP1_AGREEMENT = OutputEvaluator(
    name="top1_agreement",
    metrics=(Metric(name="top1_agreement", better="higher", perfect=1.0),),
    needs=frozenset({Need.LOGITS}),
    meter=lambda tokenizer: _Means("top1_agreement", lambda outputs: outputs.same_top1),
)
PERPLEXITY = OutputEvaluator(
    name="perplexity",
    metrics=tuple(
        Metric(name=f"{whose}{unit}perplexity", better="lower", of_text=bool(unit))
        for unit in ("", "word_", "byte_")
        for whose in ("", "reference_")
    ),
    needs=frozenset({Need.LOGITS, Need.CAUSAL}),
    meter=_Perplexity,
)
ENCODER_OUTPUTS = OutputEvaluator(
    name="cosine_similarity",
    metrics=(Metric(name="cosine_similarity", better="higher", perfect=1.0),),
    needs=frozenset({Need.HIDDEN}),
    meter=lambda tokenizer: _Means("cosine_similarity", lambda outputs: outputs.cosine),
)

for _evaluator in (KL_DIVERGENCE, TOP1_AGREEMENT, PERPLEXITY, ENCODER_OUTPUTS):
    EVALUATORS.register(_evaluator.name, _evaluator)
