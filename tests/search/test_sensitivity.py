"""Sensitivity: equal to plain autograd by brute force, repeatable, and true to measured KL."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from autoq.bundled.outliers import add_activation_outliers
from autoq.calibration import calibrate
from autoq.errors import ModelError
from autoq.formats import FORMATS, CalibrationMethod
from autoq.layers import fake_quantize_input, fake_quantize_weight
from autoq.layers.quantize import Container
from autoq.layers.simulate import SimulatedModel
from autoq.models import SlotKind, discover, forward_logits, slot_weight
from autoq.search import _projections, sensitivity
from autoq.search.estimators import TokenProjection
from autoq.search.objectives import own_distribution_loss
from autoq.search.sensitivity import BatchLoss
from autoq.testing.tiny_models import make_tiny_model

QUANTIZED = ("fp8", "nvfp4", "w4a8_awq")
SEQUENCES, TOKENS = 2, 8
ORDER_OF_SUMS = 1e-4
"""Of some hundred float32 terms of either sign, relative to a mean of squares."""


def token_ids(seed=0, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 260, (SEQUENCES, tokens), generator=generator)


def loss_of(model, ids, seed=0):
    logits = forward_logits(model, ids)
    generator = torch.Generator().manual_seed(seed)
    return BatchLoss(own_distribution_loss(logits, generator), *ids.shape)


def hard_llama(dtype=torch.float32):
    """A llama whose layers want AWQ scales."""
    model = make_tiny_model("llama", dtype=torch.float32)
    add_activation_outliers(model, channels_per_norm=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[7].mul_(40)
    return model.to(dtype)


def make_model(name):
    return hard_llama() if name == "hard-llama" else make_tiny_model(name, dtype=torch.float32)


def calibration_of(model, container=Container.MODELOPT, run=forward_logits, data=None, **options):
    data = token_ids(1) if data is None else data
    return calibrate(
        model,
        discover(model),
        QUANTIZED,
        [data],
        partial(run, model),
        run_small=lambda: run(model, data[:1]),
        container=container,
        scale_dtype=torch.bfloat16,
        **options,
    )


def scorer_of(model, calibration, formats=QUANTIZED, *, container=Container.MODELOPT, **options):
    options.setdefault("row_fraction", 1.0)
    options.setdefault("dtype", torch.float32)
    options.setdefault("added_variance", 0.0)  # all tokens
    return TokenProjection(
        model,
        discover(model),
        formats,
        calibration,
        container=container,
        scale_dtype=torch.bfloat16,
        **options,
    )


@pytest.fixture(scope="module")
def llama():
    model = make_tiny_model("llama", dtype=torch.float32)
    return model, calibration_of(model)


class ProductsByHand:
    """Every product with a slot's matrix: (slot, input rows, output, token of each row).

    Made with forward hooks and, for experts, an own loop in the place of the model's.
    """

    def __init__(self, model, model_map):
        self.seen = []
        for slot in model_map.slots.values():
            if slot.kind is not SlotKind.EXPERT:
                model.get_submodule(slot.module).register_forward_hook(self._hook(slot))
        slots = {(s.module, s.expert, s.parameter): s for s in model_map.slots.values()}
        for path in {s.module for s in model_map.slots.values() if s.kind is SlotKind.EXPERT}:
            module = model.get_submodule(path)
            module.forward = partial(self._experts, module, path, slots)

    def _hook(self, slot):
        def hook(_module, args, output):
            output.retain_grad()
            self.seen.append((slot, args[0].detach().flatten(0, -2), output, None))

        return hook

    def _experts(self, module, path, slots, hidden, chosen, gates):
        result = torch.zeros_like(hidden)
        for expert in range(module.gate_up_proj.shape[0]):
            tokens, position = torch.nonzero(chosen == expert, as_tuple=True)
            if not len(tokens):
                continue
            inputs = hidden[tokens]
            both = inputs @ module.gate_up_proj[expert].t()
            gate, up = both.chunk(2, dim=-1)
            inside = module.act_fn(gate) * up
            output = inside @ module.down_proj[expert].t()
            for parameter, x, y in (("gate_up_proj", inputs, both), ("down_proj", inside, output)):
                y.retain_grad()
                self.seen.append((slots[path, expert, parameter], x.detach(), y, tokens))
            result = result.index_add(0, tokens, output * gates[tokens, position, None])
        return result


def by_brute_force(
    model, calibration, loss, *, container=Container.MODELOPT, sequences=SEQUENCES, tokens=TOKENS
):
    """Contributions [sequences, groups, formats], from outputs with and without quantisation."""
    model = copy.deepcopy(model).requires_grad_(False)
    table = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is table:
            module.register_forward_hook(lambda _m, _args, output: output.requires_grad_(True))
    model_map = discover(model)
    products = ProductsByHand(model, model_map)
    loss(model).total.backward()
    index = {group.name: position for position, group in enumerate(model_map.groups)}
    group_of = model_map.group_of()
    projections = np.zeros((len(index), len(QUANTIZED), sequences * tokens))
    with torch.no_grad():
        for slot, inputs, output, rows in products.seen:
            gradient = output.grad.flatten(0, -2).double()
            weight = slot_weight(model, slot).float()
            exact = inputs.double() @ weight.double().t()
            positions = np.arange(len(inputs)) if rows is None else rows.numpy()
            for column, name in enumerate(QUANTIZED):
                fmt, scales = FORMATS[name], calibration[slot.name, name]
                changed = fake_quantize_input(inputs, fmt, scales, container=container)
                matrix = fake_quantize_weight(
                    weight, fmt, scales, scale_dtype=torch.bfloat16, container=container
                )
                error = changed.double() @ matrix.double().t() - exact
                projection = (gradient * error).sum(dim=1).numpy()
                np.add.at(projections[index[group_of[slot.name]], column], positions, projection)
    by_sequence = projections.reshape(*projections.shape[:2], sequences, tokens)
    return np.moveaxis(0.5 * np.square(by_sequence).sum(axis=-1) / tokens, 2, 0)


@pytest.mark.parametrize(
    "name",
    ["llama", "hard-llama", "gemma3", "phi3", "gpt2", "opt", "mixtral", "qwen3_moe", "bert", "t5"],
)
def test_contributions_are_those_of_brute_force(name):
    model = make_model(name)
    calibration = calibration_of(model)
    if name == "hard-llama":
        scaled = {slot for (slot, _), c in calibration.items() if c.pre_quant_scale is not None}
        assert len(scaled) >= 10
    expected = by_brute_force(model, calibration, lambda m: loss_of(m, token_ids()))
    found = scorer_of(model, calibration).score_batch(0, lambda: loss_of(model, token_ids()))
    assert found.shape == (SEQUENCES, len(discover(model).groups), 3)
    assert (expected > 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize("name", ["hard-llama", "mixtral"])
def test_contributions_follow_the_containers_numerics(name):
    model = make_model(name)
    container = Container.COMPRESSED_TENSORS
    calibration = calibration_of(model, container)
    loss = partial(loss_of, ids=token_ids())
    expected = by_brute_force(model, calibration, loss, container=container)
    scorer = scorer_of(model, calibration, container=container)
    found = scorer.score_batch(0, lambda: loss(model))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())
    other = scorer_of(model, calibration).score_batch(0, lambda: loss(model))
    assert (found[..., 2] != other[..., 2]).all()
    assert (found[..., 0] == other[..., 0]).all()


def test_a_narrow_dtype_changes_little():
    model = hard_llama(torch.bfloat16)
    calibration = calibration_of(model)
    # The same numbers in float32: what is left is bfloat16's rounding on the way.
    wide = copy.deepcopy(model).float()
    ids = token_ids()
    with torch.no_grad():
        labels = forward_logits(wide, ids).argmax(dim=-1).flatten()

    def loss(model):
        logits = forward_logits(model, ids).float().flatten(0, 1)
        return BatchLoss(nn.functional.cross_entropy(logits, labels, reduction="sum"), *ids.shape)

    found = scorer_of(model, calibration).score_batch(0, lambda: loss(model))
    expected = scorer_of(wide, calibration).score_batch(0, lambda: loss(wide))
    ratio = found.sum(axis=0) / expected.sum(axis=0)
    assert abs(np.log(ratio)).max() < 0.7
    assert abs(np.log(ratio)).mean() < 0.25


class Tower(nn.Module):
    """Linears without embeddings; one of them is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x):
        return self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))


def test_a_layer_used_twice_adds_up_before_squaring():
    tower = Tower()
    x = torch.randn(SEQUENCES, TOKENS, 128, generator=torch.Generator().manual_seed(0))
    calibration = calibration_of(tower, run=lambda m, data: m(data), data=x)
    direction = torch.randn(SEQUENCES, TOKENS, 128, generator=torch.Generator().manual_seed(1))

    def contributions(added_variance):
        scorer = scorer_of(tower, calibration, added_variance=added_variance)
        return scorer.score_batch(
            0, lambda: BatchLoss((tower(x) * direction).sum(), SEQUENCES, TOKENS)
        )

    found, sampled = contributions(0.0), contributions(0.5)
    assert not np.array_equal(sampled[:, 0], found[:, 0])
    assert np.array_equal(sampled[:, 1], found[:, 1])  # its tokens come twice: none is left out
    frozen = copy.deepcopy(tower).requires_grad_(False)
    seen = []

    def remember(_module, args, output):
        if not output.requires_grad:
            output.requires_grad_(True)
        output.retain_grad()
        seen.append((args[0].detach(), output))

    frozen.first.register_forward_hook(remember)
    frozen.twice.register_forward_hook(remember)
    (frozen(x) * direction).sum().backward()
    fmt = FORMATS["fp8"]
    projections = [0.0, 0.0]
    for (inputs, output), name in zip(seen, ("first", "twice", "twice"), strict=True):
        weight, scales = getattr(frozen, name).weight, calibration[name, "fp8"]
        matrix = fake_quantize_weight(weight, fmt, scales, scale_dtype=torch.bfloat16)
        change = fake_quantize_input(inputs, fmt, scales) @ matrix.t() - inputs @ weight.t()
        projections[name == "twice"] += (output.grad * change).sum(dim=-1)
    expected = torch.stack([0.5 * p.square().mean(dim=1) for p in projections], dim=1)
    np.testing.assert_allclose(found[..., 0], expected.numpy(), rtol=1e-3)


def test_formats_do_not_influence_each_other(llama):
    hard = hard_llama()
    for model, calibration in (llama, (hard, calibration_of(hard))):
        loss = partial(loss_of, model, token_ids())
        together = scorer_of(model, calibration).score_batch(0, loss)
        for order in (QUANTIZED[::-1], ("w4a8_awq", "fp8", "nvfp4"), *((f,) for f in QUANTIZED)):
            scorer = scorer_of(model, calibration, order)
            assert scorer.formats == order
            found = scorer.score_batch(0, loss)
            columns = [QUANTIZED.index(name) for name in order]
            assert np.array_equal(found, together[..., columns])


def test_none_is_no_column(llama):
    model, calibration = llama
    scorer = scorer_of(model, calibration, ("none", "fp8"))
    assert scorer.formats == ("fp8",)
    assert scorer.score_batch(0, partial(loss_of, model, token_ids())).shape == (2, 8, 1)


@pytest.mark.parametrize("name", ["hard-llama", "mixtral", "t5"])
def test_scores_repeat_to_the_bit(name):
    model = make_model(name)
    calibration = calibration_of(model)
    scorer = scorer_of(model, calibration, row_fraction=0.5)

    def score(scorer, index):
        return scorer.score_batch(index, partial(loss_of, model, token_ids(index), index))

    first, second = score(scorer, 0), score(scorer, 1)
    assert not np.array_equal(first, second)
    assert np.array_equal(score(scorer, 0), first)
    # A scorer that starts later, as after an interruption.
    assert np.array_equal(score(scorer_of(model, calibration, row_fraction=0.5), 1), second)


def test_sampled_tokens_give_the_same_score_on_average(llama):
    model, calibration = llama
    ids = token_ids(tokens=16)
    loss = partial(loss_of, model, ids)
    full = scorer_of(model, calibration).score_batch(0, loss)
    draws = np.stack(
        [
            scorer_of(model, calibration, row_fraction=0.25, seed=seed).score_batch(0, loss)
            for seed in range(24)
        ]
    )
    assert len({draw.tobytes() for draw in draws}) > 12
    # Unbiased: within what 24 draws can be off.
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    assert (abs(draws.mean(axis=0) - full) < 4.5 * error).all()
    total = draws.sum(axis=(1, 2)).mean(axis=0) / full.sum(axis=(0, 1))
    np.testing.assert_allclose(total, 1, atol=0.15)


def test_every_sequence_gives_as_many_sampled_tokens():
    tower = Tower()
    x = torch.randn(4, 6, 128, generator=torch.Generator().manual_seed(0))
    calibration = calibration_of(tower, run=lambda m, data: m(data), data=x)
    # A loss that only the last sequence has a part in.
    found = scorer_of(tower, calibration, row_fraction=0.3).score_batch(
        0, lambda: BatchLoss(tower(x)[3].square().sum(), 4, 6)
    )
    assert (found[:3] == 0).all()
    assert (found[3] > 0).all()


def test_the_model_is_untouched(llama):
    model, calibration = llama
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    before = {name: values.clone() for name, values in model.state_dict().items()}
    scorer_of(model, calibration).score_batch(0, partial(loss_of, model, token_ids()))

    def fail():
        loss_of(model, token_ids())
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        scorer_of(model, calibration).score_batch(0, fail)
    assert [p.requires_grad for p in parameters] == [i % 2 == 1 for i in range(len(parameters))]
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert all(p.grad is None for i, p in enumerate(parameters) if i != 1)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("limit_bytes", [0, 1 << 30])
def test_blocks_beyond_a_bound_are_computed_again_instead_of_kept(llama, limit_bytes, monkeypatch):
    model, calibration = llama
    monkeypatch.setattr(sensitivity, "KEPT_ACTIVATION_BYTES", limit_bytes)
    scorer = scorer_of(model, calibration)
    loss = partial(loss_of, model, token_ids())
    first = scorer.score_batch(0, loss)  # measures what a block keeps
    runs = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        for layer in model.model.layers
    ]
    again = scorer.score_batch(0, loss)
    for hook in hooks:
        hook.remove()
    assert len(runs) == (1 if limit_bytes else 2) * len(hooks)
    assert np.array_equal(first, again)
    assert np.array_equal(first, scorer_of(model, calibration).score_batch(0, loss))


def test_what_a_group_cannot_take_is_nan(llama):
    model, calibration = llama
    loss = partial(loss_of, model, token_ids())
    group = discover(model).groups[1]
    partial_table = {
        (slot, name): scales
        for (slot, name), scales in calibration.items()
        if slot not in group.slots or name != "nvfp4"
    }
    found = scorer_of(model, partial_table).score_batch(0, loss)
    expected = scorer_of(model, calibration).score_batch(0, loss)
    expected[:, 1, QUANTIZED.index("nvfp4")] = np.nan
    assert np.array_equal(found, expected, equal_nan=True)


def count_quantisations(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return fake_quantize_weight(*args, **kwargs)

    monkeypatch.setattr(_projections, "fake_quantize_weight", counted)
    return calls


def test_the_bound_on_kept_weight_errors_changes_no_score(llama, monkeypatch):
    model, calibration = llama
    calls = count_quantisations(monkeypatch)
    cells = len(discover(model).slots) * len(QUANTIZED)
    loss = partial(loss_of, model, token_ids())

    def score_twice():
        scorer = scorer_of(model, calibration)
        return scorer.score_batch(0, loss), scorer.score_batch(1, loss)

    kept = score_twice()
    assert len(calls) == cells
    calls.clear()
    # Room for the errors of the last down projection, and no more.
    monkeypatch.setattr(_projections, "WEIGHT_ERROR_CACHE_BYTES", 3 * 128 * 256 * 4)
    some = score_twice()
    assert cells < len(calls) < 2 * cells
    calls.clear()
    monkeypatch.setattr(_projections, "WEIGHT_ERROR_CACHE_BYTES", 0)
    recomputed = score_twice()
    assert len(calls) == 2 * cells
    assert np.array_equal(kept, some)
    assert np.array_equal(kept, recomputed)


@pytest.mark.parametrize("container", list(Container))
def test_errors_too_large_to_be_made_at_once_give_the_same_scores(llama, container, monkeypatch):
    model, _ = llama
    # Block scales that were searched cannot be made again piece by piece.
    calibration = calibration_of(model, container, method=CalibrationMethod.MAX)
    calls = count_quantisations(monkeypatch)
    loss = partial(loss_of, model, token_ids())
    whole = scorer_of(model, calibration, container=container).score_batch(0, loss)
    cells = len(calls)
    calls.clear()
    monkeypatch.setattr(_projections, "LARGEST_ERROR_BYTES", 0)
    in_pieces = scorer_of(model, calibration, container=container).score_batch(0, loss)
    # FP8 never makes an error, NVFP4 where readers have its scale to the bit, INT4 always.
    assert cells / 3 <= len(calls) < 2 * cells / 3
    # Here the pieces are whole matrices, so not even the order of sums differs but where the members
    # of a fusion set are one matrix no longer.
    alone = [len(group.slots) == 1 for group in discover(model).groups]
    assert 0 < sum(alone) < len(alone)
    assert np.array_equal(whole[:, alone], in_pieces[:, alone])
    np.testing.assert_allclose(in_pieces, whole, rtol=ORDER_OF_SUMS)


def test_a_loss_of_nan_is_refused(llama):
    model, calibration = llama

    def loss():
        batch = loss_of(model, token_ids())
        return BatchLoss(batch.total * torch.nan, batch.sequences, batch.tokens_per_sequence)

    with pytest.raises(ModelError, match=r"loss is NaN or Inf .*--dtype float32.* weights"):
        scorer_of(model, calibration).score_batch(0, loss)


def test_a_gradient_of_nan_names_a_group(llama):
    model, calibration = llama

    def loss():
        logits = forward_logits(model, token_ids())
        return BatchLoss((logits * 0).sum().sqrt(), SEQUENCES, TOKENS)

    with pytest.raises(ModelError, match=r"gradient at model\.layers\.0\..* is NaN or Inf"):
        scorer_of(model, calibration).score_batch(0, loss)


def test_a_layer_without_a_gradient_is_named():
    tower = Tower()
    x = torch.randn(SEQUENCES, TOKENS, 128)
    calibration = calibration_of(tower, run=lambda m, data: m(data), data=x)

    def loss():
        return BatchLoss(tower.twice(tower.first(x).detach()).square().sum(), SEQUENCES, TOKENS)

    text = r"no gradient reaches first, .*; exclude it with --exclude 'first'"
    with pytest.raises(ModelError, match=text):
        scorer_of(tower, calibration).score_batch(0, loss)


def test_rows_that_are_no_tokens_are_refused():
    tower = Tower()
    x = torch.randn(SEQUENCES, TOKENS, 128)
    calibration = calibration_of(tower, run=lambda m, data: m(data), data=x)

    def loss():
        return BatchLoss(tower(x.flatten(0, 1)[:-1]).square().sum(), SEQUENCES, TOKENS)

    text = r"as many rows from every sequence, and twice gets 15 of 2 sequences; exclude it"
    with pytest.raises(ModelError, match=text):
        scorer_of(tower, calibration).score_batch(0, loss)


def test_experts_without_tokens_are_no_mistake():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    calibration = calibration_of(model)
    ids = token_ids()[:1, :2]  # two tokens see at most four of eight experts
    found = scorer_of(model, calibration).score_batch(0, lambda: loss_of(model, ids))
    assert (found > 0).all()


def measured_kl(model, calibration, ids):
    """KL to the original of quantising one group alone, nats per token, [groups, formats]."""
    model_map = discover(model)
    with torch.no_grad():
        reference = forward_logits(model, ids).double().log_softmax(-1)
        simulated = SimulatedModel(
            model,
            model_map.slots,
            {},
            calibration,
            container=Container.MODELOPT,
            scale_dtype=torch.bfloat16,
        )
        table = np.zeros((len(model_map.groups), len(QUANTIZED)))
        for row, group in enumerate(model_map.groups):
            for column, name in enumerate(QUANTIZED):
                simulated.apply(dict.fromkeys(group.slots, name))
                changed = forward_logits(model, ids).double().log_softmax(-1)
                table[row, column] = (reference.exp() * (reference - changed)).sum(-1).mean()
        simulated.restore()
    return table


@pytest.mark.parametrize("name", ["llama", "hard-llama", "mixtral"])
def test_predictions_rank_like_measured_divergences(name):
    from scipy.stats import spearmanr

    model = make_model(name)
    calibration = calibration_of(model)
    scorer = scorer_of(model, calibration)
    ids = token_ids(2, tokens=48)
    draws = 12
    predicted = np.mean(
        [scorer.score_batch(0, partial(loss_of, model, ids, seed)) for seed in range(draws)],
        axis=(0, 1),
    )
    measured = measured_kl(model, calibration, ids)
    assert spearmanr(predicted.ravel(), measured.ravel()).statistic > 0.9
    # Not the order alone: the numbers are nats. Larger changes leave the quadratic range.
    small = measured < np.median(measured)
    assert abs(np.log(predicted[small] / measured[small])).mean() < 0.35


def test_bfloat16_projections_move_scores_by_less_than_a_few_per_cent(llama):
    """Rounding both operands to 8 bits is far below what the choice of tokens does."""
    model, calibration = llama
    ids = token_ids(tokens=64)

    def scores(dtype):
        scorer = scorer_of(model, calibration, dtype=dtype)
        return scorer.score_batch(0, lambda: loss_of(model, ids)).mean(axis=0)

    exact, rounded = scores(torch.float32), scores(torch.bfloat16)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0.03)


BFLOAT16_SHARE_OF_STANDARD_ERROR = 0.1
"""What is lost by multiplying in bfloat16 is lost in the noise of 24 sequences: the root of the sum
of squares of 1 and 0.1 is 1.005."""


def test_gradients_through_many_layers_in_bfloat16_move_scores_far_less_than_their_error():
    """Every layer's product rounds the gradient once more, and no layer takes it back."""
    model = make_tiny_model("llama", dtype=torch.float32)
    for _ in range(3):
        model.model.layers.extend(copy.deepcopy(model.model.layers[:2]))
    model.config.num_hidden_layers = len(model.model.layers)
    calibration = calibration_of(model, method=CalibrationMethod.MAX)

    def contributions(dtype):
        scorer = scorer_of(model, calibration, ("fp8", "nvfp4"), dtype=dtype)
        batches = (
            scorer.score_batch(index, partial(loss_of, model, token_ids(index, 16), index))
            for index in range(12)
        )
        return np.concatenate(list(batches))

    exact, rounded = contributions(torch.float32), contributions(torch.bfloat16)
    standard_error = exact.std(axis=0, ddof=1) / np.sqrt(len(exact))
    change = abs(rounded.mean(axis=0) - exact.mean(axis=0))
    assert change.max() > 0
    assert (change / standard_error).max() < BFLOAT16_SHARE_OF_STANDARD_ERROR
