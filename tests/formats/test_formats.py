"""The formats' vocabulary: bits worked out by hand, refusals, names."""

import dataclasses

import pytest

from autoq.errors import UnknownNameError
from autoq.formats import (
    FORMATS,
    NONE,
    ActivationScheme,
    CalibrationAlgorithm,
    QuantFormat,
    StorageBits,
    WeightScaling,
    portable_formats,
)
from autoq.registry import Registry

# A matrix of 4 rows and 256 columns: 1024 weights, 64 blocks of 16, 8 groups of 128.
BITS = {
    "none": StorageBits(weight_bits=16 * 1024, block_scale_bits=0, tensor_scale_bits=0),
    "fp8": StorageBits(weight_bits=8 * 1024, block_scale_bits=0, tensor_scale_bits=64),
    "nvfp4": StorageBits(weight_bits=4 * 1024, block_scale_bits=64 * 8, tensor_scale_bits=64),
    "w4a8_awq": StorageBits(weight_bits=4 * 1024, block_scale_bits=8 * 32, tensor_scale_bits=64),
    "int4_awq": StorageBits(weight_bits=4 * 1024, block_scale_bits=8 * 32, tensor_scale_bits=0),
    # 16 scales of 8 bits, and one of 32 that they are under.
    "int4_dq": StorageBits(
        weight_bits=4 * 1024, block_scale_bits=16 * 8 + 32, tensor_scale_bits=32
    ),
    "int8_sq": StorageBits(weight_bits=8 * 1024, block_scale_bits=4 * 32, tensor_scale_bits=0),
    "int8_wo": StorageBits(weight_bits=8 * 1024, block_scale_bits=4 * 16, tensor_scale_bits=0),
    "nvfp4_wo": StorageBits(weight_bits=4 * 1024, block_scale_bits=64 * 8, tensor_scale_bits=32),
    # Rank 1: factors of 256 and of 4 numbers.
    "nvfp4_svdquant": StorageBits(
        weight_bits=4 * 1024,
        block_scale_bits=64 * 8,
        tensor_scale_bits=64,
        low_rank_bits=16 * (256 + 4),
    ),
    "fp8_pc_pt": StorageBits(weight_bits=8 * 1024, block_scale_bits=4 * 32, tensor_scale_bits=0),
    # Two blocks of 128 columns cover the four rows.
    "fp8_block": StorageBits(weight_bits=8 * 1024, block_scale_bits=2 * 32, tensor_scale_bits=0),
    "mxfp8": StorageBits(weight_bits=8 * 1024, block_scale_bits=32 * 8, tensor_scale_bits=0),
    "mxfp4": StorageBits(weight_bits=4 * 1024, block_scale_bits=32 * 8, tensor_scale_bits=0),
}
EFFECTIVE_BITS_PER_WEIGHT = {
    "none": 16.0,
    "fp8": 8.0,
    "nvfp4": 4.5,
    "w4a8_awq": 4.25,
    "int4_awq": 4.25,
    "int4_dq": 4.15625,
    "int8_sq": 8.125,  # 32 bits for 256 columns
    "int8_wo": 8.0625,  # 16 bits for 256 columns
    "nvfp4_wo": 4.5,
    "nvfp4_svdquant": 4.5 + 4.0625,
    "fp8_pc_pt": 8.125,
    "fp8_block": 8.0625,  # a whole block would add 32 / 128**2
    "mxfp8": 8.25,
    "mxfp4": 4.25,
}
PEER_BITS_PER_WEIGHT = {
    "none": 16.0,
    "fp8": 8.0,
    "nvfp4": 4.5,
    "w4a8_awq": 4.0,
    "int4_awq": 4.0,
    "int4_dq": 4.0,
    "int8_sq": 8.0,
    "int8_wo": 8.0,
    "nvfp4_wo": 4.5,
    "nvfp4_svdquant": 4.5,
    "fp8_pc_pt": 8.0,
    "fp8_block": 8.0,
    "mxfp8": 8.0,
    "mxfp4": 4.0,
}
NOMINAL_BITS = {
    **EFFECTIVE_BITS_PER_WEIGHT,
    **dict.fromkeys(("int8_sq", "int8_wo", "fp8_pc_pt"), 8.0),
    "fp8_block": 8.0 + 32 / 128**2,
    "nvfp4_svdquant": 4.5,
    "int4_dq": 4 + 8 / 64 + 32 / (64 * 256),
}
WEIGHT_ONLY = {"int4_awq", "int4_dq", "int8_wo", "nvfp4_wo"}

every_format = pytest.mark.parametrize("name", sorted(FORMATS))


def test_every_registered_format_has_its_bits_worked_out_here():
    assert set(FORMATS) == set(BITS) == set(EFFECTIVE_BITS_PER_WEIGHT) == set(PEER_BITS_PER_WEIGHT)


@every_format
def test_storage_bits_by_hand(name):
    bits = FORMATS[name].storage_bits(4, 256)
    assert bits == BITS[name]
    assert bits.effective_bits == EFFECTIVE_BITS_PER_WEIGHT[name] * 1024
    assert bits.stored_bits == bits.effective_bits + BITS[name].tensor_scale_bits
    assert FORMATS[name].peer_bits == PEER_BITS_PER_WEIGHT[name]
    assert FORMATS[name].nominal_bits == NOMINAL_BITS[name]


@pytest.mark.parametrize(
    ("rows", "columns", "blocks"), [(128, 128, 1), (129, 128, 2), (1, 256, 2), (300, 384, 9)]
)
def test_blocks_of_rows_and_columns_are_partial_at_the_edges(rows, columns, blocks):
    bits = FORMATS["fp8_block"].storage_bits(rows, columns)
    assert bits.block_scale_bits == 32 * blocks
    assert bits.weight_bits == 8 * rows * columns


@every_format
def test_bits_are_whole_numbers_and_add_up_over_rows(name):
    fmt = FORMATS[name]
    whole, part = fmt.storage_bits(768, 384), fmt.storage_bits(256, 384)
    assert isinstance(whole.stored_bits, int)
    codes = whole.effective_bits - whole.low_rank_bits
    assert codes == 3 * (part.effective_bits - part.low_rank_bits)
    assert whole.tensor_scale_bits == part.tensor_scale_bits


@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        (4096, 4096, 32),
        (512, 14336, 32),
        (14336, 511, 31),
        (256, 256, 16),
        (17, 4096, 1),
        (2, 128, 1),
    ],
)
def test_branches_have_a_rank_for_sixteen_rows_or_columns_and_at_most_32(rows, columns, rank):
    fmt = FORMATS["nvfp4_svdquant"]
    assert fmt.branch_rank(rows, columns) == rank
    assert fmt.storage_bits(rows, columns).low_rank_bits == 16 * rank * (rows + columns)
    assert FORMATS["nvfp4"].branch_rank(rows, columns) == 0


@every_format
def test_every_format_takes_a_matrix_that_fits_all_blocks(name):
    assert FORMATS[name].refusal(2, 128) is None


@every_format
def test_records_are_consistent(name):
    fmt = FORMATS[name]
    assert fmt.name == name
    assert fmt.summary and fmt.loads_in
    has_one_scale_at_most = fmt.weight_scaling in (None, WeightScaling.TENSOR)
    assert has_one_scale_at_most == (fmt.block_scale_bits == 0)
    assert not (fmt.weight_block_size and fmt.weight_scaling is WeightScaling.ROW)
    unquantized = name == NONE
    assert (fmt.weight_element is None) == (fmt.weight_scaling is None) == unquantized
    assert (fmt.activation is ActivationScheme.NONE) == (unquantized or name in WEIGHT_ONLY)
    assert (fmt.calibration is CalibrationAlgorithm.NONE) == unquantized
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.weight_bits = 3


REFUSED = [
    pytest.param("nvfp4", 4, 24, "nvfp4 needs in_features divisible by 16, got 24", id="nvfp4"),
    pytest.param("w4a8_awq", 4, 64, "w4a8_awq needs in_features divisible by 128, got 64", id="k"),
    pytest.param(
        "w4a8_awq",
        3,
        128,
        "w4a8_awq packs two rows per byte and needs even out_features, got 3",
        id="n",
    ),
    pytest.param("int4_awq", 4, 64, "int4_awq needs in_features divisible by 128, got 64", id="k4"),
    pytest.param("int4_dq", 4, 96, "int4_dq needs in_features divisible by 64, got 96", id="dq"),
    pytest.param(
        "int8_wo",
        4,
        66,
        "int8_wo packs 4 columns per word and needs in_features divisible by 4, got 66",
        id="k8",
    ),
    pytest.param(
        "nvfp4_svdquant", 4, 24, "nvfp4_svdquant needs in_features divisible by 16, got 24", id="s"
    ),
    pytest.param("nvfp4_wo", 4, 24, "nvfp4_wo needs in_features divisible by 16, got 24", id="k"),
    pytest.param(
        "fp8_block", 4, 192, "fp8_block needs in_features divisible by 128, got 192", id="k2d"
    ),
    pytest.param("mxfp8", 4, 48, "mxfp8 needs in_features divisible by 32, got 48", id="mx8"),
    pytest.param("mxfp4", 4, 48, "mxfp4 needs in_features divisible by 32, got 48", id="mx4"),
]


@pytest.mark.parametrize(("name", "rows", "columns", "message"), REFUSED)
def test_refusals(name, rows, columns, message):
    assert FORMATS[name].refusal(rows, columns) == message


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("fp8", 3, 7), ("fp8_pc_pt", 3, 7), ("int8_sq", 3, 7), ("none", 1, 1)],
)
def test_formats_without_blocks_take_every_shape(name, rows, columns):
    assert FORMATS[name].refusal(rows, columns) is None


def test_nvfp4_takes_an_odd_number_of_rows():
    assert FORMATS["nvfp4"].refusal(3, 16) is None


def test_the_portable_set_is_what_every_engine_loads():
    assert portable_formats() == ("fp8", "nvfp4")
    assert "TensorRT-LLM on compute capability 8.9 and 9.0 only" in FORMATS["w4a8_awq"].loads_in


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "nvfp",
            r"no format named 'nvfp' \(did you mean nvfp4.*\); known: .*fp8, .*none, nvfp4, .*w4a8",
        ),
        ("w4a8", r"no format named 'w4a8' \(did you mean w4a8_awq"),
        ("zzz", r"^no format named 'zzz'; known: "),
    ],
)
def test_wrong_names_are_answered_with_near_misses(wrong, message):
    with pytest.raises(UnknownNameError, match=message):
        FORMATS[wrong]


def test_lookup_protocol_of_the_registry():
    registry: Registry[int] = Registry("thing")
    assert registry.register("one", 1) == 1
    assert "one" in registry and "two" not in registry and len(registry) == 1
    assert dict(registry) == {"one": 1}
    with pytest.raises(ValueError, match="a thing named 'one' is registered already"):
        registry.register("one", 2)
    assert registry["one"] == 1


def test_a_format_of_ones_own_needs_only_its_record():
    fmt = dataclasses.replace(FORMATS["nvfp4"], name="nvfp4_wide", weight_block_size=32)
    assert isinstance(fmt, QuantFormat)
    assert fmt.storage_bits(1, 64).effective_bits == 64 * 4 + 2 * 8
    assert fmt.refusal(1, 48) == "nvfp4_wide needs in_features divisible by 32, got 48"
