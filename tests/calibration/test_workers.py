"""Calibration by several workers, each with a part of the data: the scales are those of all data."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed

from autoq.calibration import calibrate, workers
from autoq.calibration.moments import collect_moments
from autoq.errors import DataError, ModelError
from autoq.formats import parse_calibration
from autoq.layers import Container
from autoq.models import discover, forward_logits
from autoq.testing.tiny_models import make_tiny_model

RANKS = 2
MODELS = {"llama": 24, "mixtral": 2}  # tokens of a sequence: so few that experts stay idle
FORMATS = ("fp8", "nvfp4", "w4a8_awq")
CALIBRATION = "percentile:99+awq+gptq"


def batches(tokens, count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 260, (1, tokens), generator=generator) for _ in range(count)]


def calibrated(model, data, text=CALIBRATION, formats=FORMATS):
    table = calibrate(
        model,
        discover(model),
        formats,
        data,
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, data[0][:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        method=parse_calibration(text),
    )
    names = ("weight_amax", "input_amax", "pre_quant_scale", "importance", "codes", "input_rows")
    return {key: {name: getattr(entry, name) for name in names} for key, entry in table.items()}


def moments_of(model, data):
    model_map = discover(model)
    count = workers.count_batches(len(data), torch.device("cpu"))
    run = partial(forward_logits, model)
    found = collect_moments(model, model_map, model_map.groups, data, run, batch_count=count)
    return {name: (moment.total, moment.rows) for name, moment in found.items()}


def everything(part):
    """Calibrations and moments of the models on a part of their data."""
    found = {}
    for name, tokens in MODELS.items():
        model = make_tiny_model(name, dtype=torch.float32)
        data = part(batches(tokens))
        found[name] = {
            "searched": calibrated(model, data),
            "plain": calibrated(model, data, "rtn"),
            "moments": moments_of(model, data),
        }
    return found


def refusal(model, data, kind, formats=FORMATS):
    try:
        calibrated(model, data, formats=formats)
    except kind as error:
        return str(error)
    return ""


def work(rank, folder):
    """What one rank does: its own half of the data, then two kinds of bad data on rank 1 alone."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS
    )
    found = everything(lambda data: data[rank * 2 : rank * 2 + 2])
    model, data = make_tiny_model("llama", dtype=torch.float32), batches(8)[: 2 * (1 - rank)]
    found["idle"] = refusal(model, data, DataError)
    if rank == 1:
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] = torch.nan
    found["broken"] = refusal(model, batches(8), ModelError, ("nvfp4",))
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    children = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)])
        for rank in range(RANKS)
    ]
    assert [child.wait(timeout=300) for child in children] == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def alone():
    return everything(lambda data: data)


def is_equal(first, second):
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return first == second


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["searched", "plain"])
def test_all_ranks_have_the_same_bits(ranks, name, way):
    first, second = (found[name][way] for found in ranks)
    assert first.keys() == second.keys() and first
    for key in first:
        assert all(is_equal(first[key][each], second[key][each]) for each in first[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_largest_magnitudes_and_counts_are_exactly_those_of_one_process(ranks, alone, name):
    assert ranks[0][name]["plain"] == alone[name]["plain"]
    for key, entry in alone[name]["searched"].items():
        for each in ("weight_amax", "input_rows", "pre_quant_scale"):
            if each != "weight_amax" or key[1] != "w4a8_awq":  # which follows from the codes
                assert is_equal(ranks[0][name]["searched"][key][each], entry[each]), (key, each)


@pytest.mark.parametrize("name", MODELS)
def test_percentiles_and_importances_are_those_of_one_process(ranks, alone, name):
    for key, entry in alone[name]["searched"].items():
        found = ranks[0][name]["searched"][key]
        assert found["input_amax"] == entry["input_amax"]  # counts of bins, or of the same rows
        if entry["importance"] is not None:
            # Sums in float64 of squares in float32, which are added in another order, then rounded.
            torch.testing.assert_close(found["importance"], entry["importance"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_second_moments_and_codes_are_those_of_one_process(ranks, alone, name):
    expected = alone[name]["moments"]
    found = ranks[0][name]["moments"]
    assert found.keys() == expected.keys()
    for key, (total, rows) in expected.items():
        assert found[key][1] == rows
        # float32 sums over rows, in another order
        bound = 4 * torch.finfo(torch.float32).eps * float(total.diagonal().max())
        torch.testing.assert_close(found[key][0], total, rtol=0, atol=bound)
    for key, entry in alone[name]["searched"].items():
        if entry["codes"] is not None:
            # A value at the middle between two codes may go either way.
            same = (ranks[0][name]["searched"][key]["codes"] == entry["codes"]).float().mean()
            assert float(same) > 0.98, key


def test_the_data_of_one_rank_alone_would_give_other_scales(ranks, alone):
    half = calibrated(make_tiny_model("llama", dtype=torch.float32), batches(24)[:2], "rtn")
    key = ("model.layers.1.mlp.down_proj", "fp8")
    assert half[key] != alone["llama"]["plain"][key]


def test_a_rank_without_data_is_refused_on_all_ranks(ranks):
    says = "every worker needs calibration batches, and rank 1 has none; give each rank a part"
    assert all(found["idle"].startswith(says) for found in ranks)


def test_inputs_that_are_not_finite_on_one_rank_are_refused_on_all(ranks):
    for found in ranks:
        assert "model.layers.1.self_attn.q_proj holds NaN or Inf" in found["broken"]


def test_one_process_needs_no_workers():
    assert not workers.are_several()
    assert workers.count_batches(0, torch.device("cpu")) == 0
    tensor = torch.tensor([1.0, torch.nan])
    workers.make_largest(tensor)
    workers.make_sum(tensor)
    assert tensor[0] == 1.0 and tensor[1].isnan()


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
