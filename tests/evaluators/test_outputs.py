"""Metrics of outputs: against hand computations, and what compact references leave exact."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from autoq.evaluators import EVALUATORS, measure_fidelity, measure_metrics
from autoq.evaluators.builtin import evaluate_outputs
from autoq.evaluators.compact import CompactLogits, bytes_per_token
from autoq.evaluators.outputs import SequenceOutputs
from autoq.evaluators.protocol import Reference, Subject
from autoq.evaluators.resampling import quantile_estimates, ratio_estimate
from autoq.testing.tiny_models import make_byte_tokenizer, make_tiny_model

REFERENCE = [[0.6, 0.15, 0.25], [0.04, 0.95, 0.01], [0.1, 0.1, 0.8]]
CHANGED = [[0.4, 0.35, 0.25], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]
IDS = [0, 1, 2]


def kl(t):
    return sum(p * math.log(p / q) for p, q in zip(REFERENCE[t], CHANGED[t], strict=True))


class Given:
    """A source of outputs that are written down."""

    def __init__(self, pairs):
        self._pairs = pairs

    def pairs(self, reference, changed):
        yield from self._pairs


def measured(names, pairs, tokenizer=None):
    reference = Reference([ids for ids, _, _ in pairs], nullcontext, outputs=Given(pairs))
    evaluators = [EVALUATORS[name] for name in names]
    return evaluate_outputs(
        evaluators, Subject(model=torch.nn.Identity(), tokenizer=tokenizer), reference
    )


def logits(table):
    return torch.tensor(table, dtype=torch.float64).log().float()[None] + 3.0


def pair():
    return torch.tensor([IDS]), logits(REFERENCE), logits(CHANGED)


def test_divergence_by_hand():
    found = measured(["kl_divergence"], [pair()])
    divergences = [kl(t) for t in range(3)]
    close = pytest.approx
    assert found["kl_divergence"].value == close(sum(divergences) / 3, rel=1e-5)
    # The likeliest tokens have 0.6, 0.95 and 0.8: none is below a half.
    assert "kl_unsure" not in found
    assert found["kl_likely"].value == close((divergences[0] + divergences[2]) / 2, rel=1e-5)
    assert found["kl_sure"].value == close(divergences[1], rel=1e-5)
    assert found["kl_median"].value == close(sorted(divergences)[1], rel=1e-5)
    assert found["kl_p90"].value == close(np.quantile(divergences, 0.9), rel=1e-5)
    assert found["kl_divergence"].per_sequence == close((sum(divergences) / 3,), rel=1e-5)


class Words:
    """Token n is a word of n + 1 letters."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join("é" * (n + 1) for n in ids)


def test_perplexities_by_hand():
    found = measured(["perplexity"], [pair()], Words())
    for prefix, table in (("reference_", REFERENCE), ("", CHANGED)):
        nats = -math.log(table[0][1]) - math.log(table[1][2])
        assert found[f"{prefix}perplexity"].value == pytest.approx(math.exp(nats / 2), rel=1e-5)
        assert found[f"{prefix}word_perplexity"].value == pytest.approx(
            math.exp(nats / 2), rel=1e-5
        )
        # "éé ééé" is 4 + 1 + 6 bytes of UTF-8.
        assert found[f"{prefix}byte_perplexity"].value == pytest.approx(
            math.exp(nats / 11), rel=1e-5
        )


def test_without_a_tokenizer_there_are_no_words():
    assert set(measured(["perplexity"], [pair()])) == {"perplexity", "reference_perplexity"}


def test_the_common_metrics_are_those_of_fidelity():
    torch.manual_seed(0)
    pairs = [
        (torch.randint(0, 50, (2, 16)), torch.randn(2, 16, 50), torch.randn(2, 16, 50))
        for _ in range(3)
    ]
    found = measured(["kl_divergence", "top1_agreement", "perplexity"], pairs)
    expected = measure_fidelity(pairs, has_vocabulary=True, causal=True)
    assert found["kl_divergence"].per_sequence == pytest.approx(expected.kl_per_sequence, rel=1e-12)
    for name in ("kl_divergence", "top1_agreement"):
        wanted = getattr(expected, name)
        for end in ("value", "low", "high"):
            assert getattr(found[name], end) == pytest.approx(getattr(wanted, end), rel=1e-12)
    for name in ("perplexity", "reference_perplexity"):
        assert found[name].value == pytest.approx(getattr(expected, name), rel=1e-12)


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 49, 50, 60])
def test_compact_logits_bound_the_divergence_from_below_and_keep_the_rest(kept):
    torch.manual_seed(1)
    ids, reference, changed = (
        torch.randint(0, 50, (40,)),
        torch.randn(40, 50) * 3,
        torch.randn(40, 50),
    )
    reference[0, 7] = reference[0, 9] = 20.0  # a tie: the first is likeliest
    dense = SequenceOutputs(ids, reference, changed)
    compact = SequenceOutputs(
        ids, CompactLogits.reduce(reference[None], ids[None], kept)[0], changed
    )
    # By the definition: the kept tokens, and all others as one.
    p, q = reference.double().softmax(-1), changed.double().softmax(-1)
    order = p.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    merged_p = torch.cat([p.gather(-1, order), 1 - p.gather(-1, order).sum(-1, keepdim=True)], -1)
    merged_q = torch.cat([q.gather(-1, order), 1 - q.gather(-1, order).sum(-1, keepdim=True)], -1)
    parts = merged_p * (merged_p / merged_q).log()
    expected = torch.where(merged_p > 1e-12, parts, 0.0).sum(-1)
    # float32 logarithms carry errors of about 1e-6
    torch.testing.assert_close(compact.divergence, expected, atol=5e-6, rtol=1e-5)
    assert bool((compact.divergence <= dense.divergence + 5e-6).all())
    if kept >= 50:
        torch.testing.assert_close(compact.divergence, dense.divergence, atol=5e-6, rtol=1e-5)
    elif kept < 4:
        assert float(compact.divergence.mean()) < 0.95 * float(dense.divergence.mean())
    assert torch.equal(compact.same_top1, dense.same_top1)
    torch.testing.assert_close(compact.confidence, dense.confidence)
    torch.testing.assert_close(compact.reference_losses, dense.reference_losses)
    assert torch.equal(compact.losses, dense.losses)


def test_more_kept_tokens_bound_closer():
    torch.manual_seed(2)
    ids, reference, changed = torch.randint(0, 64, (8,)), torch.randn(8, 64), torch.randn(8, 64)
    bounds = [
        float(CompactLogits.reduce(reference, ids, kept).divergence(changed.log_softmax(-1)).sum())
        for kept in (1, 4, 16, 64)
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[-1]


def test_bytes_of_compact_logits():
    found = CompactLogits.reduce(torch.randn(3, 10, 32), torch.zeros(3, 10, dtype=torch.int64), 5)
    tensors = (found.indices, found.log_probabilities, found.log_rest, found.next_token)
    assert sum(t.numel() * t.element_size() for t in tensors) == 30 * bytes_per_token(5)


def test_ratios_weigh_sequences_by_what_they_count():
    found = ratio_estimate([6.0, 0.0, 4.0], [2, 0, 8])
    assert found.value == 1.0
    assert found.per_sequence == ()  # one has nothing to count
    assert 0.5 <= found.low < 1.0 < found.high <= 3.0
    assert ratio_estimate([1.0], [2]).per_sequence == (0.5,)
    assert ratio_estimate([0.0], [0]) is None


def test_an_interval_covers_the_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        found = ratio_estimate(list(generator.normal(1.0, 1.0, 40)), [1.0] * 40)
        inside += found.low <= 1.0 <= found.high
    # 95 % of 200 are 190; five standard deviations of the count are 15
    assert 175 <= inside <= 200


def test_quantiles_are_of_all_tokens_together():
    found = quantile_estimates([np.array([1.0, 2.0, 3.0]), np.array([10.0])], [0.5])[0]
    assert found.value == 2.5
    assert found.per_sequence == (2.0, 10.0)
    assert found.low == 2.0
    assert found.high == 10.0


def test_measuring_by_name_on_a_model():
    model = make_tiny_model("llama", dtype=torch.float32)
    batches = [torch.randint(4, 200, (2, 12), generator=torch.Generator().manual_seed(0))]
    reference = Reference(batches, lambda: nullcontext(model))
    subject = Subject(
        model=make_tiny_model("llama", seed=1, dtype=torch.float32), tokenizer=make_byte_tokenizer()
    )
    found = measure_metrics(subject, reference, ["kl", "ppl"])
    assert found["kl_divergence"].value > 0.1
    assert found["perplexity"].value > 1
    assert "top1_agreement" not in found
    assert len(found["kl_divergence"].per_sequence) == reference.sequences == 2
