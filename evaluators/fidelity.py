"""How far a quantised model is from the original, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from autoq.errors import AutoqError, EvaluationError
from autoq.evaluators.estimate import Estimate, bootstrap_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """A quantised model beside its original, token by token.

    `kl_divergence` is KL(original || quantised) in nats per token. Models whose output is a
    hidden state have no distribution: for them it is half the squared output error per token,
    the KL divergence of unit Gaussians round the outputs.
    """

    kl_divergence: Estimate
    top1_agreement: Estimate | None  # share of positions with the same most likely token
    reference_perplexity: float | None  # causal models only
    perplexity: float | None
    tokens: int
    kl_per_sequence: tuple[float, ...]  # nats per token; plans are compared sequence by sequence

    def metrics(self) -> dict[str, float]:
        """Name -> value of everything that was measured."""
        found = {
            "kl_divergence": self.kl_divergence.value,
            "top1_agreement": self.top1_agreement.value if self.top1_agreement else None,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
        }
        return {name: value for name, value in found.items() if value is not None}


def measure_fidelity(
    pairs: Iterable[tuple[Tensor, Tensor, Tensor]], *, has_vocabulary: bool, causal: bool
) -> Fidelity:
    """Compare outputs of the original and of the quantised model.

    Args:
        pairs: (token ids [sequences, tokens], original output, quantised output), outputs
            [sequences, tokens, vocabulary or features].
        has_vocabulary: the outputs are logits.
        causal: position t predicts token t + 1, so perplexity is defined.

    Raises:
        AutoqError: there is nothing to compare.
        EvaluationError: an output holds NaN or Inf.
    """
    totals = _Totals()
    for ids, reference, quantised in pairs:
        for whose, output in (("original", reference), ("quantised", quantised)):
            check_finite(output, whose)
        for row in range(ids.shape[0]):
            _add_sequence(
                totals, ids[row], reference[row].float(), quantised[row].float(), has_vocabulary
            )
    if not totals.divergence:
        raise AutoqError("no sequence to measure on; give at least one held-out sequence")
    with_perplexity = causal and bool(totals.nll)
    return Fidelity(
        kl_divergence=_estimate(totals.divergence),
        top1_agreement=_estimate(totals.agreement) if has_vocabulary else None,
        reference_perplexity=math.exp(np.mean(totals.reference_nll)) if with_perplexity else None,
        perplexity=math.exp(np.mean(totals.nll)) if with_perplexity else None,
        tokens=totals.tokens,
        kl_per_sequence=tuple(totals.divergence),
    )


def check_finite(output: Tensor, whose: str) -> None:
    """Refuse an output that holds NaN or Inf.

    Raises:
        EvaluationError: names whose output it is.
    """
    # No sum with NaN or Inf in it is finite, and it takes a fifth of the time of looking at each.
    if bool(torch.isfinite(output.sum())):
        return
    if not bool(torch.isfinite(output).all()):
        raise EvaluationError(
            f"the {whose} model's output holds NaN or Inf; search or measure with --dtype "
            "float32, or take another plan"
        )


@dataclass(slots=True)
class _Totals:
    """Per-sequence means."""

    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    reference_nll: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    tokens: int = 0


def _add_sequence(
    totals: _Totals, ids: Tensor, reference: Tensor, quantised: Tensor, has_vocabulary: bool
) -> None:
    totals.tokens += ids.shape[0]
    if not has_vocabulary:
        totals.divergence.append(_squared_error(reference, quantised))
        return
    log_reference, log_quantised = reference.log_softmax(-1), quantised.log_softmax(-1)
    totals.divergence.append(float(token_divergence(log_reference, log_quantised).mean()))
    same = log_reference.argmax(-1) == log_quantised.argmax(-1)
    totals.agreement.append(float(same.double().mean()))
    if ids.shape[0] < 2:
        return  # no token is predicted from the one before
    targets = ids[1:, None].to(reference.device)
    totals.reference_nll.append(-float(log_reference[:-1].gather(-1, targets).double().mean()))
    totals.nll.append(-float(log_quantised[:-1].gather(-1, targets).double().mean()))


def sequence_divergences(
    reference: Tensor, quantised: Tensor, *, has_vocabulary: bool
) -> list[float]:
    """`Fidelity.kl_per_sequence` of a batch, bit for bit, and nothing else.

    Args:
        reference: the original's output, [sequences, tokens, vocabulary or features]; the other
            likewise.
        has_vocabulary: the outputs are logits.
    Raises:
        EvaluationError: an output holds NaN or Inf.
    """
    check_finite(reference, "original")
    check_finite(quantised, "quantised")
    of_row = _divergence if has_vocabulary else _squared_error
    rows = zip(reference, quantised, strict=True)
    return [of_row(expected.float(), found.float()) for expected, found in rows]


def _divergence(reference: Tensor, quantised: Tensor) -> float:
    return float(token_divergence(reference.log_softmax(-1), quantised.log_softmax(-1)).mean())


def _squared_error(reference: Tensor, quantised: Tensor) -> float:
    return 0.5 * float((reference - quantised).double().square().sum(dim=-1).mean())


def token_divergence(log_reference: Tensor, log_quantised: Tensor) -> Tensor:
    """KL(original || quantised) of every token, float64 [tokens], in nats.

    Args:
        log_reference: log-probabilities, float32 [tokens, vocabulary]; the other likewise.
    """
    return (log_reference.exp() * (log_reference - log_quantised)).sum(-1).double()


def _estimate(per_sequence: Sequence[float]) -> Estimate:
    values = np.asarray(per_sequence)
    return Estimate(float(values.mean()), *bootstrap_interval(values), tuple(per_sequence))


def paired_outputs(
    batches: Sequence[Tensor],
    reference: Callable[[Sequence[Tensor]], list[Tensor]],
    quantised: Callable[[Tensor], Tensor],
    *,
    bytes_per_batch: int,
    memory_bytes: int = 1 << 29,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Outputs of both models, the original's held only for as many batches as fit in memory.

    Args:
        reference: runs the original on several batches; called once per chunk, because changing
            between the models may be expensive.
        bytes_per_batch: what one batch's reference output takes.
        memory_bytes: bound on the reference outputs held at once.
    """
    chunk = max(1, memory_bytes // max(bytes_per_batch, 1))
    for start in range(0, len(batches), chunk):
        part = batches[start : start + chunk]
        for ids, expected in zip(part, reference(part), strict=True):
            yield ids, expected, quantised(ids)
