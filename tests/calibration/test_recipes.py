"""Calibration by recipes: percentiles of inputs, fixed strengths, GPTQ's options, codes under any scales."""

import math
from functools import partial

import pytest
import torch

from autoq.bundled.outliers import add_activation_outliers
from autoq.calibration import calibrate
from autoq.calibration.gptq import ErrorFeedback
from autoq.calibration.scales import percentile_of
from autoq.calibration.statistics import InputStatistics
from autoq.formats import FORMATS, FeedbackOptions, parse_calibration
from autoq.layers import Container, dequantize_weight, quantize_weight
from autoq.layers.quantize import code_grid, fake_quantize_weight, weight_scheme
from autoq.models import discover, forward_logits, slot_weight
from autoq.testing.tiny_models import make_tiny_model

FOUR_BITS = ("nvfp4", "nvfp4_wo", "mxfp4", "w4a8_awq", "int4_awq", "int4_dq")
LAYER = "model.layers.1.mlp.down_proj"


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 260, (2, 24), generator=generator) for _ in range(count)]


def llama():
    model = make_tiny_model("llama", dtype=torch.float32)
    add_activation_outliers(model, channels_per_norm=4)
    return model


def calibrated(model, formats, text, container=Container.MODELOPT):
    data = batches()
    return calibrate(
        model,
        discover(model),
        formats,
        data,
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, data[0][:1]),
        container=container,
        scale_dtype=torch.bfloat16,
        method=parse_calibration(text),
    )


def inputs_of(model, name):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    for ids in batches():
        forward_logits(model, ids)
    hook.remove()
    return torch.cat(seen).detach()


def same(first, second):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and b is not None else a == b
        for a, b in (
            (getattr(first, name), getattr(second, name))
            for name in ("weight_amax", "input_amax", "pre_quant_scale", "importance", "codes")
        )
    )


@pytest.mark.parametrize(
    ("method", "text"), [("best", "awq+smoothquant+gptq"), ("scales", "awq+smoothquant")]
)
def test_the_default_in_other_words_gives_the_same_bits(method, text):
    formats = ("fp8", "nvfp4", "w4a8_awq", "mxfp4", "int8_sq")
    model = llama()
    own, joined = calibrated(model, formats, method), calibrated(model, formats, text)
    assert own.keys() == joined.keys()
    assert all(same(own[key], joined[key]) for key in own)


def test_rtn_has_largest_magnitudes_and_nothing_else():
    model = llama()
    inputs = inputs_of(model, LAYER)
    for (slot, fmt), entry in calibrated(model, FOUR_BITS, "rtn").items():
        assert entry.pre_quant_scale is entry.importance is entry.codes is None
        if slot == LAYER:
            assert entry.input_amax == float(inputs.abs().max())
        if slot == LAYER and fmt == "nvfp4":
            assert entry.weight_amax == float(
                slot_weight(model, discover(model).slots[slot]).abs().max()
            )


@pytest.mark.parametrize("fmt", FOUR_BITS)
def test_codes_that_make_up_for_errors_need_no_searched_scales(fmt):
    model = llama()
    inputs = inputs_of(model, LAYER)
    weight = model.get_submodule(LAYER).weight.detach()
    errors = {}
    for text in ("rtn", "gptq"):
        entry = calibrated(model, (fmt,), text)[LAYER, fmt]
        assert (entry.codes is not None) == (text == "gptq")
        assert entry.importance is None
        quantized = quantize_weight(weight, FORMATS[fmt], entry, scale_dtype=torch.bfloat16)
        values = dequantize_weight(quantized)
        faked = fake_quantize_weight(weight, FORMATS[fmt], entry, scale_dtype=torch.bfloat16)
        assert torch.equal(values, faked)
        errors[text] = float((inputs @ (values - weight).t()).square().sum())
        grid = code_grid(weight, FORMATS[fmt], entry, scale_dtype=torch.bfloat16)
        if fmt != "w4a8_awq":  # whose grid is that before the second level
            on_grid = values[..., None] == grid.levels * grid.step[..., None]
            assert bool(on_grid.any(-1).all())  # the scales are those under which codes were chosen
    assert errors["gptq"] < 0.9 * errors["rtn"]


def test_codes_under_plain_scales_are_never_rounded_anew_while_scoring():
    entry = calibrated(llama(), ("nvfp4",), "gptq")[LAYER, "nvfp4"]
    assert weight_scheme(FORMATS["nvfp4"], entry) is None


def test_a_percentile_by_hand():
    values = torch.arange(1.0, 11.0).reshape(2, 5)
    assert percentile_of(values, 90) == 9.0
    assert percentile_of(values, 90.1) == 10.0
    assert percentile_of(values, 100) == 10.0
    assert percentile_of(values, 51) == 6.0


@pytest.mark.parametrize("percentile", [55.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_percentiles_are_the_sorted_ones_to_a_32nd_of_an_octave(percentile, dtype):
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[7, 3] = 1000.0
    statistics = InputStatistics.empty(
        64, keep=0, dtype=dtype, device=torch.device("cpu"), counts_magnitudes=True
    )
    for piece in rows.split(70):
        statistics.record(piece, 0)
    expected = sorted(rows.float().abs().flatten().tolist())
    exact = expected[math.ceil(percentile / 100 * len(expected)) - 1]
    found = statistics.magnitude_below(percentile)
    assert exact < found <= exact * 33 / 32


def test_magnitudes_out_of_all_bins_are_counted_in_the_last_ones():
    statistics = InputStatistics.empty(
        4, keep=0, dtype=torch.float32, device=torch.device("cpu"), counts_magnitudes=True
    )
    statistics.record(torch.tensor([[0.0, 1e-30, -3e38, 1.0]]), 0)
    assert int(statistics.magnitude_counts.sum()) == 4
    assert int(statistics.magnitude_counts[0]) == 2
    assert int(statistics.magnitude_counts[-1]) == 1


def test_percentiles_clip_inputs_and_leave_weights():
    model = llama()
    inputs = inputs_of(model, LAYER).abs()
    clipped = calibrated(model, ("fp8", "nvfp4"), "percentile:99")
    plain = calibrated(model, ("fp8", "nvfp4"), "rtn")
    exact = percentile_of(inputs, 99)
    for fmt in ("fp8", "nvfp4"):
        assert exact < clipped[LAYER, fmt].input_amax <= exact * 33 / 32 < float(inputs.max())
        assert clipped[LAYER, fmt].weight_amax == plain[LAYER, fmt].weight_amax
    everything = calibrated(model, ("fp8",), "percentile:100")
    assert everything[LAYER, "fp8"].input_amax == float(inputs.max())


def test_percentiles_of_scaled_inputs_are_those_of_scaled_rows():
    model = llama()
    name = "model.layers.0.self_attn.q_proj"
    entry = calibrated(model, ("w4a8_awq",), "awq_lite+percentile:90")[name, "w4a8_awq"]
    assert entry.pre_quant_scale is not None
    scaled = (inputs_of(model, name) * entry.pre_quant_scale).abs()
    assert entry.input_amax == percentile_of(scaled, 90)  # fewer rows than are kept: all are


def test_experts_of_a_layer_share_the_largest_of_their_percentiles():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    table = calibrated(model, ("fp8",), "percentile:90")
    plain = calibrated(model, ("fp8",), "rtn")
    for group in discover(model).groups:
        for names in group.input_sets:
            assert len({table[name, "fp8"].input_amax for name in names}) == 1
            assert 0 < table[names[0], "fp8"].input_amax < plain[names[0], "fp8"].input_amax


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_fixed_strength_is_that_of_the_paper_in_powers_of_two(alpha):
    model = llama()
    name = "model.layers.0.self_attn.q_proj"
    table = calibrated(
        model, ("int8_sq",), f"smoothquant:{alpha}", container=Container.COMPRESSED_TENSORS
    )
    attention = model.model.layers[0].self_attn
    weights = [p.weight.detach() for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    weight_amax = torch.cat(weights).abs().amax(0)
    paper = inputs_of(model, name).abs().amax(0) ** alpha / weight_amax ** (1 - alpha)
    found = table[name, "int8_sq"].pre_quant_scale
    logs = (paper * found).log2()  # constant but for rounding to powers of two, half an octave
    assert float(logs.max() - logs.min()) <= 1.0 + 1e-5


def test_columns_may_be_rounded_as_they_lie():
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(8, 8, generator=generator)
    moment = mixing @ mixing.t()
    assert ErrorFeedback.of(moment, FeedbackOptions(by_power=False)).order.tolist() == list(
        range(8)
    )
    by_power = ErrorFeedback.of(moment).order
    assert moment.diagonal()[by_power].diff().le(0).all()


def test_damping_is_a_share_of_the_mean_power():
    moment = torch.diag(torch.tensor([3.0, 1.0]))
    factor = ErrorFeedback.of(moment, FeedbackOptions(damping=0.5)).factor
    # The damped moment is diag(4, 2): its inverse's factor has the roots of a quarter and a half.
    assert torch.allclose(factor, torch.diag(torch.tensor([0.5, 0.5**0.5])))


def test_options_of_gptq_reach_the_codes():
    model = llama()
    codes = {
        text: calibrated(model, ("nvfp4",), text)[LAYER, "nvfp4"].codes
        for text in ("gptq", "gptq:damping=0.01", "gptq:damping=1", "gptq:order=given")
    }
    assert torch.equal(codes["gptq"], codes["gptq:damping=0.01"])
    assert not torch.equal(codes["gptq"], codes["gptq:damping=1"])
    assert not torch.equal(codes["gptq"], codes["gptq:order=given"])
