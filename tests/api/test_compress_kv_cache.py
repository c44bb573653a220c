"""`compress` with a format of the key/value cache: scales of the model, or 1 without data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import autoq
from autoq.api.exports.compressing import compress
from autoq.calibration.kv_cache import calibrate_cache
from autoq.cli import app
from autoq.errors import InputError, ModelError, UnknownNameError
from autoq.export._kv_cache import SCALE_NAMES
from autoq.formats import Container, FormatName
from autoq.layers.kv_cache import cache_scale, cached_layers
from autoq.models import forward_logits, load_model
from autoq.testing.tiny_models import VOCABULARY_SIZE, write_family_model

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
SEQUENCES, TOKENS, BATCH = 6, 24, 4


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Four times what is calibrated on; which of the rows are is the seed's choice."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(VOCABULARY_SIZE, size=(12, TOKENS)))
    return path


def on(ids: Path) -> dict[str, Any]:
    return {
        "calibration_data": str(ids),
        "calibration_sequences": SEQUENCES,
        "sequence_length": TOKENS,
        "batch_size": BATCH,
    }


def with_outliers(source: Path) -> Path:
    """Norms whose scales are worth folding, so that folding is tried while blocks run."""
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::16] *= 40
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def scales_of_the_whole_model(
    source: Path, ids: Path, fmt: str, container: Container
) -> dict[str, float]:
    """Name in the checkpoint -> scale, calibrated with all of the model in memory."""
    from autoq.api.task import LoadedModel, load_data

    model = load_model(source, dtype=torch.float32)
    loaded = LoadedModel(model, source, "", torch.bfloat16)
    sizes = {"sequences": SEQUENCES, "sequence_length": TOKENS}
    rows = torch.from_numpy(load_data(loaded, str(ids), split="calibration", seed=0, **sizes).ids)
    layers = cached_layers(model, lambda: forward_logits(model, rows[:1]))
    found = calibrate_cache(model, layers, [rows], lambda batch: forward_logits(model, batch))
    keys, values = SCALE_NAMES[container]
    return {
        f"{layer.name}.{name}": float(cache_scale(FormatName(fmt), amax))
        for layer in found
        for name, amax in ((keys, layer.key_amax), (values, layer.value_amax))
    }


@pytest.mark.parametrize(
    ("family", "weights", "cache", "container"),
    [
        ("llama", "nvfp4", "fp8", MODELOPT),
        ("llama", "nvfp4", "nvfp4", MODELOPT),
        ("llama", "int8_sq", "int8", COMPRESSED),
        ("mixtral", "nvfp4", "fp8", MODELOPT),
    ],
)
def test_scales_are_those_of_the_whole_model(
    family: str, weights: str, cache: str, container: Container, ids: Path, tmp_path: Path
) -> None:
    source = with_outliers(write_family_model(family, tmp_path / "model"))
    options = {"fmt": weights, "container": container, **on(ids)}
    written = compress(source, tmp_path / "cached", kv_format=cache, **options)
    compress(source, tmp_path / "plain", **options)

    found, plain = tensors_of(tmp_path / "cached"), tensors_of(tmp_path / "plain")
    expected = scales_of_the_whole_model(source, ids, cache, container)
    assert found.keys() - plain.keys() == expected.keys()
    # Blocks are run with the same rows in smaller batches, whose sums round otherwise.
    for name, scale in expected.items():
        assert float(found[name]) == pytest.approx(scale, rel=1e-5)
    for name, tensor in plain.items():
        assert torch.equal(
            found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert written["kv_format"] == cache
    manifest = json.loads((tmp_path / "cached" / "config.json").read_text())
    assert manifest["quantization_config"]["kv_cache_scheme"] is not None


@pytest.mark.parametrize("container", [MODELOPT, COMPRESSED])
def test_without_data_scales_are_one(container: Container, tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")
    compress(source, tmp_path / "out", fmt="int4_awq", container=container, kv_format="fp8")
    keys, values = SCALE_NAMES[container]
    found = tensors_of(tmp_path / "out")
    names = [f"model.layers.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in (keys, values)]
    assert [float(found[name]) for name in names] == [1.0] * 4
    assert autoq.load(tmp_path / "out") is not None


def test_what_cannot_be_had_is_refused(ids: Path, tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")

    def refused(error: type[Exception], text: str, **options: Any) -> None:
        with pytest.raises(error, match=text):
            compress(
                source, tmp_path / "out", **{"fmt": "int4_awq", "container": MODELOPT, **options}
            )
        assert not (tmp_path / "out").exists()

    refused(InputError, "nvfp4 needs scales from data", kv_format="nvfp4")
    refused(InputError, "--kv-format int8 does not go with modelopt", kv_format="int8")
    refused(UnknownNameError, "fp9", kv_format="fp9")
    source = write_family_model("bert", tmp_path / "bert")
    refused(ModelError, "continue text", kv_format="fp8")
    refused(ModelError, "continue text", kv_format="fp8", fmt="fp8", **on(ids))


def test_the_command_writes_it_and_says_so(tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")
    arguments = ["compress", str(source), str(tmp_path / "out"), "-f", "int4_awq"]
    arguments += ["--container", "modelopt", "--kv-format", "fp8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[1].endswith("; KV cache in fp8")
    assert "scales of 1" in result.stderr
