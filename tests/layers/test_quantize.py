"""Layers: every format's weight and input, in both containers' numerics."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from autoq.errors import InputError, ModelError, UnknownNameError
from autoq.formats import FORMATS, ActivationScheme, WeightScaling
from autoq.kernels import fp8, int4, int8, mxfp4, mxfp8, nvfp4, scoring
from autoq.kernels.mxfp8 import ScaleRule
from autoq.layers import (
    Container,
    LayerCalibration,
    QuantizedWeight,
    dequantize_weight,
    fake_quantize_input,
    fake_quantize_weight,
    quantize_weight,
)
from autoq.layers.quantize import code_grid, weight_scheme

QUANTIZED = sorted(set(FORMATS) - {"none"})
TENSORS = {
    "fp8": {"codes": (torch.float8_e4m3fn, (6, 256)), "scale": (torch.float32, ())},
    "nvfp4": {
        "codes": (torch.uint8, (6, 128)),
        "block_scale": (torch.float8_e4m3fn, (6, 16)),
        "global_scale": (torch.float32, ()),
    },
    "w4a8_awq": {
        "codes": (torch.int8, (6, 256)),
        "group_scale": (torch.float32, (6, 2)),
        "tensor_scale": (torch.float32, ()),
    },
    "int4_awq": {"codes": (torch.int8, (6, 256)), "group_scale": (torch.float32, (6, 2))},
    "int4_dq": {
        "codes": (torch.int8, (6, 256)),
        "scale_codes": (torch.int8, (6, 4)),
        "second_scale": (torch.float32, (1,)),
        "mean_scale": (torch.float32, ()),
    },
    "int8_sq": {"codes": (torch.int8, (6, 256)), "scale": (torch.float32, (6, 1))},
    "int8_wo": {"codes": (torch.int8, (6, 256)), "scale": (torch.float32, (6, 1))},
    "nvfp4_wo": {
        "codes": (torch.uint8, (6, 128)),
        "block_scale": (torch.float8_e4m3fn, (6, 16)),
        "global_scale": (torch.float32, ()),
    },
    "nvfp4_svdquant": {
        "codes": (torch.uint8, (6, 128)),
        "block_scale": (torch.float8_e4m3fn, (6, 16)),
        "global_scale": (torch.float32, ()),
        "low_rank_down": (torch.bfloat16, (1, 256)),
        "low_rank_up": (torch.bfloat16, (6, 1)),
    },
    "fp8_pc_pt": {"codes": (torch.float8_e4m3fn, (6, 256)), "scale": (torch.float32, (6, 1))},
    "fp8_block": {"codes": (torch.float8_e4m3fn, (6, 256)), "scale": (torch.float32, (1, 2))},
    "mxfp8": {"codes": (torch.float8_e4m3fn, (6, 256)), "block_scale": (torch.uint8, (6, 8))},
    "mxfp4": {"codes": (torch.uint8, (6, 128)), "block_scale": (torch.uint8, (6, 8))},
}
TOP_SCALES = {
    "fp8": ("scale", 448.0),
    "nvfp4": ("global_scale", 2688.0),
    "nvfp4_wo": ("global_scale", 2688.0),
    "nvfp4_svdquant": ("global_scale", 2688.0),
    "w4a8_awq": ("tensor_scale", 448.0),
}
GRIDS = ["nvfp4", "nvfp4_wo", "nvfp4_svdquant", "w4a8_awq", "int4_awq", "int4_dq", "mxfp4"]
every_format = pytest.mark.parametrize("name", QUANTIZED)
every_container = pytest.mark.parametrize("container", list(Container))
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


def _weight(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    weight[1] = 0.0
    weight[2, ::2] = -0.0
    weight[3] *= 1e-3
    return weight.to(dtype)


def _powers() -> torch.Tensor:
    exponents = torch.randint(-3, 4, (256,), generator=torch.Generator().manual_seed(1))
    return torch.exp2(exponents.float())


def _calibration(**changes: object) -> LayerCalibration:
    return dataclasses.replace(LayerCalibration(weight_amax=3.5, input_amax=2.5), **changes)


def _same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Also tells 0.0 from -0.0, which torch.equal does not."""
    same_signs = torch.equal(actual.signbit(), expected.signbit())
    return actual.dtype == expected.dtype and torch.equal(actual, expected) and same_signs


def test_every_registered_format_is_covered_here():
    assert set(QUANTIZED) == set(TENSORS)


@every_format
def test_quantized_tensors_have_the_documented_names_dtypes_and_shapes(name):
    quantized = quantize_weight(
        _weight(), FORMATS[name], _calibration(), scale_dtype=torch.bfloat16
    )
    actual = {key: (value.dtype, tuple(value.shape)) for key, value in quantized.tensors.items()}
    assert actual == TENSORS[name]
    assert (quantized.format, quantized.shape) == (name, (6, 256))


@every_format
@every_container
@every_dtype
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("weights", ["amax", "weighed", "codes"])
def test_fake_weight_is_the_stored_weight_bit_for_bit(name, container, dtype, smoothed, weights):
    codes = torch.randint(0, 256, (6, 128), generator=torch.Generator().manual_seed(3))
    calibration = _calibration(
        pre_quant_scale=_powers() if smoothed else None,
        importance=None if weights == "amax" else _powers().square(),
        codes=codes.to(torch.uint8) if weights == "codes" else None,
    )
    weight, fmt = _weight(dtype), FORMATS[name]
    fake = fake_quantize_weight(
        weight, fmt, calibration, scale_dtype=torch.bfloat16, container=container
    )
    stored = quantize_weight(weight, fmt, calibration, scale_dtype=torch.bfloat16)
    assert _same_bits(fake, dequantize_weight(stored, container=container, dtype=dtype))


def test_codes_that_are_given_are_kept_whatever_is_nearest():
    """Low nibbles hold even columns; E2M1 has a sign bit, INT4 two's complement."""
    e2m1, int4_codes = (
        ("nvfp4", "nvfp4_wo", "nvfp4_svdquant", "mxfp4"),
        ("w4a8_awq", "int4_awq", "int4_dq"),
    )
    pair = dict.fromkeys(e2m1, (0x2, 0xF)) | dict.fromkeys(int4_codes, (0x7, 0x8))
    units = dict.fromkeys(e2m1, (1.0, -6.0)) | dict.fromkeys(int4_codes, (7.0, -8.0))
    assert set(pair) == set(GRIDS)
    weight = _weight(torch.float32)
    for name, (low, high) in pair.items():
        plain = _calibration(importance=torch.ones(256))
        grid = code_grid(weight, FORMATS[name], plain, scale_dtype=torch.bfloat16)
        codes = torch.full((6, 128), low | high << 4, dtype=torch.uint8)
        chosen = dataclasses.replace(plain, codes=codes)
        stored = quantize_weight(weight, FORMATS[name], chosen, scale_dtype=torch.bfloat16)
        values = dequantize_weight(stored, container=Container.COMPRESSED_TENSORS)
        expected = torch.tensor(units[name]).repeat(128) * grid.step
        torch.testing.assert_close(values, expected)
        indices = torch.searchsorted(grid.levels, torch.tensor(units[name]).repeat(128))
        assert torch.equal(grid.pack(indices.to(torch.uint8).expand(6, 256)), codes)


@pytest.mark.parametrize("name", GRIDS)
def test_every_level_of_a_grid_is_the_value_of_its_code(name):
    weight, plain = _weight(torch.float32), _calibration(importance=torch.ones(256))
    grid = code_grid(weight, FORMATS[name], plain, scale_dtype=torch.bfloat16)
    count = len(grid.levels)
    indices = (torch.arange(6 * 256) % count).view(6, 256).to(torch.uint8)
    chosen = dataclasses.replace(plain, codes=grid.pack(indices))
    stored = quantize_weight(weight, FORMATS[name], chosen, scale_dtype=torch.bfloat16)
    values = dequantize_weight(stored, container=Container.COMPRESSED_TENSORS)
    torch.testing.assert_close(values, grid.levels[indices.int()] * grid.step)


def test_formats_of_wider_codes_have_no_grid():
    weighed = _calibration(importance=torch.ones(256))
    for name in set(QUANTIZED) - set(GRIDS):
        assert code_grid(_weight(), FORMATS[name], weighed, scale_dtype=torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fp8", 2**-4),
        ("fp8_pc_pt", 2**-4),
        ("fp8_block", 2**-4),
        ("mxfp8", 2**-4),
        ("mxfp4", 0.25),  # 7 times a power of two, which saturates at 6, loses a seventh
        ("nvfp4", 0.25),
        ("nvfp4_wo", 0.25),
        ("nvfp4_svdquant", 0.25),
        ("w4a8_awq", 1 / 14 + 2**-4),
        ("int4_awq", 1 / 14),
        ("int4_dq", 1 / 14),
        ("int8_sq", 1 / 254),
        ("int8_wo", 1 / 254),
    ],
)
@every_container
def test_error_is_bounded_by_the_format(name, error, container):
    weight = _weight(torch.float32)
    calibration = _calibration(weight_amax=weight.abs().max().item())
    quantized = quantize_weight(weight, FORMATS[name], calibration, scale_dtype=torch.float32)
    values = dequantize_weight(quantized, container=container)
    assert (values - weight).abs().max() <= error * weight.abs().max()
    assert not torch.equal(values, weight)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
def test_with_an_importance_the_weighted_error_is_smaller(name, smoothed):
    weight, scale = _weight(torch.float32), _powers() if smoothed else None
    importance = torch.rand(256, generator=torch.Generator().manual_seed(5)) ** 4
    smooth = weight if scale is None else weight / scale

    def errors(calibration):
        stored = quantize_weight(weight, FORMATS[name], calibration, scale_dtype=torch.bfloat16)
        values = dequantize_weight(stored, container=Container.COMPRESSED_TENSORS)
        return ((values - smooth).square() * importance).sum()

    plain = _calibration(weight_amax=float(smooth.abs().max()), pre_quant_scale=scale)
    least_gain = 1.0 if name == "mxfp4" else 0.9  # powers of two leave little choice
    assert errors(dataclasses.replace(plain, importance=importance)) < least_gain * errors(plain)


def test_with_an_importance_no_scheme_says_how_a_weight_is_rounded():
    weighed = _calibration(importance=torch.ones(256))
    assert weight_scheme(FORMATS["nvfp4"], weighed) is None
    assert weight_scheme(FORMATS["nvfp4"], _calibration()) is not None


@every_format
def test_the_weight_is_divided_by_the_input_scale(name):
    weight, powers = _weight(torch.float32), _powers()
    plain = quantize_weight(
        weight / powers, FORMATS[name], _calibration(), scale_dtype=torch.float32
    )
    smoothed = quantize_weight(
        weight,
        FORMATS[name],
        _calibration(pre_quant_scale=powers),
        scale_dtype=torch.float32,
    )
    for key, tensor in plain.tensors.items():
        assert torch.equal(tensor.float(), smoothed.tensors[key].float())


@pytest.mark.parametrize("name", TOP_SCALES)
def test_the_calibrated_amax_sets_the_top_scale(name):
    key, largest = TOP_SCALES[name]
    calibration = _calibration(weight_amax=largest / 128)
    quantized = quantize_weight(_weight(), FORMATS[name], calibration, scale_dtype=torch.bfloat16)
    assert quantized.tensors[key].item() == 2.0**-7


@pytest.mark.parametrize("name", sorted(set(QUANTIZED) - set(TOP_SCALES)))
def test_scales_of_rows_and_blocks_do_not_look_at_the_calibrated_amax(name):
    one, other = (
        quantize_weight(_weight(), FORMATS[name], entry, scale_dtype=torch.bfloat16).tensors
        for entry in (_calibration(), _calibration(weight_amax=0.0, input_amax=0.0))
    )
    assert all(torch.equal(one[key].float(), other[key].float()) for key in TENSORS[name])


def test_int4_group_scales_are_rounded_to_the_given_dtype():
    fmt = FORMATS["w4a8_awq"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        quantized = quantize_weight(_weight(), fmt, _calibration(), scale_dtype=dtype)
        expected = int4.group_scale(_weight(), 128, storage_dtype=dtype)
        assert torch.equal(quantized.tensors["group_scale"], expected)


def test_int4_group_size_is_the_formats():
    fmt = dataclasses.replace(FORMATS["w4a8_awq"], weight_block_size=64)
    quantized = quantize_weight(_weight(), fmt, _calibration(), scale_dtype=torch.float32)
    assert quantized.tensors["group_scale"].shape == (6, 4)


def test_containers_differ_for_int4_only():
    for name in QUANTIZED:
        quantized = quantize_weight(
            _weight(), FORMATS[name], _calibration(), scale_dtype=torch.bfloat16
        )
        modelopt, compressed = (dequantize_weight(quantized, container=c) for c in Container)
        assert torch.equal(modelopt, compressed) == (name != "w4a8_awq")


def test_int4_weights_in_both_containers_by_hand():
    quantized = QuantizedWeight(
        format="w4a8_awq",
        tensors={
            "codes": torch.tensor([[7, 5, -8, 0]], dtype=torch.int8),
            "group_scale": torch.tensor([[16.0]]),
            "tensor_scale": torch.tensor(1.75),
        },
        shape=(1, 4),
    )
    compressed = dequantize_weight(quantized, container=Container.COMPRESSED_TENSORS)
    assert compressed.tolist() == [[112.0, 80.0, -128.0, 0.0]]
    # codes * fp16(16 / 1.75) = 63.98, 45.70, -73.13, which E4M3 takes to 64, 44 and -72
    assert dequantize_weight(quantized).tolist() == [[112.0, 77.0, -126.0, 0.0]]


def _inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(2)).to(dtype)


@every_dtype
@every_container
def test_inputs_by_format(dtype, container):
    x, calibration = _inputs(dtype), _calibration()
    per_tensor = fp8.fake_quantize(x, fp8.tensor_scale(2.5))
    per_token = fp8.fake_quantize(x, scaling=fp8.Scaling.ROW)
    expected = {
        "none": x,
        "fp8": per_tensor,
        **dict.fromkeys(
            ("nvfp4", "nvfp4_svdquant"), nvfp4.fake_quantize(x, nvfp4.global_scale(2.5))
        ),
        "w4a8_awq": per_tensor if container is Container.MODELOPT else per_token,
        **dict.fromkeys(("int4_awq", "int4_dq", "int8_wo", "nvfp4_wo"), x),
        "int8_sq": int8.fake_quantize(x),
        "fp8_pc_pt": per_token,
        "fp8_block": fp8.fake_quantize(x, scaling=fp8.Scaling.BLOCK_1X128),
        "mxfp8": mxfp8.fake_quantize(
            x, ScaleRule.UP if container is Container.MODELOPT else ScaleRule.HALF
        ),
        "mxfp4": mxfp4.fake_quantize(x, ScaleRule.HALF),
    }
    assert set(expected) == set(FORMATS)
    for name, values in expected.items():
        actual = fake_quantize_input(x, FORMATS[name], calibration, container=container)
        assert _same_bits(actual, values), name


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_inputs_are_multiplied_by_the_input_scale_first(name):
    x, powers = _inputs(torch.bfloat16), _powers()
    smoothed = fake_quantize_input(x, FORMATS[name], _calibration(pre_quant_scale=powers))
    plain = fake_quantize_input(x * powers.bfloat16(), FORMATS[name], _calibration())
    assert smoothed.dtype == torch.bfloat16 and torch.equal(smoothed, plain)


def test_format_none_keeps_the_weight_but_divides_by_the_input_scale():
    weight, powers = _weight(), _powers()
    kept = fake_quantize_weight(weight, FORMATS["none"], _calibration(), scale_dtype=torch.bfloat16)
    assert torch.equal(kept, weight)
    divided = fake_quantize_weight(
        weight,
        FORMATS["none"],
        _calibration(pre_quant_scale=powers),
        scale_dtype=torch.bfloat16,
    )
    assert torch.equal(divided.float() * powers, weight.float())


@every_container
@every_format
def test_the_scheme_of_a_weight_is_what_fake_quantising_does(name, container):
    # The global scale is a power of two, which every reader gets to the bit.
    weight, calibration = _weight(torch.float32), _calibration(weight_amax=2688.0 / 512)
    found = weight_scheme(FORMATS[name], calibration, container=container)
    assert (found is not None) == (name in ("fp8", "nvfp4", "nvfp4_wo", "nvfp4_svdquant"))
    if found is not None:
        values, _ = scoring.fake_quantize_with_statistics(weight, *found)
        expected = fake_quantize_weight(
            weight, FORMATS[name], calibration, scale_dtype=torch.float32, container=container
        )
        assert torch.equal(values, expected)
    smoothed = _calibration(pre_quant_scale=_powers())
    assert weight_scheme(FORMATS[name], smoothed, container=container) is None
    assert weight_scheme(FORMATS["none"], _calibration(), container=container) is None


def test_a_global_scale_that_readers_change_makes_no_scheme():
    fmt, changed = FORMATS["nvfp4"], 0
    for step in range(64):
        calibration = _calibration(weight_amax=1 + step / 64)
        assert weight_scheme(fmt, calibration) is not None
        scale = nvfp4.global_scale(calibration.weight_amax)
        kept = bool(scale.reciprocal().reciprocal() == scale)
        found = weight_scheme(fmt, calibration, container=Container.COMPRESSED_TENSORS)
        assert (found is not None) == kept
        changed += not kept
    assert 0 < changed < 64


@every_format
def test_an_all_zero_weight_stays_zero_and_finite(name):
    weight, calibration = torch.zeros(4, 128), _calibration(weight_amax=0.0, input_amax=0.0)
    quantized = quantize_weight(weight, FORMATS[name], calibration, scale_dtype=torch.float16)
    for container in Container:
        assert torch.equal(dequantize_weight(quantized, container=container), weight)
    # A byte of 0 is the power 2**-127.
    is_exponent = FORMATS[name].weight_scaling is WeightScaling.MX
    scales = [
        torch.exp2(t.float() - 127) if is_exponent else t.float()
        for key, t in quantized.tensors.items()
        if key.endswith("scale")
    ]
    assert all(bool((scale > 0).all() & (scale <= 1).all()) for scale in scales)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_format
def test_weights_with_nan_or_infinity_are_refused(name, bad):
    weight = _weight()
    weight[5, 17] = bad
    with pytest.raises(ModelError, match="weights must be finite, got NaN or infinity"):
        quantize_weight(weight, FORMATS[name], _calibration(), scale_dtype=torch.bfloat16)


@pytest.mark.parametrize("name", TOP_SCALES)
@pytest.mark.parametrize("amax", [math.nan, math.inf, -1.0])
def test_broken_calibration_is_refused(name, amax):
    calibration, fmt = _calibration(weight_amax=amax, input_amax=amax), FORMATS[name]
    with pytest.raises(InputError, match=f"amax must be finite and not negative, got {amax}"):
        quantize_weight(_weight(), fmt, calibration, scale_dtype=torch.bfloat16)
    if fmt.activation is ActivationScheme.NONE:
        return
    with pytest.raises(InputError, match=f"amax must be finite and not negative, got {amax}"):
        fake_quantize_input(_inputs(), fmt, calibration)


def test_an_input_scale_of_another_length_is_refused():
    calibration = _calibration(pre_quant_scale=torch.ones(255))
    message = r"pre_quant_scale must have shape \(256,\), got \(255,\)"
    with pytest.raises(InputError, match=message):
        quantize_weight(_weight(), FORMATS["fp8"], calibration, scale_dtype=torch.bfloat16)
    with pytest.raises(InputError, match=message):
        fake_quantize_input(_inputs(), FORMATS["fp8"], calibration)


def test_format_none_has_no_codes():
    with pytest.raises(InputError, match="the format none has no codes"):
        quantize_weight(_weight(), FORMATS["none"], _calibration(), scale_dtype=torch.bfloat16)


def test_missing_tensors_and_unknown_formats_are_refused_by_name():
    incomplete = QuantizedWeight(
        format="nvfp4", tensors={"codes": torch.zeros(2, 8, dtype=torch.uint8)}, shape=(2, 16)
    )
    with pytest.raises(InputError, match="needs the tensors block_scale, global_scale"):
        dequantize_weight(incomplete)
    with pytest.raises(UnknownNameError, match="no format named 'nvfp3'"):
        dequantize_weight(dataclasses.replace(incomplete, format="nvfp3"))


def test_shapes_that_blocks_do_not_fill_are_refused():
    weight = torch.ones(2, 40)
    with pytest.raises(InputError, match="must be a multiple of 16, got 40"):
        quantize_weight(weight, FORMATS["nvfp4"], _calibration(), scale_dtype=torch.float32)
    with pytest.raises(InputError, match="in_features must be a multiple of 128, got 40"):
        quantize_weight(weight, FORMATS["w4a8_awq"], _calibration(), scale_dtype=torch.float32)


@every_format
def test_no_gradient_flows_and_the_weight_is_left_alone(name):
    weight = nn.Parameter(_weight())
    before = weight.detach().clone()
    for container, smoothed in itertools.product(Container, (None, _powers())):
        values = fake_quantize_weight(
            weight,
            FORMATS[name],
            _calibration(pre_quant_scale=smoothed),
            scale_dtype=torch.bfloat16,
            container=container,
        )
        assert not values.requires_grad
    assert torch.equal(weight, before)


def test_conv1d_views_quantise_like_their_copies():
    stored = torch.randn(128, 6, generator=torch.Generator().manual_seed(9))
    for name, container in itertools.product(QUANTIZED, Container):
        results = [
            fake_quantize_weight(
                matrix,
                FORMATS[name],
                _calibration(),
                scale_dtype=torch.float32,
                container=container,
            )
            for matrix in (stored.t(), stored.t().contiguous())
        ]
        assert torch.equal(*results)
