"""What calibration chooses (block scales by error, scales folded into norms) is what is exported."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import autoq
from autoq.bundled.outliers import add_activation_outliers
from autoq.calibration import calibrate
from autoq.export import simulated_checkpoint, verify_checkpoint
from autoq.formats import FormatName
from autoq.layers import Container
from autoq.layers.simulate import SimulatedModel
from autoq.models import discover, forward_logits, load_model

from .conftest import STORAGE_DTYPE, Planned, Tiny


@pytest.fixture
def hard_llama(tiny: Any, tmp_path: Path) -> Tiny:
    """A llama whose norms put out a few channels that are much larger than the rest."""
    source = tmp_path / "hard"
    model = load_model(tiny("llama").source)
    add_activation_outliers(model, channels_per_norm=4)
    model.save_pretrained(source)
    loaded = load_model(source)
    return Tiny(source, loaded, discover(loaded))


def calibrated(loaded: Tiny, container: Container, fmt: str, ids: Tensor) -> Planned:
    name = FormatName(fmt)
    table = calibrate(
        loaded.model,
        loaded.model_map,
        (name,),
        [ids],
        partial(forward_logits, loaded.model),
        run_small=partial(forward_logits, loaded.model, ids[:1]),
        container=container,
        scale_dtype=STORAGE_DTYPE,
    )
    return Planned(loaded, container, dict.fromkeys(loaded.model_map.slots, name), table)


@pytest.mark.parametrize(
    ("container", "fmt"),
    [*product(Container, ("nvfp4", "w4a8_awq")), (Container.COMPRESSED_TENSORS, "mxfp4")],
)
def test_exports_read_back_and_run_as_they_were_searched(
    fmt: str, container: Container, hard_llama: Tiny, tmp_path: Path, input_ids: Tensor
) -> None:
    planned = calibrated(hard_llama, container, fmt, input_ids)
    folded = {entry.folds_into for entry in planned.calibration.values()} - {None}
    assert len(folded) == 4
    assert all(entry.importance is not None for entry in planned.calibration.values())

    result = planned.export(tmp_path / "out")
    assert verify_checkpoint(result.path, *planned.expected()).folded_norms == 4
    simulated = simulated_checkpoint(result.path).model
    searched = load_model(hard_llama.source)
    SimulatedModel(
        searched,
        hard_llama.model_map.slots,
        planned.slot_formats,
        planned.calibration,
        container=container,
        scale_dtype=STORAGE_DTYPE,
    )
    with torch.no_grad():
        expected = forward_logits(searched, input_ids)
        assert torch.equal(forward_logits(simulated, input_ids), expected)
        assert torch.equal(forward_logits(autoq.load(result.path), input_ids), expected)


@pytest.mark.parametrize("container", Container)
def test_nvfp4_checkpoints_hold_the_tensors_that_plain_ones_do(
    container: Container, hard_llama: Tiny, tmp_path: Path, input_ids: Tensor
) -> None:
    best = calibrated(hard_llama, container, "nvfp4", input_ids)
    plain = replace(best, calibration=hard_llama.calibrate(best.slot_formats))
    files = [
        load_file(planned.export(tmp_path / name).path / "model.safetensors")
        for name, planned in (("best", best), ("plain", plain))
    ]
    described = [{name: (t.dtype, t.shape) for name, t in tensors.items()} for tensors in files]
    assert described[0] == described[1]
    scales = [name for name in files[0] if name.endswith("weight_scale")]
    assert any(not torch.equal(files[0][name].float(), files[1][name].float()) for name in scales)
