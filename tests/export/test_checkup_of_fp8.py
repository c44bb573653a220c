"""What `autoq verify` says of transformers' own fp8 checkpoints, others' among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoq.export._types import Spelling
from autoq.export.checkup import check_checkpoint
from autoq.export.checkup._fp8 import is_left_out
from autoq.formats import ENGINES, FormatName, parse_target
from autoq.layers import Container

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(uniform_plan: Any, tmp_path: Path) -> Path:
    plan = uniform_plan("llama", Container.COMPRESSED_TENSORS, FormatName("fp8_block"))
    found: Path = plan.export(tmp_path / "out", spelling=Spelling.TRANSFORMERS_FP8).path
    return found


@pytest.mark.parametrize("is_listed", [True, False])
def test_the_head_is_left_out_whether_or_not_it_is_listed(folder: Path, is_listed: bool) -> None:
    """DeepSeek-V3's manifest lists nothing at all; no engine takes a head for blocks."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    listed = config["quantization_config"].pop("modules_to_not_convert")
    assert listed == ["lm_head"]
    if is_listed:
        config["quantization_config"]["modules_to_not_convert"] = listed
    path.write_text(json.dumps(config))

    report = check_checkpoint(folder)
    assert report.faults == ()
    head = next(layer for layer in report.layers if layer.name == "lm_head")
    assert head.stored == "unquantised"
    assert {name: found.does for name, found in head.outcomes.items()} == dict.fromkeys(
        ENGINES, "unquantised"
    )


def test_blocks_that_transformers_takes_for_others(folder: Path) -> None:
    """192 rows have two scales, and transformers makes two blocks of 96 of them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    columns = tensors[f"{DOWN}.weight"].shape[1]
    tensors[f"{DOWN}.weight"] = torch.ones(192, columns).to(torch.float8_e4m3fn)
    tensors[f"{DOWN}.weight_scale_inv"] = torch.ones(2, columns // 128)
    save_file(tensors, file, metadata={"format": "pt"})

    def outcome(target: str) -> Any:
        layers = check_checkpoint(folder, parse_target(target)).layers
        return next(layer.outcomes[target] for layer in layers if layer.name == DOWN)

    found = outcome("transformers:cpu")
    assert (found.does, found.runs) == ("refuses", False)
    assert "as high as its rows / its scales" in found.reason
    assert outcome("vllm:a100").reason != found.reason


@pytest.mark.parametrize(
    ("module", "entry", "is_out"),
    [
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj", True),
        ("model.layers.1.mlp.down_proj", "model.layers.1.mlp", False),
        ("model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.experts", True),
        ("model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.experts.0.up_proj", True),
        ("model.layers.1.mlp.experts.3.down_proj", "model.layers.11.mlp.experts", False),
        ("model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp", False),
    ],
)
def test_vllm_leaves_out_all_experts_of_a_layer_or_none(
    module: str, entry: str, is_out: bool
) -> None:
    """As vLLM 0.33 matches names: exactly, and experts by the name of all in any longer one."""
    assert is_left_out("vllm", module, [entry]) == is_out
