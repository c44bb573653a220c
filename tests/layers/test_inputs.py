"""Inputs that several layers share are quantised once, and the numbers are those of each alone."""

import weakref

import pytest
import torch
from torch import nn

from autoq.formats import FORMATS
from autoq.layers import Container, LayerCalibration, fake_quantize_input
from autoq.layers import _inputs as inputs_module
from autoq.layers._inputs import SimulatedProducts
from autoq.layers.taps import MatrixCall
from autoq.models import SlotKind, WeightSlot

WIDTH = 32


@pytest.fixture
def quantised(monkeypatch):
    """The inputs that were quantised, in order."""
    seen = []

    def counted(x, *arguments, **options):
        seen.append(x)
        return fake_quantize_input(x, *arguments, **options)

    monkeypatch.setattr(inputs_module, "fake_quantize_input", counted)
    return seen


def slot(name, kind=SlotKind.LINEAR):
    return WeightSlot(
        name=name,
        module=name,
        parameter="weight",
        kind=kind,
        out_features=8,
        in_features=WIDTH,
        expert=0 if kind is SlotKind.EXPERT else None,
    )


def calibration(input_amax=3.0, scale=None):
    return LayerCalibration(weight_amax=1.0, input_amax=input_amax, pre_quant_scale=scale)


def products(formats, calibrations=None, kind=SlotKind.LINEAR, container=Container.MODELOPT):
    """Of slots by name; each calibrated alike unless told otherwise."""
    own = calibrations or {}
    return SimulatedProducts(
        {name: slot(name, kind) for name in formats},
        formats,
        {(name, fmt): own.get(name, calibration()) for name, fmt in formats.items()},
        container,
    )


def weight_of(name):
    seed = sum(map(ord, name))
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


def product(handler, name, x, kind=SlotKind.LINEAR):
    return handler(MatrixCall(slot(name, kind), weight_of(name), None), x)


def alone(name, fmt, x, own=None, container=Container.MODELOPT):
    values = fake_quantize_input(x, FORMATS[fmt], own or calibration(), container=container)
    return nn.functional.linear(values, weight_of(name))


def some_input(seed=0):
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))


THREE = ("a.q", "a.k", "a.v")


@pytest.mark.parametrize("container", list(Container))
@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "w4a8_awq"])
def test_one_input_of_three_layers_is_quantised_once(quantised, fmt, container):
    scale = torch.exp2(torch.arange(WIDTH) % 3 - 1.0)
    own = {name: calibration(scale=scale.clone()) for name in THREE}
    handler = products(dict.fromkeys(THREE, fmt), own, container=container)
    x = some_input()
    found = [product(handler, name, x) for name in THREE]
    assert len(quantised) == 1
    for name, values in zip(THREE, found, strict=True):
        assert torch.equal(values, alone(name, fmt, x, own[name], container))


@pytest.mark.parametrize(
    "different",
    [
        calibration(input_amax=2.0),
        calibration(scale=torch.full((WIDTH,), 2.0)),
    ],
    ids=["amax", "scale"],
)
def test_layers_calibrated_differently_share_nothing(quantised, different):
    handler = products(dict.fromkeys(THREE[:2], "nvfp4"), {"a.k": different})
    x = some_input()
    assert torch.equal(product(handler, "a.q", x), alone("a.q", "nvfp4", x))
    assert torch.equal(product(handler, "a.k", x), alone("a.k", "nvfp4", x, different))
    assert len(quantised) == 2


def test_formats_with_other_inputs_share_nothing(quantised):
    handler = products({"a.q": "nvfp4", "a.k": "fp8"})
    x = some_input()
    for name, fmt in (("a.q", "nvfp4"), ("a.k", "fp8")):
        assert torch.equal(product(handler, name, x), alone(name, fmt, x))
    assert len(quantised) == 2


def test_formats_with_the_same_inputs_share_them(quantised):
    """FP8 and W4A8 read inputs in FP8 under one scale."""
    handler = products({"a.q": "fp8", "a.k": "w4a8_awq"})
    x = some_input()
    for name, fmt in (("a.q", "fp8"), ("a.k", "w4a8_awq")):
        assert torch.equal(product(handler, name, x), alone(name, fmt, x))
    assert len(quantised) == 1


def test_an_input_written_to_in_between_is_quantised_again():
    handler = products(dict.fromkeys(THREE, "nvfp4"))
    x = some_input()
    product(handler, "a.q", x)
    x.mul_(0.5)
    assert torch.equal(product(handler, "a.k", x), alone("a.k", "nvfp4", x))


def test_another_input_is_quantised_whether_or_not_all_readers_came():
    handler = products(dict.fromkeys(THREE, "nvfp4"))
    product(handler, "a.q", some_input())
    for name in THREE:
        other = some_input(1)
        assert torch.equal(product(handler, name, other), alone(name, "nvfp4", other))


def test_in_inference_mode_nothing_is_held(quantised):
    """Its tensors do not tell whether they were written to."""
    handler = products(dict.fromkeys(THREE, "nvfp4"))
    with torch.inference_mode():
        x = some_input()
        product(handler, "a.q", x)
        x.mul_(0.5)
        assert torch.equal(product(handler, "a.k", x), alone("a.k", "nvfp4", x))
    assert len(quantised) == 2


def test_experts_share_nothing(quantised):
    handler = products(dict.fromkeys(THREE, "nvfp4"), kind=SlotKind.EXPERT)
    x = some_input()
    for name in THREE:
        product(handler, name, x, SlotKind.EXPERT)
    assert len(quantised) == 3


def test_nothing_is_held_once_the_last_reader_came():
    handler = products({**dict.fromkeys(THREE, "nvfp4"), "b.o": "nvfp4"})
    x = some_input()
    seen = weakref.ref(x)
    for name in THREE:
        product(handler, name, x)
    del x
    assert seen() is None
    alone_here = some_input(1)
    seen = weakref.ref(alone_here)
    product(handler, "b.o", alone_here)
    del alone_here
    assert seen() is None
