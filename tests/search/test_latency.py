"""Predicted times are those of hand calculation."""

import json
from dataclasses import replace

import numpy as np
import pytest

from autoq.errors import InputError, UnknownNameError
from autoq.formats import FORMATS
from autoq.kernels._benchmark.products import cases
from autoq.models import DecisionGroup, ModelMap, SlotKind, WeightSlot
from autoq.search.hardware import GPUS, Gpu, MatrixUnit
from autoq.search.kernel_times import _OPERATIONS, UNMEASURED, nearest_shape, read_kernel_times
from autoq.search.latency import Roofline, latency_seconds, products_of

# A round GPU: 1 byte per nanosecond, and 4000 or 8000 operations in one.
ROUND = Gpu(
    name="round",
    description="made up",
    bytes_per_second=1e9,
    operations_per_second={MatrixUnit.BF16: 4e12, MatrixUnit.FP8: 8e12},
    source="the test",
)


def slot(name, out_features, in_features, expert=None):
    return WeightSlot(
        name=name,
        module=name,
        parameter="weight" if expert is None else "down_proj",
        kind=SlotKind.LINEAR if expert is None else SlotKind.EXPERT,
        out_features=out_features,
        in_features=in_features,
        expert=expert,
    )


def model_map(slots, groups):
    return ModelMap(
        architecture="Test",
        slots={each.name: each for each in slots},
        groups=tuple(groups),
        excluded=(),
        blocks=(),
    )


def group(name, *slots, fused=()):
    return DecisionGroup(name=name, slots=slots, reason="test", fusion_sets=fused)


def nanoseconds(fmt, tokens, out_features, in_features, gpu=ROUND):
    seconds = Roofline(gpu).seconds(
        FORMATS[fmt], tokens=tokens, out_features=out_features, in_features=in_features
    )
    return seconds * 1e9


def test_decoding_takes_as_long_as_the_memory():
    # 64 x 128 weights; one token: 128 inputs and 64 outputs of 2 bytes.
    activations = 2 * (128 + 64)
    assert nanoseconds("none", 1, 64, 128) == pytest.approx(64 * 128 * 2 + activations)
    assert nanoseconds("fp8", 1, 64, 128) == pytest.approx(64 * 128 + activations)
    assert nanoseconds("nvfp4", 1, 64, 128) == pytest.approx(64 * 128 * 4.5 / 8 + activations)


def test_prefill_takes_as_long_as_the_matrix_units():
    fast_memory = replace(ROUND, bytes_per_second=1e12)
    operations = 2 * 4096 * 8192 * 8192
    assert nanoseconds("none", 4096, 8192, 8192, fast_memory) == pytest.approx(operations / 4000)
    assert nanoseconds("fp8", 4096, 8192, 8192, fast_memory) == pytest.approx(operations / 8000)
    # No matrix unit multiplies NVFP4 here, so it saves memory and no time.
    assert nanoseconds("nvfp4", 4096, 8192, 8192, fast_memory) == pytest.approx(operations / 4000)


def test_formats_without_a_matrix_unit_are_weights_only():
    assert ROUND.unit_for(FORMATS["nvfp4"]) is MatrixUnit.BF16
    assert GPUS["h200"].unit_for(FORMATS["nvfp4"]) is MatrixUnit.BF16
    assert GPUS["h200"].unit_for(FORMATS["fp8"]) is MatrixUnit.FP8
    assert GPUS["h200"].unit_for(FORMATS["w4a8_awq"]) is MatrixUnit.FP8
    assert GPUS["a100"].unit_for(FORMATS["fp8"]) is MatrixUnit.BF16
    assert GPUS["b200"].unit_for(FORMATS["nvfp4"]) is MatrixUnit.NVFP4
    assert GPUS["b200"].unit_for(FORMATS["none"]) is MatrixUnit.BF16
    assert GPUS["a100"].unit_for(FORMATS["int8_sq"]) is MatrixUnit.INT8
    for name in ("int4_awq", "int8_wo", "nvfp4_wo"):  # inputs stay in 16 bits
        assert GPUS["b200"].unit_for(FORMATS[name]) is MatrixUnit.BF16


def test_scales_of_rows_and_blocks_need_fp8_units_and_powers_of_two_units_of_their_own():
    for name in ("fp8_pc_pt", "fp8_block"):
        assert GPUS["h200"].unit_for(FORMATS[name]) is MatrixUnit.FP8
        assert GPUS["a100"].unit_for(FORMATS[name]) is MatrixUnit.BF16
    for name in ("mxfp8", "mxfp4"):
        assert GPUS["h200"].unit_for(FORMATS[name]) is MatrixUnit.BF16
        assert GPUS["b200"].unit_for(FORMATS[name]) == name
    # 64 x 128 weights: an exponent for 32 of them.
    activations = 2 * (128 + 64)
    assert nanoseconds("mxfp4", 1, 64, 128) == pytest.approx(64 * 128 * 4.25 / 8 + activations)


def test_every_format_has_a_measured_product():
    assert {*_OPERATIONS.values(), *UNMEASURED} == set(FORMATS) - {"none"}
    assert not set(_OPERATIONS.values()) & set(UNMEASURED)


def test_every_gpu_names_its_source_and_has_rates_that_rise():
    for gpu in GPUS.values():
        floats = (MatrixUnit.BF16, MatrixUnit.FP8, MatrixUnit.NVFP4)
        rates = [gpu.operations_per_second.get(unit, np.inf) for unit in floats]
        assert gpu.source and MatrixUnit.BF16 in gpu.operations_per_second
        assert rates == sorted(rates)
        assert gpu.operations_per_second[MatrixUnit.INT8] > 1.9 * rates[0]


def test_unknown_gpus_are_answered_with_near_misses():
    with pytest.raises(UnknownNameError, match=r"no GPU named 'h20' \(did you mean h200"):
        GPUS["h20"]


def test_fused_matrices_are_one_product():
    slots = [slot("q", 64, 128), slot("k", 32, 128), slot("o", 128, 64)]
    parts = model_map(slots, [group("qk", "q", "k", fused=(("q", "k"),)), group("o", "o")])
    assert products_of(parts) == {(96, 128), (128, 64)}
    table = latency_seconds(
        parts, ["fp8", "none"], Roofline(ROUND), tokens=1, shares=dict.fromkeys("qko", 1.0)
    )
    assert table.shape == (2, 2)
    # 96 x 128 bytes, 128 inputs once, 96 outputs.
    assert table[0, 0] * 1e9 == pytest.approx(96 * 128 + 2 * (128 + 96))
    assert table[1, 1] * 1e9 == pytest.approx(2 * 128 * 64 + 2 * (64 + 128))


def test_experts_count_as_often_as_some_token_comes_to_them():
    slots = [slot("e0", 64, 128, expert=0), slot("e1", 64, 128, expert=1)]
    mixture = model_map(slots, [group("experts", "e0", "e1")])
    table = latency_seconds(
        mixture, ["fp8"], Roofline(ROUND), tokens=2, shares={"e0": 0.5, "e1": 0.0}
    )
    # Two tokens miss e0 with probability 1/4; else it has 2 * 0.5 / 0.75 of them on average.
    rows = 1.0 / 0.75
    assert table[0, 0] * 1e9 == pytest.approx(0.75 * (64 * 128 + 2 * rows * (128 + 64)))


def test_cells_that_a_format_refuses_have_no_time():
    odd = model_map([slot("odd", 3, 40)], [group("odd", "odd")])
    table = latency_seconds(odd, ["nvfp4", "none"], Roofline(ROUND), tokens=1, shares={"odd": 1.0})
    assert np.isnan(table[0]).tolist() == [True, False]


def test_no_tokens_are_refused():
    one = model_map([slot("a", 64, 128)], [group("a", "a")])
    with pytest.raises(InputError, match="at least 1 token, got 0"):
        latency_seconds(one, ["fp8"], Roofline(ROUND), tokens=0, shares={"a": 1.0})


def row(operation, variant, m, n, k, milliseconds, bf16, implementation="triton"):
    return {
        "operation": operation,
        "variant": variant,
        "shape": {"m": m, "n": n, "k": k},
        "implementation": implementation,
        "milliseconds": milliseconds,
        "baselines": {"bf16": {"milliseconds": bf16}},
    }


@pytest.fixture
def table_file(tmp_path):
    rows = [
        row("fp8.linear", "input scale given", 1, 1024, 512, 1.0, 2.0),
        row("fp8.linear", "input scale given", 1, 1024, 512, 3.0, 2.2, "torch"),
        row("fp8.linear", "input by row", 1, 1024, 512, 0.1, 2.4),
        row("fp8.linear", "input scale given", 16, 1024, 512, 4.0, 9.0),
        row("fp8.linear", "input scale given", 1, 512, 2048, 5.0, 6.0),
        row("nvfp4.linear", "input quantised", 1, 1024, 512, None, 2.0),
        {"operation": "fp8.quantize", "variant": "tensor", "shape": {"rows": 1, "columns": 2}},
    ]
    machine = {"hardware": "a GPU"}
    document = {"benchmark": "autoq kernels", "format": 1, "machine": machine, "rows": rows}
    path = tmp_path / "times.json"
    path.write_text(json.dumps(document))
    return path


def milliseconds(times, fmt, tokens, n, k):
    return 1e3 * times.seconds(FORMATS[fmt], tokens=tokens, out_features=n, in_features=k)


def test_measured_times_are_taken_as_they_are(table_file):
    times = read_kernel_times(table_file)
    assert times.hardware == "a GPU"
    assert milliseconds(times, "fp8", 1, 1024, 512) == pytest.approx(1.0)  # the fastest body
    assert milliseconds(times, "fp8", 16, 1024, 512) == pytest.approx(4.0)
    assert milliseconds(times, "none", 1, 1024, 512) == pytest.approx(2.1)  # of 2, 2, 2.2 and 2.4


@pytest.mark.parametrize(
    ("operation", "variant", "fmt"),
    [
        ("int4.linear", "input as it is", "int4_awq"),
        ("int8.linear", "input by row", "int8_sq"),
        ("int8.linear", "input as it is", "int8_wo"),
        ("nvfp4.linear", "input as it is", "nvfp4_wo"),
        ("fp8.linear", "input by row", "fp8_pc_pt"),
        ("fp8.linear", "128x128", "fp8_block"),
        ("mxfp8.linear", "input quantised", "mxfp8"),
        ("mxfp4.linear", "input in mxfp4", "mxfp4"),
    ],
)
def test_each_format_takes_the_product_that_its_layers_run(tmp_path, operation, variant, fmt):
    rows = [row(operation, variant, 1, 64, 32, 7.0, 9.0)]
    document = {"benchmark": "autoq kernels", "format": 1, "rows": rows}
    path = tmp_path / "times.json"
    path.write_text(json.dumps(document))
    times = read_kernel_times(path)
    assert milliseconds(times, fmt, 1, 64, 32) == pytest.approx(7.0)
    assert set(times.curves) == {fmt, "none"}
    assert any((case.operation, case.variant) == (operation, variant) for case in cases(1, 64, 32))


def test_between_measured_counts_logarithms_are_linear(table_file):
    times = read_kernel_times(table_file)
    # 4 tokens are half way between 1 and 16, so the time is the geometric mean of 1 and 4.
    assert milliseconds(times, "fp8", 4, 1024, 512) == pytest.approx(2.0)
    assert milliseconds(times, "fp8", 32, 1024, 512) == pytest.approx(8.0)


def test_other_shapes_take_the_nearest_ones_time_by_weights(table_file):
    times = read_kernel_times(table_file)
    assert nearest_shape((2048, 512), [(1024, 512), (512, 2048)]) == (1024, 512)
    assert milliseconds(times, "fp8", 1, 2048, 512) == pytest.approx(2.0)
    assert milliseconds(times, "fp8", 1, 512, 4096) == pytest.approx(10.0)
    assert times.unmeasured([(2048, 512), (1024, 512)]) == [(2048, 512)]


def test_formats_without_times_are_refused(table_file):
    with pytest.raises(InputError, match=r"no times of nvfp4 \(it has fp8, fp8_pc_pt, none\)"):
        milliseconds(read_kernel_times(table_file), "nvfp4", 1, 1024, 512)


def test_the_name_follows_the_content(table_file):
    first = read_kernel_times(table_file).name
    table_file.write_text(table_file.read_text().replace("4.0", "4.5"))
    assert read_kernel_times(table_file).name != first


@pytest.mark.parametrize(
    "text, message",
    [
        pytest.param("no json", r"cannot be read as that", id="no_json"),
        pytest.param("[]", r"of this version writes, and .* is not", id="no_object"),
        pytest.param('{"benchmark": "other"}', r"is not; measure again", id="other"),
        pytest.param(
            '{"benchmark": "autoq kernels", "format": 1, "rows": []}', r"has none", id="empty"
        ),
    ],
)
def test_files_of_another_kind_are_refused(text, message, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_kernel_times(path)
