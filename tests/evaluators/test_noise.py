"""Rounding noise: its size, where it acts, and that nothing of it stays."""

import copy
import math

import pytest
import torch

from autoq.evaluators import measure_fidelity, rounded_again, rounding_noise
from autoq.models import discover, forward_logits
from autoq.testing.tiny_models import make_tiny_model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# In [1, 2) a bfloat16's unit in the last place is 2^-7; it doubles with every power of two.
@pytest.mark.parametrize(
    ("value", "unit"),
    [(1.0, 2**-7), (-1.5, 2**-7), (2.0, 2**-6), (-0.3, 2**-9), (3e-30, 2.0**-106)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_that_of_rounding(value, unit, dtype):
    count = 100_000
    values = torch.full((count,), value, dtype=dtype)
    errors = (rounded_again(values, seeded()).double() - values.double()) / unit
    # Five standard errors of the mean, and of the variance of a draw that is at most 1.
    assert abs(float(errors.mean())) < 5 * math.sqrt(1 / 12 / count)
    assert float(errors.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 12 / count))
    if dtype == torch.float32:
        assert float(errors.abs().max()) <= 0.5 + 1e-4  # float32 rounds the sum
        assert float(errors.abs().max()) > 0.49
    else:
        assert set(errors.tolist()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_zeros_and_dtype_stay(dtype):
    noisy = rounded_again(torch.tensor([[0.0, -0.0], [1.0, 2.0]], dtype=dtype), seeded())
    assert noisy.dtype == dtype
    assert noisy[0].tolist() == [0.0, 0.0]


def logits(model, seed=0):
    ids = torch.randint(4, 260, (2, 12), generator=seeded(seed))
    with torch.no_grad():
        return forward_logits(model, ids)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "t5"])
def test_noise_moves_the_output_and_leaves_no_trace(name):
    model = make_tiny_model(name, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    found, exact = discover(model), logits(model)
    outputs = []
    for seed in (1, 1, 2):
        with rounding_noise(model, found.slots.values(), found.blocks, seeded(seed)):
            outputs.append(logits(model))
    torch.testing.assert_close(logits(model), exact, rtol=0, atol=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], exact)


def test_blocks_and_products_are_both_rounded():
    model = make_tiny_model("llama", dtype=torch.float32)
    found, exact = discover(model), logits(model)
    for slots, blocks in ((found.slots.values(), ()), ((), found.blocks)):
        with rounding_noise(model, slots, blocks, seeded()):
            assert not torch.equal(logits(model), exact)
    with rounding_noise(model, (), (), seeded()):
        assert torch.equal(logits(model), exact)


def floor_of(model, ids):
    """KL divergence that the noise causes, and the output without it."""
    found = discover(model)
    with torch.no_grad():
        exact = forward_logits(model, ids)
        with rounding_noise(model, found.slots.values(), found.blocks, seeded()):
            noisy = forward_logits(model, ids)
    return divergence(ids, exact, noisy), exact


def divergence(ids, first, second):
    pairs = [(ids, first, second)]
    return measure_fidelity(pairs, has_vocabulary=True, causal=True).kl_divergence.value


# Not mixtures: a few tokens that are routed otherwise make up their divergence.
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_floor_is_of_the_size_of_running_in_bfloat16(name):
    ids = torch.randint(4, 260, (8, 64), generator=seeded())
    model = make_tiny_model(name, dtype=torch.float32)
    floor, exact = floor_of(model, ids)
    narrow_floor, narrow_exact = floor_of(model.bfloat16(), ids)
    real = divergence(ids, exact, narrow_exact)
    # A bfloat16 run also rounds norms, attention and logits, and rounds them otherwise when the
    # noise changes what comes in. Two runs that are rounded independently are at most twice as far
    # from each other as one is from the exact one: variances add.
    assert 0.0 < floor < real
    assert floor < narrow_floor < 2 * real
