"""From a model's folder to a packed model that runs: search, export, load, generate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import autoq
from autoq.export import simulated_checkpoint
from autoq.formats import FORMATS
from autoq.layers.packed import PackedLinear
from autoq.models import forward_logits, is_causal
from autoq.testing.tiny_models import write_tiny_model

CASES = [
    ("llama", "compressed-tensors"),
    ("gpt2", "modelopt"),
    ("mixtral", "modelopt"),
    ("t5", "modelopt"),
    ("bert", "compressed-tensors"),
]


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())


@pytest.mark.parametrize(("name", "container"), CASES)
def test_searched_model_runs_packed(name: str, container: str, tmp_path: Path) -> None:
    study = autoq.search(
        write_tiny_model(name, tmp_path / "model"),
        effective_bits=5.0,
        formats=("fp8", "nvfp4", "w4a8_awq"),
        calibration_sequences=4,
        sequence_length=32,
        batch_size=2,
        held_out_sequences=2,
        container=container,
        store=f"sqlite:///{tmp_path / 'studies.db'}",
        export=tmp_path / "out",
    )
    model = autoq.load(tmp_path / "out")
    simulated = simulated_checkpoint(tmp_path / "out").model
    ids = torch.randint(5, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(forward_logits(model, ids), forward_logits(simulated, ids))
    if is_causal(model) or model.config.is_encoder_decoder:
        options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, **options), simulated.generate(ids, **options))

    formats = {group["name"]: group["format"] for group in study.summary()["groups"]}
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert {module.format.name for module in packed} == set(formats.values()) - {"none"}
    for module in packed:
        bits = FORMATS[module.format.name].storage_bits(module.out_features, module.in_features)
        # compressed-tensors runs INT4 weights without a second level, and inputs without a scale;
        # an AWQ scale that no norm takes comes on top.
        two_level = (
            8 if (module.format.name, container) == ("w4a8_awq", "compressed-tensors") else 0
        )
        smoothing = 0 if module.pre_quant_scale is None else 2 * module.in_features
        assert bytes_of(module) == bits.stored_bits // 8 - two_level + smoothing


def test_command_line_generates_from_what_it_searched(tmp_path: Path) -> None:
    model = write_tiny_model("llama", tmp_path / "model")

    def autoq_command(*arguments: str) -> str:
        command = [sys.executable, "-c", "from autoq.cli import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    autoq_command(
        *("search", str(model), "--bits", "5", "--calib-sequences", "4", "--sequence-length", "32"),
        *("--held-out-sequences", "2", "--no-measure", "--export", "out", "--quiet"),
    )
    found = json.loads(
        autoq_command("generate", "out", "-p", "abc", "--max-new-tokens", "4", "--json")
    )
    assert found["text"].startswith("abc")
    assert found["weight_bytes"] < (model / "model.safetensors").stat().st_size
