"""Models quantised tensor by tensor: the same files as with the model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoq.api.exports.compressing import compress
from autoq.errors import ExportError, InputError, ModelError, VerificationError
from autoq.export import _shards as shards
from autoq.export import export_checkpoint, is_held, read_quantized, verify_logits
from autoq.formats import FORMATS, NONE, Container, FormatName
from autoq.layers import LayerCalibration
from autoq.layers.quantize import input_scale
from autoq.models import ModelMap, discover, load_model
from autoq.models.weights import slot_weight
from autoq.testing.tiny_models import write_tiny_model

COMPRESSED = Container.COMPRESSED_TENSORS
W4A8 = FormatName("w4a8_awq")


def needs_no_inputs(fmt: FormatName, container: Container) -> bool:
    anything = LayerCalibration(weight_amax=1.0, input_amax=1.0)
    return fmt != NONE and input_scale(FORMATS[fmt], anything, container=container) is None


FROM_WEIGHTS_ALONE = [
    entry.name
    for entry in FORMATS.values()
    if is_held(entry.name) and needs_no_inputs(entry.name, COMPRESSED)
]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def weight_only(model: torch.nn.Module, model_map: ModelMap, fmt: FormatName) -> dict:
    """Calibration with the largest magnitude of each fusion set, from the model in memory."""
    found = {}
    for group in model_map.groups:
        for slot in group.slots:
            members = next((names for names in group.fusion_sets if slot in names), (slot,))
            weights = [slot_weight(model, model_map.slots[name]).float() for name in members]
            amax = max(float(weight.abs().max()) for weight in weights)
            found[slot, fmt] = LayerCalibration(weight_amax=amax, input_amax=0.0)
    return found


@pytest.mark.parametrize("architecture", ["llama", "opt", "bert"])
@pytest.mark.parametrize("fmt", FROM_WEIGHTS_ALONE)
def test_writes_what_an_export_of_the_whole_model_writes(
    architecture: str, fmt: FormatName, tmp_path: Path
) -> None:
    source = write_tiny_model(architecture, tmp_path / "model")
    model = load_model(source)
    model_map = discover(model)

    written = compress(source, tmp_path / "streamed", fmt=fmt, calibration="max")
    export_checkpoint(
        model,
        model_map,
        dict.fromkeys(model_map.slots, fmt),
        weight_only(model, model_map, fmt),
        source=source,
        destination=tmp_path / "whole",
        container=COMPRESSED,
        scale_dtype=torch.bfloat16,
    )

    streamed, whole = tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "whole")
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)
    assert written["verification"]["quantized_matrices"] == len(model_map.slots)
    assert written["left"] == {}


@pytest.mark.parametrize("fmt", FROM_WEIGHTS_ALONE)
def test_transformers_loads_it(fmt: FormatName, tmp_path: Path) -> None:
    source = write_tiny_model("llama", tmp_path / "model")

    compress(source, tmp_path / "out", fmt=fmt)

    verify_logits(tmp_path / "out", torch.arange(12)[None])


def test_block_scales_of_least_error_lose_no_more_than_those_of_largest_magnitudes(
    tmp_path: Path,
) -> None:
    source = write_tiny_model("llama", tmp_path / "model")
    model = load_model(source)
    slots = discover(model).slots

    def error(calibration: str) -> float:
        out = tmp_path / calibration
        compress(source, out, fmt=W4A8, calibration=calibration)
        checkpoint = read_quantized(out)
        total = 0.0
        for name, slot in slots.items():
            packed = checkpoint[name].tensors
            from autoq.kernels import int4

            codes = int4.unpack_columns(packed["weight_packed"]).float()
            scale = packed["weight_scale"].float().repeat_interleave(128, dim=1)
            total += float((codes * scale - slot_weight(model, slot).float()).square().sum())
        return total

    assert error("best") < error("max")


def test_a_layer_that_cannot_take_the_format_is_left_and_named(tmp_path: Path) -> None:
    source = write_tiny_model("gpt2", tmp_path / "model")

    with pytest.raises(InputError, match=r"some layer must be able to take w4a8_awq.*Conv1D"):
        compress(source, tmp_path / "out", fmt=W4A8)
    assert not (tmp_path / "out").exists()


def test_patterns_leave_layers_as_they_are(tmp_path: Path) -> None:
    source = write_tiny_model("llama", tmp_path / "model")

    written = compress(source, tmp_path / "out", fmt=W4A8, exclude=["*.down_proj"])

    stored, original = tensors_of(tmp_path / "out"), tensors_of(source)
    kept = [name for name in original if name.endswith("down_proj.weight")]
    assert kept
    assert all(torch.equal(stored[name], original[name]) for name in kept)
    assert written["effective_bits"] == pytest.approx(4.25)


def test_a_head_that_is_tied_is_left_and_said(tmp_path: Path) -> None:
    source = write_tiny_model("gemma3", tmp_path / "model")
    assert json.loads((source / "config.json").read_text()).get("tie_word_embeddings", True)

    written = compress(source, tmp_path / "out", fmt="fp8_pc_pt", include=["lm_head"])

    assert "tied to the embedding" in written["left"]["lm_head"]
    assert "lm_head" not in compress(source, tmp_path / "plain", fmt="fp8_pc_pt")["left"]


def test_a_format_that_quantises_nothing_is_refused(tmp_path: Path) -> None:
    source = write_tiny_model("llama", tmp_path / "model")

    with pytest.raises(InputError, match=r"needs a format that quantises, got none"):
        compress(source, tmp_path / "out", fmt="none")


@pytest.mark.parametrize(
    "entry", [{"shape": [7, 7]}, {"dtype": "X9"}, {"data_offsets": 5}, {"data_offsets": None}]
)
def test_a_damaged_header_is_named_and_nothing_is_left(
    entry: dict[str, object], tmp_path: Path
) -> None:
    source = write_tiny_model("llama", tmp_path / "model")
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"].update(entry)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])

    with pytest.raises(ModelError, match=r"model\.safetensors is damaged.*fetch it again"):
        compress(source, tmp_path / "out", fmt="fp8_pc_pt")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_not_finite_weights_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    source = write_tiny_model("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"finite.*q_proj"):
        compress(source, tmp_path / "out", fmt=W4A8)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_matrix_is_named(tmp_path: Path) -> None:
    source = write_tiny_model("llama", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ExportError, match=f"has no tensor {name}"):
        compress(source, tmp_path / "out", fmt=W4A8)


def test_what_the_disk_changed_is_found_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_model("llama", tmp_path / "model")
    flush = shards.save_file

    def damaged(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        name = next(name for name in tensors if name.endswith("k_proj.weight_packed"))
        flush({**tensors, name: tensors[name] ^ 1}, path, metadata)

    monkeypatch.setattr(shards, "save_file", damaged)

    with pytest.raises(VerificationError, match=r"k_proj.weight_packed differs"):
        compress(source, tmp_path / "out", fmt=W4A8)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_format_that_no_container_holds_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match=r"none has a place for int4_dq; search it to measure it"):
        compress(tmp_path / "absent", tmp_path / "out", fmt="int4_dq", container="modelopt")


@pytest.mark.parametrize(
    ("fmt", "calibration", "message"),
    [
        ("int4_awq", "gptq", r"calibration gptq of int4_awq needs data.*--calib"),
        ("int4_awq", "awq", r"calibration awq of int4_awq needs data"),
        ("fp8_pc_pt", "awq", r"names awq, which none of the formats fp8_pc_pt can take"),
        ("int4_awq", "mse+percentile:99", r"names percentile, which none"),
    ],
)
def test_a_calibration_by_name_that_would_not_be_done_is_refused(
    fmt: str, calibration: str, message: str, tmp_path: Path
) -> None:
    source = write_tiny_model("llama", tmp_path / "model")

    with pytest.raises(InputError, match=message):
        compress(source, tmp_path / "out", fmt=fmt, calibration=calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
