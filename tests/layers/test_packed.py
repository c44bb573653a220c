"""Packed layers compute what the simulation computes, and take the bytes that their format says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from autoq.errors import ModelError
from autoq.formats import FORMATS, WeightScaling
from autoq.kernels import int4
from autoq.layers import (
    Container,
    LayerCalibration,
    QuantizedWeight,
    dequantize_weight,
    fake_quantize_input,
    quantize_weight,
)
from autoq.layers.packed import PackedExperts, PackedLinear, PackedRows, packed_rows

ROWS, COLUMNS = 48, 256
QUANTIZED = tuple(sorted(set(FORMATS) - {"none"}))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
CASES = list(product(QUANTIZED, Container))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def calibrated(weight: Tensor, fmt: str, powers: Tensor | None = None) -> LayerCalibration:
    smoothed = weight if powers is None else weight / powers
    if fmt == "w4a8_awq":
        smoothed = int4.dequantize(int4.quantize(smoothed, storage_dtype=torch.bfloat16))
    amax = smoothed.abs().max().item()
    return LayerCalibration(weight_amax=amax, input_amax=3.7, pre_quant_scale=powers)


def quantized(weight: Tensor, fmt: str, calibration: LayerCalibration) -> QuantizedWeight:
    return quantize_weight(weight, FORMATS[fmt], calibration, scale_dtype=torch.bfloat16)


class Case:
    """One weight in one format, with what the simulation makes of it."""

    def __init__(
        self, fmt: str, container: Container = MODELOPT, *, powers: Tensor | None = None
    ) -> None:
        self.format, self.container = FORMATS[fmt], container
        self.original = drawn(ROWS, COLUMNS)
        self.calibration = calibrated(self.original, fmt, powers)
        self.weight = quantized(self.original, fmt, self.calibration)

    def layer(self, **options: object) -> PackedLinear:
        arguments = {"container": self.container, "dtype": torch.float32, **options}
        return PackedLinear(self.weight, self.calibration, **arguments)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantize_weight(self.weight, container=self.container, dtype=dtype)

    def simulated(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values = fake_quantize_input(x, self.format, self.calibration, container=self.container)
        return linear(values, self.dense(x.dtype), bias)


def bytes_of(module: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "container"), CASES)
def test_layer_equals_the_simulation(fmt: str, container: Container, dtype: torch.dtype) -> None:
    case = Case(fmt, container)
    bias = nn.Parameter(drawn(ROWS, seed=2).to(dtype), requires_grad=False)
    x = drawn(2, 5, COLUMNS, seed=1).to(dtype)
    for layer_bias in (None, bias):
        out = case.layer(dtype=dtype, bias=layer_bias)(x)
        assert out.dtype == dtype and out.shape == (2, 5, ROWS)
        assert torch.equal(out, case.simulated(x, layer_bias))


def test_scale_that_is_not_folded_multiplies_the_input() -> None:
    powers = torch.exp2(torch.arange(COLUMNS) % 5 - 2.0)
    case = Case("w4a8_awq", powers=powers)
    x = drawn(7, COLUMNS, seed=1).bfloat16()
    layer = case.layer(dtype=torch.bfloat16)
    assert torch.equal(layer(x), case.simulated(x))
    unscaled = replace(case.calibration, pre_quant_scale=None)
    other = PackedLinear(case.weight, unscaled, container=MODELOPT, dtype=torch.bfloat16)
    assert not torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_layer_multiplies_the_weight_as_it_lies(dtype: torch.dtype) -> None:
    case = Case("nvfp4")
    x = drawn(24, COLUMNS, seed=1).to(dtype)
    stored = case.dense(dtype).t().contiguous()  # [in, out], as a Conv1D keeps it
    values = fake_quantize_input(x, case.format, case.calibration)
    layer = case.layer(dtype=dtype, transposed=True)
    assert torch.equal(layer(x), linear(values, stored.t()))
    assert layer.weight.shape == (COLUMNS, ROWS)
    assert torch.equal(layer.weight + 0, stored)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "container"), CASES)
def test_layer_takes_the_bits_of_its_format(fmt: str, container: Container) -> None:
    layer = Case(fmt, container).layer()
    stored_bits = FORMATS[fmt].storage_bits(ROWS, COLUMNS).stored_bits
    # compressed-tensors runs INT4 weights without a second level, and inputs without a scale.
    absent_bits = 64 if (fmt, container) == ("w4a8_awq", COMPRESSED) else 0
    # Scales that are stored in 16 bits are held in 32.
    wider_bits = 16 * ROWS if fmt == "int8_wo" else 0
    assert bytes_of(layer) * 8 == stored_bits - absent_bits + wider_bits


def test_layer_owns_its_memory() -> None:
    case = Case("fp8")
    layer = case.layer()
    before = layer(drawn(3, COLUMNS, seed=1))
    case.weight.tensors["codes"].zero_()
    assert torch.equal(layer(drawn(3, COLUMNS, seed=1)), before)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_everything_moves_to_another_device(fmt: str) -> None:
    layer = Case(fmt).layer().to("meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert all(tensor.is_meta for tensor in layer.packed.tensors().values())
    # A tensor outside the buffers would stay where it was, and its memory with it.
    left = [v for v in vars(layer).values() if isinstance(v, Tensor) and v.numel()]
    assert not left


# --- being a module ------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_casting_changes_what_is_computed_in_and_no_code(fmt: str) -> None:
    case = Case(fmt)
    bias = nn.Parameter(drawn(ROWS, seed=2), requires_grad=False)
    layer = case.layer(bias=bias)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.float16)
    after = dict(layer.named_buffers())
    assert before.keys() == after.keys()
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype
        assert torch.equal(after[name].float(), buffer.float())
    assert layer.bias is not None and layer.bias.dtype == torch.float16
    assert layer.weight.dtype == torch.float16
    x = drawn(4, COLUMNS, seed=1).half()
    assert torch.equal(layer(x), case.simulated(x, bias.data.half()))


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_state_is_kept_by_copies_and_state_dicts(fmt: str) -> None:
    case, x = Case(fmt), drawn(4, COLUMNS, seed=1)
    layer = case.layer()
    other = Case(fmt)
    other.weight = quantized(2 * other.original, fmt, calibrated(2 * other.original, fmt))
    filled = other.layer()
    assert not torch.equal(filled(x), layer(x))
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_repr_names_format_and_bits() -> None:
    assert repr(Case("nvfp4").layer()) == (
        "PackedLinear(in_features=256, out_features=48, bias=False, format=nvfp4, bits=4.5)"
    )


# --- the weight, for whoever asks for it ---------------------------------------------------------


def test_looking_at_the_weight_dequantises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Case("fp8").layer(dtype=torch.bfloat16)

    def refuse(*_: object) -> Tensor:
        raise AssertionError("dequantised")

    monkeypatch.setattr(PackedLinear, "dequantized", refuse)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (
        torch.bfloat16,
        torch.device("cpu"),
        (ROWS, COLUMNS),
    )


def test_reading_the_weight_gives_the_dequantised_values() -> None:
    case = Case("nvfp4")
    weight, x = case.layer().weight, drawn(3, COLUMNS, seed=1)
    assert torch.equal(weight.detach(), case.dense(torch.float32))
    assert torch.equal(linear(x, weight), linear(x, case.dense(torch.float32)))
    with pytest.raises(ModelError, match="cannot be written to"):
        weight.mul_(2)


# --- experts -------------------------------------------------------------------------------------


def test_products_with_an_experts_matrix_are_its_own() -> None:
    cases = [Case(fmt) for fmt in QUANTIZED]
    experts = PackedExperts([case.layer() for case in cases])
    x = drawn(5, COLUMNS, seed=1)
    for index, case in enumerate(cases):
        assert torch.equal(linear(x, experts[torch.tensor(index)]), case.simulated(x))
        assert torch.equal(linear(x, experts[index]), case.simulated(x))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda experts: experts[torch.tensor([0, 1])],
        lambda experts: torch.matmul(drawn(2, COLUMNS), experts[0]),
        lambda experts: torch.stack([experts[0], experts[0]]),
        lambda experts: torch.transpose(experts, 1, 2),
    ],
)
def test_other_ways_to_run_experts_are_refused(misuse: Callable[[PackedExperts], object]) -> None:
    experts = PackedExperts([Case("fp8").layer(), Case("fp8").layer()])
    with pytest.raises(ModelError, match=r"set_experts_implementation\('eager'\)"):
        misuse(experts)


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("share", [True, False])
def test_matrix_of_parts_stands_for_all_their_rows(fmt: str, share: bool) -> None:
    halves = [drawn(ROWS, COLUMNS, seed=seed) for seed in (3, 4)]
    halves[1] = halves[1] * 3
    top = calibrated(torch.cat(halves), fmt)
    entries = [top if share else calibrated(half, fmt) for half in halves]
    parts = [quantized(h, fmt, entry) for h, entry in zip(halves, entries, strict=True)]
    matrix = packed_rows(parts, top, container=MODELOPT, dtype=torch.float32)
    scaling = FORMATS[fmt].weight_scaling
    has_one_scale = scaling in (WeightScaling.TENSOR, WeightScaling.TWO_LEVEL_GROUP)
    # Blocks of 128 rows cannot be told apart in two halves of 48.
    # Nor can blocks of 256 scales in those of 192.
    blocks = scaling in (WeightScaling.BLOCK, WeightScaling.DOUBLE_GROUP)
    apart = blocks or (has_one_scale and not share)
    assert isinstance(matrix, PackedRows if apart else PackedLinear)
    assert (matrix.out_features, matrix.in_features) == (2 * ROWS, COLUMNS)
    x = drawn(5, COLUMNS, seed=1)
    values = fake_quantize_input(x, FORMATS[fmt], top)
    expected = [linear(values, dequantize_weight(part)) for part in parts]
    # Whether BLAS gets one matrix or two is its own affair.
    torch.testing.assert_close(matrix(x), torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)
