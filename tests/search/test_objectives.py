"""Losses without labels: their gradients average to the curvature of the divergence."""

import math

import pytest
import torch

from autoq.search import objectives
from autoq.search.objectives import (
    divergence_of,
    fisher_noise_loss,
    own_distribution_loss,
    own_output_loss,
)

LOGITS = torch.tensor([1.5, 0.0, -0.5, 0.7, -2.0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient_of(loss, values, seed=0):
    values = values.clone().requires_grad_(True)
    return torch.autograd.grad(loss(values, generator(seed)), values)[0]


def test_gradients_average_to_the_fisher_matrix_of_the_distribution():
    draws = 40_000
    gradients = gradient_of(own_distribution_loss, LOGITS.repeat(draws, 1)).double()
    found = gradients.t() @ gradients / draws

    def divergence(logits):
        p = LOGITS.double().softmax(-1)
        return (p * (p.log() - logits.log_softmax(-1))).sum()

    expected = torch.autograd.functional.hessian(divergence, LOGITS.double())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    assert expected.abs().max() > 0.2
    torch.testing.assert_close(gradients.mean(dim=0), torch.zeros(5).double(), rtol=0, atol=0.01)


def test_labels_are_drawn_from_the_models_own_distribution():
    draws = 40_000
    gradients = gradient_of(own_distribution_loss, LOGITS.repeat(draws, 1))
    p = LOGITS.softmax(-1)
    labels = (p - gradients).round()  # the gradient is p - onehot(label)
    assert torch.equal(labels.sum(dim=1), torch.ones(draws))
    torch.testing.assert_close(labels.mean(dim=0), p, rtol=0, atol=0.01)


def test_the_loss_is_the_summed_surprise_of_the_labels():
    logits = torch.randn(2, 3, 7, generator=generator(1))
    gradient = gradient_of(own_distribution_loss, logits)
    labels = (logits.softmax(-1) - gradient).argmax(-1)
    expected = -logits.log_softmax(-1).gather(-1, labels[..., None]).sum()
    torch.testing.assert_close(own_distribution_loss(logits, generator()), expected)


@pytest.mark.parametrize("loss", [own_distribution_loss, own_output_loss])
def test_the_generator_alone_decides_the_draw(loss):
    values = torch.randn(2, 9, 50, generator=generator(1))
    torch.manual_seed(1)
    first = gradient_of(loss, values)
    torch.manual_seed(2)
    assert torch.equal(gradient_of(loss, values), first)
    assert not torch.equal(gradient_of(loss, values, seed=1), first)


def test_impossible_words_are_never_drawn():
    logits = torch.full((2000, 6), -torch.inf)
    logits[:, 2:4] = 0
    gradient = gradient_of(own_distribution_loss, logits)
    drawn = (logits.softmax(-1) - gradient).argmax(-1)
    assert set(drawn.tolist()) == {2, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_logits_are_summed_in_float32(dtype):
    logits = torch.randn(4, 500, 50, generator=generator(1)).to(dtype)
    loss = own_distribution_loss(logits, generator())
    assert loss.dtype is torch.float32
    expected = own_distribution_loss(logits.float(), generator())
    assert float(loss) == float(expected)


def test_the_output_loss_estimates_half_the_squared_error():
    hidden = torch.randn(1, 1, 16, generator=generator(1))
    error = torch.randn(16, generator=generator(2)).double()
    slopes = torch.stack(
        [
            (gradient_of(own_output_loss, hidden, seed).double().flatten() * error).sum()
            for seed in range(3000)
        ]
    )
    expected = 0.5 * error.square().sum()
    assert float(0.5 * slopes.square().mean()) == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("scale", [0.5, 6.0], ids=["unsure", "sure"])
def test_noise_has_the_covariance_of_drawn_labels_and_a_bounded_variance(scale):
    draws = 40_000
    logits = (scale * LOGITS).repeat(draws, 1)
    gradients = gradient_of(fisher_noise_loss, logits).double()
    p = logits[0].double().softmax(-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    error = gradients.T @ gradients / draws - fisher
    assert error.abs().max() < 0.02 * fisher.abs().max()
    direction = torch.linspace(-1, 1, p.numel(), dtype=torch.float64)
    squares = (gradients @ direction).square()
    mean = float(direction @ fisher @ direction)
    # With a_i = sqrt(p_i) (d_i - sum_j p_j d_j): 2 (sum a^2)^2 - 2 sum a^4.
    a = p.sqrt() * (direction - (p * direction).sum())
    variance = 2 * float(a.square().sum() ** 2 - a.pow(4).sum())
    assert float(squares.mean()) == pytest.approx(mean, rel=0.05)
    assert float(squares.var()) == pytest.approx(variance, rel=0.1, abs=1e-3 * mean**2)
    drawn = gradient_of(own_distribution_loss, logits).double() @ direction
    if scale > 1:
        assert float(drawn.square().var()) > 3 * variance


def test_noise_over_more_logits_than_a_dot_product_takes_has_the_same_gradient(monkeypatch):
    logits = LOGITS.repeat(3, 1)
    expected = gradient_of(fisher_noise_loss, logits)
    dot = torch.dot

    def limited(first, second):
        assert first.numel() <= LOGITS.numel(), "as CUDA's refuses more than 2^31 - 1"
        return dot(first, second)

    monkeypatch.setattr(torch, "dot", limited)
    monkeypatch.setattr(objectives, "_LARGEST_DOT", LOGITS.numel(), raising=False)
    assert torch.equal(gradient_of(fisher_noise_loss, logits), expected)
    one = logits[:1]
    assert gradient_of(fisher_noise_loss, one).shape == one.shape


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (2, 8)])
def test_noise_of_any_size_is_repeatable_and_of_both_signs(shape):
    """With equal logits, p is 1 / n and u sqrt(n) is the signs e less their mean: e is read off."""
    logits = torch.zeros(shape)

    def signs(seed):
        gradient = gradient_of(fisher_noise_loss, logits, seed).double()
        above = gradient * shape[1] ** 0.5
        spread = above.amax(dim=1) - above.amin(dim=1)
        for row in spread[spread > 1e-6]:
            assert float(row) == pytest.approx(2.0, rel=1e-5)
        return above

    found = [signs(seed) for seed in range(8)]
    assert torch.equal(found[0], signs(0))
    if shape[1] > 1:
        assert len({tuple(values.flatten().round(decimals=3).tolist()) for values in found}) > 4


def test_tokens_that_the_original_rules_out_add_nothing_to_the_divergence():
    """By hand: of (1/4, 3/4, 0) from (1/2, 1/2, 0)."""
    ruled_out = -torch.inf
    original = torch.tensor([[1.0, 3.0, 0.0], [1.0, 3.0, 0.0]]).log()
    changed = torch.tensor([[1.0, 1.0, ruled_out], [1.0, 1.0, ruled_out]])
    changed[1, 0] = ruled_out
    changed.requires_grad_(True)
    found = divergence_of("logits")(original, changed)

    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(found[0].detach()) == pytest.approx(expected, rel=1e-6)
    assert float(found[1].detach()) == math.inf  # the original may say what the other never does
    # The derivative is q - p.
    gradient = torch.autograd.grad(found[0], changed)[0]
    torch.testing.assert_close(gradient[0], torch.tensor([0.25, -0.25, 0.0]))
