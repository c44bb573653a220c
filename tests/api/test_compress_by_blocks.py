"""Models calibrated a block in memory at a time: the same files as from the whole model."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoq.api.exports.compressing import compress
from autoq.api.task import PROBE_TOKENS, LoadedModel, load_data, token_batches
from autoq.calibration import calibrate
from autoq.errors import ExportError, ModelError
from autoq.export import FolderWeights, SourceMatrices, export_checkpoint, verify_logits
from autoq.formats import CalibrationMethod, Container, FormatName
from autoq.models import discover, load_model
from autoq.models.block_stream import BlockStream, StreamedModel
from autoq.models.forward import forward_logits
from autoq.models.kept_tensors import KeptTensors
from autoq.models.loading import unloaded_model
from autoq.progress import SilentProgress
from autoq.testing.tiny_models import VOCABULARY_SIZE, write_family_model

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
SEQUENCES, TOKENS, BATCH = 6, 24, 4


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.npy"
    rows = np.random.default_rng(0).integers(VOCABULARY_SIZE, size=(12, TOKENS))
    np.save(path, rows)
    return path


def with_outliers(source: Path) -> Path:
    """Channels of every norm before a layer made large, which an input scale pays for."""
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::16] *= 40
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def compress_on(
    source: Path,
    out: Path,
    ids: Path,
    fmt: str,
    container: Container,
    include: tuple[str, ...] = (),
) -> dict[str, Any]:
    return compress(
        source,
        out,
        fmt=fmt,
        container=container,
        include=include,
        calibration_data=str(ids),
        calibration_sequences=SEQUENCES,
        sequence_length=TOKENS,
        batch_size=BATCH,
    )


def export_whole(
    source: Path,
    out: Path,
    ids: Path,
    fmt: str,
    container: Container,
    include: tuple[str, ...] = (),
) -> int:
    """The way of a search: calibrated in float32 with all of the model in memory, then exported.

    Returns:
        How many layers' input scales are folded into norms.
    """
    model = load_model(source, dtype=torch.float32)
    model_map = discover(model, include=include)
    loaded = LoadedModel(model, source, "", torch.bfloat16)
    sizes = {"sequences": SEQUENCES, "sequence_length": TOKENS}
    tokens = load_data(loaded, str(ids), split="calibration", seed=0, **sizes)
    batches = token_batches(tokens, BATCH, torch.device("cpu"))
    assert len(batches) == 2
    name = FormatName(fmt)
    table = calibrate(
        model,
        model_map,
        [name],
        batches,
        partial(forward_logits, model),
        run_small=partial(forward_logits, model, batches[0][:1, :PROBE_TOKENS]),
        container=container,
        scale_dtype=torch.bfloat16,
        method=CalibrationMethod.BEST,
    )
    export_checkpoint(
        model,
        model_map,
        dict.fromkeys(model_map.slots, name),
        table,
        source=source,
        destination=out,
        container=container,
        scale_dtype=torch.bfloat16,
    )
    return sum(entry.folds_into is not None for entry in table.values())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(
    ("family", "fmt", "container", "folds"),
    [
        ("llama", "fp8", MODELOPT, False),
        ("llama", "nvfp4", COMPRESSED, True),
        ("llama", "w4a8_awq", MODELOPT, False),
        ("llama", "int8_sq", COMPRESSED, True),
        ("llama", "int4_awq", COMPRESSED, False),
        ("gemma3", "nvfp4", MODELOPT, False),  # masks of two kinds, positions of two kinds
        ("gpt2", "fp8", MODELOPT, False),  # Conv1D, learned positions
        ("bloom", "nvfp4", COMPRESSED, True),  # blocks that give tuples
        ("mixtral", "nvfp4", MODELOPT, True),  # experts in one tensor in memory, many on disk
    ],
)
def test_writes_what_an_export_of_the_whole_model_writes(
    family: str, fmt: str, container: Container, folds: bool, ids: Path, tmp_path: Path
) -> None:
    source = with_outliers(write_family_model(family, tmp_path / "model"))

    written = compress_on(source, tmp_path / "streamed", ids, fmt, container)
    folded = export_whole(source, tmp_path / "whole", ids, fmt, container)

    streamed, whole = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "whole")
    assert streamed.keys() == whole.keys()
    assert [name for name in whole if not same(streamed[name], whole[name])] == []
    assert folded or not folds
    assert "ids.npy" in written["calibrated_on"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ids.npy",
        "model",
        "streamed",
        "whole",
    ]


def test_one_block_has_weights_at_a_time(tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")
    model = unloaded_model(source).to(torch.float32)
    model_map = discover(model)
    ids = torch.arange(8)[None]
    weights = FolderWeights(model, model_map, SourceMatrices.of(source, model, model_map))
    stream = BlockStream(StreamedModel(model, model_map, weights), [ids], tmp_path)

    def real() -> set[str]:
        return {name for name, value in model.named_parameters() if not value.is_meta}

    for number, path in enumerate(model_map.blocks):
        with stream.block(number):
            stream.run(number, 0, keep=True)
            inside = {name for name in real() if ".layers." in name}
            assert inside and all(name.startswith(f"{path}.") for name in inside)
        assert real() == {"model.embed_tokens.weight"}
    last = stream._outputs.get((len(model_map.blocks) - 1, 0))
    whole = load_model(source, dtype=torch.float32)
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True).hidden_states
        assert torch.equal(whole.model.norm(last), states[-1])
    stream.forget(0)
    assert {path.name.split("-")[1] for path in tmp_path.glob("block-*")} == {"1"}


def test_formats_with_stored_input_scales_are_calibrated_without_being_asked(
    tmp_path: Path,
) -> None:
    source = write_family_model("llama", tmp_path / "model")
    sizes = {"calibration_sequences": 2, "sequence_length": 16}

    static = compress(source, tmp_path / "fp8", fmt="fp8", **sizes)
    dynamic = compress(source, tmp_path / "rows", fmt="fp8_pc_pt", **sizes)

    assert "bundled" in static["calibrated_on"]
    assert dynamic["calibrated_on"] == "weights alone"
    verify_logits(tmp_path / "fp8", torch.arange(12)[None])


@pytest.mark.parametrize(
    ("fmt", "container"), [("fp8", MODELOPT), ("nvfp4", COMPRESSED), ("w4a8_awq", MODELOPT)]
)
def test_layers_outside_blocks_are_those_of_the_whole_model(
    fmt: str, container: Container, ids: Path, tmp_path: Path
) -> None:
    source = write_family_model("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][::16] *= 40
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    head = ("lm_head",)

    written = compress_on(source, tmp_path / "streamed", ids, fmt, container, head)
    export_whole(source, tmp_path / "whole", ids, fmt, container, head)

    streamed, whole = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "whole")
    assert "lm_head" not in written["left"]
    assert any(name.startswith("lm_head.weight_") for name in whole)
    assert streamed.keys() == whole.keys()
    assert [name for name in whole if not same(streamed[name], whole[name])] == []


def test_what_cannot_be_streamed_is_refused(ids: Path, tmp_path: Path) -> None:
    source = write_family_model("t5", tmp_path / "model")

    with pytest.raises(ModelError, match=r"one row of blocks.*encoder-decoder; search the model"):
        compress(
            source,
            tmp_path / "out",
            fmt="fp8",
            container=MODELOPT,
            calibration_data=str(ids),
            calibration_sequences=2,
            sequence_length=8,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "model"]


def test_a_model_that_passes_over_a_block_is_refused(
    ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    source = write_family_model("llama", tmp_path / "model")
    answer = SimpleNamespace(logits=torch.zeros(1, 1, 1))
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: answer)

    with pytest.raises(ModelError, match=r"cannot be run block by block, at model\.layers\.0"):
        compress_on(source, tmp_path / "out", ids, "fp8", MODELOPT)


def test_a_full_disk_leaves_nothing(
    ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_family_model("llama", tmp_path / "model")
    put = KeptTensors.put

    def full(self: KeptTensors, key: tuple[int, int], output: object) -> None:
        if key[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, key, output)

    monkeypatch.setattr(KeptTensors, "put", full)

    with pytest.raises(ExportError, match=r"cannot write .*out: No space left on device; free"):
        compress_on(source, tmp_path / "out", ids, "fp8", MODELOPT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "model"]


class Notes(SilentProgress):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    source = write_family_model("mixtral", tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.full((2, 1), 3))  # one token goes to some experts only
    notes = Notes()

    compress(
        source,
        tmp_path / "out",
        fmt="fp8",
        container=MODELOPT,
        calibration_data=str(tmp_path / "ids.npy"),
        calibration_sequences=1,
        sequence_length=1,
        progress=notes,
    )

    assert any(
        line.startswith("no calibration token reached model.layers.0.mlp.experts.")
        for line in notes.lines
    )
