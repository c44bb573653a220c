from __future__ import annotations

import itertools
import math

import pytest

from autoq.report._axes import Label, Scale, log_scale, spread_labels
from autoq.report._colours import loss_colour, loss_range, ramp_colour
from autoq.report.layers import LayerPosition, layer_position, short_type
from autoq.report.markup import Markup, tag
from autoq.report.numbers import (
    bits_text,
    bytes_text,
    count_text,
    finite,
    interval_text,
    loss_text,
    metric_value_text,
    percent_text,
    seconds_text,
)

WRITTEN = [
    pytest.param(bits_text, 4.8, "4.8000", id="bits"),
    pytest.param(bits_text, None, "-", id="bits_missing"),
    pytest.param(loss_text, 0.0, "0", id="loss_zero"),
    pytest.param(loss_text, 0.012345, "0.01235", id="loss"),
    pytest.param(loss_text, 0.5, "0.5000", id="loss_keeps_digits"),
    pytest.param(loss_text, 1.2e-5, "1.200e-05", id="loss_small"),
    pytest.param(loss_text, 2348.71, "2348.7", id="loss_large"),
    pytest.param(loss_text, math.nan, "-", id="loss_nan"),
    pytest.param(percent_text, 0.9921, "99.21 %", id="percent"),
    pytest.param(percent_text, 1e-7, "< 0.01 %", id="percent_small"),
    pytest.param(percent_text, 0.0, "0.00 %", id="percent_zero"),
    pytest.param(bytes_text, 1023, "1023 B", id="bytes"),
    pytest.param(bytes_text, 3 << 20, "3.00 MiB", id="mebibytes"),
    pytest.param(count_text, 9999, "9999", id="count"),
    pytest.param(count_text, 12_345_678, "12.3 M", id="count_millions"),
    pytest.param(seconds_text, 0.424, "0.42 s", id="seconds"),
    pytest.param(seconds_text, 185, "3 min 05 s", id="minutes"),
    pytest.param(seconds_text, 7500, "2 h 05 min", id="hours"),
]


@pytest.mark.parametrize(("write", "value", "text"), WRITTEN)
def test_numbers_are_written(write, value, text):
    assert write(value) == text


def test_intervals_say_where_they_have_no_end():
    assert interval_text(0.01, 0.02) == "0.01000 to 0.02000"
    assert interval_text(0.01, math.inf) == "0.01000 to no upper bound"
    assert interval_text(None, 0.02) == "no lower bound to 0.02000"


def test_shares_are_written_as_per_cent_and_others_as_they_are():
    assert metric_value_text("top1_agreement", 0.912) == "91.20 %"
    assert metric_value_text("perplexity", 12.3) == "12.30"


def test_finite_refuses_what_is_no_number():
    assert finite(3) == 3.0
    assert finite(math.inf) is None
    assert finite(None) is None


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("model.layers.12.mlp.down_proj", LayerPosition("model.layers", 12, "mlp.down_proj")),
        ("encoder.block.0.layer.1.wo", LayerPosition("encoder.block", 0, "layer.1.wo")),
        ("h.3.attn.c_attn", LayerPosition("h", 3, "attn.c_attn")),
        ("lm_head", LayerPosition(None, None, "lm_head")),
        ("model.q2.proj", LayerPosition(None, None, "model.q2.proj")),
    ],
)
def test_position_is_read_from_the_name(name, position):
    assert layer_position(name) == position


def test_fused_types_have_short_names():
    assert short_type("self_attn.q_proj+k_proj+v_proj") == "q/k/v"
    assert short_type("self_attn.o_proj") == "o_proj"
    assert short_type("attention.self.query+key+value") == "query/key/value"


def test_markup_escapes_what_is_not_markup():
    assert tag("b", "<i>", title='"') == '<b title="&quot;">&lt;i&gt;</b>'
    assert tag("b", Markup("<i></i>"), class_=None) == "<b><i></i></b>"


def test_logarithmic_axis_halves_at_the_geometric_mean():
    axis = Scale(0.01, 1.0, 0.0, 100.0, logarithmic=True)
    assert axis.pixel(0.1) == pytest.approx(50.0)
    assert axis.pixel(-5.0) == 0.0
    assert axis.ticks() == pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])


def test_linear_axis_has_round_ticks():
    assert Scale(4.2, 9.1, 0.0, 1.0).ticks() == [5.0, 6.0, 7.0, 8.0, 9.0]


def test_one_value_still_makes_an_axis():
    axis = log_scale([0.5], 0.0, 100.0)
    assert axis.low < 0.5 < axis.high
    assert len(axis.ticks()) >= 2


@pytest.mark.parametrize("high", [0.011, 0.02, 0.1, 1.0, 100.0, 1e9])
def test_logarithmic_axes_have_some_ticks_and_not_too_many(high):
    assert 2 <= len(log_scale([0.01, high], 0.0, 100.0).ticks()) <= 10


def test_labels_of_one_point_do_not_cover_each_other():
    labels = [Label(50.0, 100.0, f"label {index}", "label") for index in range(4)]
    drawn = str(spread_labels(labels, 0.0, 300.0, 500.0))
    baselines = sorted(float(part.split('"')[0]) for part in drawn.split(' y="')[1:])
    assert len(baselines) == 4
    assert all(high - low >= 15.0 for low, high in itertools.pairwise(baselines))


def test_labels_do_not_cover_other_points():
    crowd = [Label(50.0, 100.0, "first", "label"), Label(70.0, 100.0, "second", "label")]
    drawn = str(spread_labels(crowd, 0.0, 300.0, 500.0))
    first = float(drawn.split(' y="')[1].split('"')[0])
    assert abs(first - 104.0) >= 15.0


def test_ramp_runs_from_light_to_dark():
    low, high = loss_range([None, 0.0, 1e-5, 1e-2])
    assert (low, high) == (1e-5, 1e-2)
    assert loss_colour(1e-5, low, high) == ramp_colour(0.0)
    assert loss_colour(1e-2, low, high) == ramp_colour(1.0)
    assert loss_colour(-1.0, low, high) == ramp_colour(0.0)
    assert loss_range([]) == (1.0, 10.0)
