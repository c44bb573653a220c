"""The matrix of a slot: a view of the parameter, whatever kind of module owns it."""

import dataclasses

import pytest
import torch
from torch import nn

from autoq.errors import ModelError
from autoq.models import SlotKind, WeightSlot, slot_weight


class _Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.conv = _Conv1D()
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.arange(24.0).reshape(4, 2, 3))


def _slot(kind: SlotKind, module: str, parameter: str = "weight", **changes: object) -> WeightSlot:
    slot = WeightSlot(
        name=module, module=module, parameter=parameter, kind=kind, out_features=2, in_features=3
    )
    return dataclasses.replace(slot, **changes)


def test_slot_weight_is_a_view_of_every_kind_of_parameter():
    model = _Model()
    linear = slot_weight(model, _slot(SlotKind.LINEAR, "linear"))
    assert linear.data_ptr() == model.linear.weight.data_ptr()
    conv = slot_weight(model, _slot(SlotKind.CONV1D, "conv", out_features=3, in_features=2))
    assert conv.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    expert = slot_weight(model, _slot(SlotKind.EXPERT, "experts", "gate_up_proj", expert=1))
    assert expert.tolist() == [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    with torch.no_grad():
        for view in (linear, conv, expert):
            view.fill_(-1.0)
    assert (model.linear.weight == -1).all() and (model.conv.weight == -1).all()
    assert (model.experts.gate_up_proj == -1).sum() == 6


def test_slot_weight_refuses_what_the_model_does_not_have():
    model = _Model()
    with pytest.raises(ModelError, match="the model has no weight absent"):
        slot_weight(model, _slot(SlotKind.LINEAR, "absent"))
    with pytest.raises(ModelError, match="the model has no weight linear"):
        slot_weight(model, _slot(SlotKind.LINEAR, "linear", "kernel"))
    with pytest.raises(ModelError, match=r"linear must have shape \(5, 3\), got \(2, 3\)"):
        slot_weight(model, _slot(SlotKind.LINEAR, "linear", out_features=5))
    with pytest.raises(ModelError, match="the model has no weight experts"):
        slot_weight(model, _slot(SlotKind.EXPERT, "experts", "gate_up_proj", expert=9))
