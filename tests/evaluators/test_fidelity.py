"""Fidelity: against hand computations, and its refusals."""

import math

import pytest
import torch

from autoq.errors import AutoqError, EvaluationError
from autoq.evaluators import measure_fidelity
from autoq.evaluators.fidelity import paired_outputs, sequence_divergences

# Two sequences of three tokens over three words, as probabilities.
REFERENCE = [
    [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8]],
    [[0.6, 0.3, 0.1], [0.3, 0.3, 0.4], [0.25, 0.5, 0.25]],
]
QUANTISED = [
    [[0.4, 0.35, 0.25], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]],
    [[0.3, 0.6, 0.1], [0.4, 0.2, 0.4], [0.25, 0.5, 0.25]],
]
IDS = [[0, 1, 2], [1, 0, 1]]


def pair(reference=REFERENCE, quantised=QUANTISED, rows=slice(None), dtype=torch.float32):
    # Logits are free of a constant per position.
    shift = torch.tensor([3.0, -1.0, 10.0])[:, None]
    logits = [(torch.tensor(p).log()[rows] + shift).to(dtype) for p in (reference, quantised)]
    return torch.tensor(IDS)[rows], *logits


def by_hand(of_position):
    """Mean over the positions of all sequences, which are equally long."""
    values = [of_position(s, t) for s in range(2) for t in range(3)]
    return sum(values) / len(values)


def kl(s, t):
    return sum(p * math.log(p / q) for p, q in zip(REFERENCE[s][t], QUANTISED[s][t], strict=True))


def perplexity(table):
    nll = [-math.log(table[s][t][IDS[s][t + 1]]) for s in range(2) for t in range(2)]
    return math.exp(sum(nll) / len(nll))


def test_a_causal_model_by_hand():
    found = measure_fidelity([pair()], has_vocabulary=True, causal=True)
    assert found.kl_divergence.value == pytest.approx(by_hand(kl), rel=1e-5)
    same = [[True, False, True], [False, False, True]]
    # Both words of a tie are most likely; the first one counts.
    assert QUANTISED[1][1][0] == QUANTISED[1][1][2]
    assert found.top1_agreement.value == pytest.approx(by_hand(lambda s, t: same[s][t]))
    assert found.reference_perplexity == pytest.approx(perplexity(REFERENCE), rel=1e-5)
    assert found.perplexity == pytest.approx(perplexity(QUANTISED), rel=1e-5)
    assert found.tokens == 6
    assert found.metrics() == {
        "kl_divergence": found.kl_divergence.value,
        "top1_agreement": found.top1_agreement.value,
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
    }


def test_the_divergence_starts_from_the_original():
    there = measure_fidelity([pair()], has_vocabulary=True, causal=True)
    back = measure_fidelity([pair(QUANTISED, REFERENCE)], has_vocabulary=True, causal=True)
    assert there.kl_divergence.value != pytest.approx(back.kl_divergence.value, rel=1e-2)
    assert there.perplexity == pytest.approx(back.reference_perplexity)


def test_a_masked_model_has_no_perplexity():
    found = measure_fidelity([pair()], has_vocabulary=True, causal=False)
    assert found.perplexity is None
    assert found.reference_perplexity is None
    assert set(found.metrics()) == {"kl_divergence", "top1_agreement"}


def test_hidden_states_have_the_divergence_of_unit_gaussians():
    generator = torch.Generator().manual_seed(0)
    reference, quantised = torch.randn(2, 2, 3, 5, generator=generator)
    found = measure_fidelity(
        [(torch.tensor(IDS), reference, quantised)], has_vocabulary=False, causal=False
    )
    expected = 0.5 * (reference - quantised).double().square().sum(-1).mean()
    assert found.kl_divergence.value == pytest.approx(float(expected))
    assert found.top1_agreement is None
    assert set(found.metrics()) == {"kl_divergence"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_agrees_with_itself(dtype):
    found = measure_fidelity(
        [pair(quantised=REFERENCE, dtype=dtype)], has_vocabulary=True, causal=True
    )
    assert found.kl_divergence.value == 0.0
    assert (found.kl_divergence.low, found.kl_divergence.high) == (0.0, 0.0)
    assert found.top1_agreement.value == 1.0
    assert found.perplexity == found.reference_perplexity


def test_batches_are_only_a_way_to_bring_sequences():
    together = measure_fidelity([pair()], has_vocabulary=True, causal=True)
    one_by_one = [pair(rows=slice(0, 1)), pair(rows=slice(1, 2))]
    assert measure_fidelity(one_by_one, has_vocabulary=True, causal=True) == together


def many_pairs(sequences):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(sequences, 4, 7, generator=generator)
    spread = torch.rand(sequences, 1, 1, generator=generator)
    quantised = reference + spread * torch.randn(sequences, 4, 7, generator=generator)
    ids = torch.randint(0, 7, (sequences, 4), generator=generator)
    return [(ids, reference, quantised)]


def test_the_interval_holds_the_mean_and_narrows_with_data():
    few = measure_fidelity(many_pairs(16), has_vocabulary=True, causal=True)
    many = measure_fidelity(many_pairs(256), has_vocabulary=True, causal=True)
    for found in (few, many):
        for estimate in (found.kl_divergence, found.top1_agreement):
            assert estimate.low < estimate.value < estimate.high
    width = [found.kl_divergence.high - found.kl_divergence.low for found in (few, many)]
    assert width[1] < width[0] / 2
    # The normal approximation, which holds for so many.
    ids, reference, quantised = many_pairs(256)[0]
    divergences = torch.tensor(
        [
            measure_fidelity(
                [(ids[i : i + 1], reference[i : i + 1], quantised[i : i + 1])],
                has_vocabulary=True,
                causal=True,
            ).kl_divergence.value
            for i in range(256)
        ]
    )
    assert width[1] == pytest.approx(2 * 1.96 * float(divergences.std()) / 16, rel=0.1)


def test_measuring_repeats_itself():
    first, second = (
        measure_fidelity(many_pairs(9), has_vocabulary=True, causal=True) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("position", "whose"), [(1, "original"), (2, "quantised")])
def test_broken_outputs_are_refused(broken, position, whose):
    tensors = list(pair())
    tensors[position][1, 2, 0] = broken
    text = rf"the {whose} model's output holds NaN or Inf; search or measure with --dtype float32"
    with pytest.raises(AutoqError, match=text):
        measure_fidelity([tuple(tensors)], has_vocabulary=True, causal=True)


def test_nothing_to_measure_on_is_refused():
    with pytest.raises(AutoqError, match="no sequence to measure on; give at least one"):
        measure_fidelity([], has_vocabulary=True, causal=True)


def test_one_token_alone_predicts_nothing():
    ids, reference, quantised = pair()
    found = measure_fidelity(
        [(ids[:, :1], reference[:, :1], quantised[:, :1])], has_vocabulary=True, causal=True
    )
    assert found.perplexity is None
    assert found.reference_perplexity is None
    assert found.kl_divergence.value == pytest.approx((kl(0, 0) + kl(1, 0)) / 2, rel=1e-5)


def run_in_chunks(count, **options):
    batches = [torch.full((1, 2), index) for index in range(count)]
    events = []

    def reference(part):
        events.append([int(ids[0, 0]) for ids in part])
        return [ids + 100 for ids in part]

    def quantised(ids):
        events.append(int(ids[0, 0]))
        return ids + 200

    found = list(paired_outputs(batches, reference, quantised, **options))
    for index, (ids, expected, changed) in enumerate(found):
        assert ids is batches[index]
        assert torch.equal(expected, ids + 100)
        assert torch.equal(changed, ids + 200)
    assert len(found) == count
    return events


def test_outputs_come_in_chunks_that_fit_in_order():
    events = run_in_chunks(5, bytes_per_batch=40, memory_bytes=100)
    assert events == [[0, 1], 0, 1, [2, 3], 2, 3, [4], 4]


@pytest.mark.parametrize(
    ("options", "chunks"),
    [
        ({"bytes_per_batch": 1000, "memory_bytes": 100}, [[0], [1], [2]]),
        ({"bytes_per_batch": 10}, [[0, 1, 2]]),
        ({"bytes_per_batch": 0, "memory_bytes": 3}, [[0, 1, 2]]),
    ],
)
def test_a_chunk_has_at_least_one_batch_and_at_most_all(options, chunks):
    events = run_in_chunks(3, **options)
    assert [event for event in events if isinstance(event, list)] == chunks


def test_no_batches_give_no_pairs():
    assert run_in_chunks(0, bytes_per_batch=10) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_vocabulary", [True, False], ids=["logits", "hidden"])
def test_divergences_alone_are_those_of_measuring_everything(dtype, has_vocabulary):
    generator = torch.Generator().manual_seed(3)
    outputs = [torch.randn(3, 7, 50, generator=generator).to(dtype) for _ in range(2)]
    ids = torch.randint(0, 50, (3, 7), generator=generator)
    whole = measure_fidelity([(ids, *outputs)], has_vocabulary=has_vocabulary, causal=True)
    found = sequence_divergences(*outputs, has_vocabulary=has_vocabulary)
    assert tuple(found) == whole.kl_per_sequence


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1], ids=["original", "quantised"])
def test_divergences_of_broken_outputs_are_refused(value, position):
    outputs = [torch.zeros(2, 3, 5), torch.ones(2, 3, 5)]
    outputs[position][1, 2, 3] = value
    with pytest.raises(EvaluationError, match=("original", "quantised")[position]):
        sequence_divergences(*outputs, has_vocabulary=True)


def test_finite_outputs_whose_sum_is_not_are_measured():
    large = torch.full((1, 4, 50), 6e4, dtype=torch.float16)
    assert sequence_divergences(large, large, has_vocabulary=True) == [0.0]
