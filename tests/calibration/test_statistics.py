"""Input statistics: equal to what plain hooks see, over all batches."""

from functools import partial

import pytest
import torch

from autoq.calibration import statistics as statistics_module
from autoq.calibration.statistics import KEPT_ROWS, InputStatistics, collect_statistics
from autoq.errors import ModelError
from autoq.models import SlotKind, discover, forward_logits, slot_weight
from autoq.testing.tiny_models import make_tiny_model

CPU = torch.device("cpu")


def batches(count=3, sequences=2, tokens=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 260, (sequences, tokens), generator=generator) for _ in range(count)]


def collect(model, model_map, data, *, keep_rows_of=(), after_batch=lambda: None):
    return collect_statistics(
        model,
        model_map,
        data,
        partial(forward_logits, model),
        batch_count=len(data),
        keep_rows_of=keep_rows_of,
        after_batch=after_batch,
    )


def inputs_seen_by_hooks(model, model_map, data):
    """Slot -> float64 [rows, in_features] over all batches, without taps."""
    seen = {name: [torch.empty(0, s.in_features)] for name, s in model_map.slots.items()}

    def of_matrix(name):
        return lambda _module, args: seen[name].append(args[0].flatten(0, -2))

    def of_experts(path):
        def hook(module, args):
            hidden, chosen = args[0], args[1]
            for expert in range(module.gate_up_proj.shape[0]):
                rows = hidden[(chosen == expert).any(dim=1)]
                gate, up = (rows @ module.gate_up_proj[expert].t()).chunk(2, dim=-1)
                seen[f"{path}.{expert}.gate_up_proj"].append(rows)
                seen[f"{path}.{expert}.down_proj"].append(module.act_fn(gate) * up)

        return hook

    hooks = []
    for path in {s.module for s in model_map.slots.values()}:
        module = model.get_submodule(path)
        hook = of_matrix(path) if path in model_map.slots else of_experts(path)
        hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids in data:
            forward_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5", "bert"])
def test_statistics_are_those_of_plain_hooks_over_all_batches(name):
    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    data = batches()
    expected = inputs_seen_by_hooks(model, model_map, data)
    found = collect(model, model_map, data)
    assert set(found) == set(model_map.slots)
    for slot, statistics in found.items():
        rows = expected[slot]
        amax = rows.abs().amax(dim=0) if len(rows) else torch.zeros(rows.shape[1]).double()
        # Only the insides of experts are computed anew here, and those not to the bit.
        inside = model_map.slots[slot].parameter == "down_proj"
        tolerance = 1e-5 if inside else 0
        assert statistics.channel_amax.dtype is torch.float32
        torch.testing.assert_close(
            statistics.channel_amax.double(), amax, rtol=tolerance, atol=tolerance
        )
        assert statistics.row_count == len(rows)
        mean = rows.abs().sum(dim=0) / max(len(rows), 1)
        torch.testing.assert_close(statistics.channel_mean().double(), mean, rtol=1e-5, atol=1e-7)


def test_the_largest_input_may_be_in_any_batch():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    data = batches()
    alone = [collect(model, model_map, [ids]) for ids in data]
    together = collect(model, model_map, data)
    winners = set()
    for name, statistics in together.items():
        of_batches = torch.stack([one[name].channel_amax for one in alone])
        assert torch.equal(statistics.channel_amax, of_batches.amax(dim=0))
        winners.update(of_batches.argmax(dim=0).tolist())
    assert winners == {0, 1, 2}


def test_a_fusion_set_shares_one_entry_and_others_do_not():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    found = collect(model, model_map, batches(), keep_rows_of=model_map.slots)
    layer = "model.layers.0."
    q, k, v = (found[f"{layer}self_attn.{name}_proj"] for name in "qkv")
    assert q is k is v
    assert found[f"{layer}mlp.gate_proj"] is found[f"{layer}mlp.up_proj"]
    assert found[f"{layer}mlp.gate_proj"] is not q
    assert len({id(s) for s in found.values()}) == len(model_map.groups)
    assert q.row_count == 3 * 2 * 5  # each input once, not once per member


def test_kept_rows_are_real_inputs_from_every_batch_and_few():
    model = make_tiny_model("llama", dtype=torch.bfloat16)
    model_map = discover(model)
    data = batches(count=2, sequences=4, tokens=KEPT_ROWS // 4)
    expected = inputs_seen_by_hooks(model, model_map, data)
    found = collect(model, model_map, data, keep_rows_of=model_map.slots)
    for name, statistics in found.items():
        assert len(statistics.kept_rows) == KEPT_ROWS
        first, second = statistics.kept_rows.chunk(2)
        for kept, rows in zip((first, second), expected[name].chunk(2), strict=True):
            is_first = (kept.double() == rows[0::2]).all(dim=1)
            assert ((kept.double() == rows[1::2]).all(dim=1) | is_first).all()
            assert 0.2 * len(kept) < is_first.sum() < 0.8 * len(kept)
    without = collect(model, model_map, data)
    assert all(not len(statistics.kept_rows) for statistics in without.values())


def test_kept_rows_come_from_all_positions_of_a_sequence():
    tokens, sequences, keep = 64, 32, 128
    rows = torch.arange(tokens).repeat(sequences).float()[:, None]
    statistics = InputStatistics.empty(1, keep=keep, dtype=torch.float32, device=CPU)
    statistics.record(rows, keep=keep)
    positions = statistics.kept_rows.flatten().int()
    # The first token has one part in 64 of the rows, and may have that of what is kept, rounded up.
    assert (positions == 0).sum() <= 3
    assert positions.unique().numel() > 0.7 * tokens


def test_rows_are_kept_of_the_slots_that_were_named():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    named = "model.layers.0.mlp.down_proj"
    found = collect(model, model_map, batches(), keep_rows_of={named})
    assert {name for name, entry in found.items() if len(entry.kept_rows)} == {named}


def test_no_rows_of_experts_are_kept():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    model_map = discover(model)
    found = collect(model, model_map, batches(), keep_rows_of=model_map.slots)
    for name, slot in model_map.slots.items():
        assert bool(len(found[name].kept_rows)) == (slot.kind is not SlotKind.EXPERT)
        assert found[name].row_storage.numel() == 0 or slot.kind is not SlotKind.EXPERT


def test_experts_without_tokens_have_empty_statistics():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    model_map = discover(model)
    found = collect(model, model_map, batches(count=1, sequences=1, tokens=1))
    idle = [s for name, s in found.items() if not s.row_count]
    assert len(idle) == 2 * 2 * 2  # two layers, two experts of four, two projections
    for statistics in idle:
        assert statistics.channel_amax.abs().sum() == 0
        assert statistics.channel_mean().abs().sum() == 0


def test_an_empty_input_changes_nothing():
    statistics = InputStatistics.empty(4, keep=8, dtype=torch.float32, device=CPU)
    statistics.record(torch.ones(3, 4), keep=8)
    statistics.record(torch.empty(0, 4), keep=8)
    assert statistics.row_count == 3
    assert len(statistics.kept_rows) == 3
    assert torch.equal(statistics.channel_mean(), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values_at_once", [1, 7, 24, 1 << 22])
def test_squares_are_summed_in_pieces_of_any_size(dtype, values_at_once, monkeypatch):
    monkeypatch.setattr(statistics_module, "_VALUES_AT_ONCE", values_at_once)
    statistics = InputStatistics.empty(6, keep=0, dtype=dtype, device=CPU)
    inputs = [
        torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows)).to(dtype)
        for rows in (11, 1, 4)
    ]
    for rows in inputs:
        statistics.record(rows, keep=0)
    expected = torch.cat(inputs).double().square().sum(dim=0)
    # Float32 within a piece: no more than 12 roundings of 2^-24 each.
    torch.testing.assert_close(statistics.channel_square_sum, expected, rtol=12 * 2**-24, atol=0)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_broken_activations_name_the_first_layer_that_receives_them(broken):
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    slot = model_map.slots["model.layers.0.mlp.down_proj"]
    slot_weight(model, slot)[3, 5] = broken
    text = r"input of model\.layers\.1\.self_attn\.q_proj holds NaN or Inf .*--dtype float32"
    with pytest.raises(ModelError, match=text):
        collect(model, model_map, batches())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_broken_batch_is_found_when_it_comes():
    model = make_tiny_model("llama", dtype=torch.float32)
    data = batches()
    data[1][:] = 7
    data[0][data[0] == 7] = 8
    model.get_input_embeddings().weight.data[7, 0] = torch.nan
    done = []
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj holds NaN"):
        collect(model, discover(model), data, after_batch=lambda: done.append(1))
    assert len(done) == 1


def test_progress_counts_batches():
    model = make_tiny_model("llama", dtype=torch.float32)
    done = []
    collect(model, discover(model), batches(), after_batch=lambda: done.append(1))
    assert len(done) == 3
