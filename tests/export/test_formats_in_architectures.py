"""Every architecture with every format in turn, in both containers: written, read back, and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoq.export import (
    LOGITS_BOUND,
    load_packed,
    simulated_checkpoint,
    verify_checkpoint,
    verify_logits,
)
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import Container
from autoq.models import SlotName, forward_logits
from autoq.testing.tiny_models import TINY_ARCHITECTURES

QUANTIZED = sorted(FormatName(name) for name in set(FORMATS) - {NONE})
UniformPlan = Callable[[str, Container, str], Any]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return forward_logits(model, ids)


def formats_in_turn(planned: Any) -> dict[SlotName, FormatName]:
    """A format for each group, the next of those that the container can hold it in."""
    chosen: dict[SlotName, FormatName] = {}
    start = 0
    for group in planned.tiny.model_map.groups:
        for step in range(len(QUANTIZED)):
            fmt = QUANTIZED[(start + step) % len(QUANTIZED)]
            slot_formats = dict.fromkeys(group.slots, fmt)
            if not planned.with_formats(slot_formats).refusals():
                chosen |= slot_formats
                start += step + 1
                break
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("container", Container)
@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_formats_in_turn_are_written_read_back_and_run(
    name: str, container: Container, uniform_plan: UniformPlan, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = uniform_plan(name, container, NONE)
    mixed = planned.with_formats(formats_in_turn(planned))
    result = mixed.export(tmp_path / "out")
    report = verify_checkpoint(result.path, *mixed.expected())
    assert report.quantized_matrices == len(mixed.slot_formats)
    expected = logits(simulated_checkpoint(result.path).model, input_ids)
    assert torch.equal(logits(load_packed(result.path), input_ids), expected)
    if container is Container.COMPRESSED_TENSORS:
        assert verify_logits(result.path, input_ids) <= LOGITS_BOUND
