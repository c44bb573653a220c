"""A study's plan written from safetensors to safetensors: the files of an export, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autoq
from autoq.api import study_data, task
from autoq.api._stored_calibration import CalibrationInStore
from autoq.api.exports.streamed import export_plan_streamed
from autoq.errors import ExportError, InputError, ModelError
from autoq.export._read_back import same_bits
from autoq.formats import Container, FormatName
from autoq.progress import SilentProgress
from autoq.testing.tiny_models import write_family_model

MODELOPT, COMPRESSED = "modelopt", "compressed-tensors"


def search(folder: Path, quick: Any, **options: Any) -> Any:
    return autoq.search(folder, **{**quick, "measure": False, **options})


def with_outliers(source: Path) -> Path:
    """Channels of every norm before a layer made large, which an input scale pays for."""
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::16] *= 40
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def hashes(written: dict[str, Any]) -> dict[str, str]:
    return {file["path"]: file["sha256"] for file in written["files"]}


def forbid_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model is not to be in memory")

    monkeypatch.setattr(task, "load", refuse)
    monkeypatch.setattr(study_data.StudyData, "calibration", property(refuse))


@pytest.mark.parametrize(
    ("family", "container", "formats", "bits"),
    [
        ("llama", MODELOPT, ("fp8", "nvfp4"), 6.0),
        ("llama", MODELOPT, ("w4a8_awq", "int4_awq", "fp8"), 5.0),
        ("llama", COMPRESSED, ("int8_sq", "int4_awq"), 5.0),
        ("gemma3", MODELOPT, ("fp8", "nvfp4"), 5.0),  # a tied head
        ("gpt2", MODELOPT, ("nvfp4", "fp8"), 6.0),  # Conv1D, and a tied head
        ("bloom", MODELOPT, ("fp8", "nvfp4"), 5.0),
        ("mixtral", MODELOPT, ("fp8", "nvfp4", "none"), 6.0),  # experts of several files' tensors
    ],
)
def test_every_file_is_that_of_an_export(
    family: str,
    container: str,
    formats: tuple[str, ...],
    bits: float,
    quick: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = with_outliers(write_family_model(family, tmp_path / "model"))
    study = search(folder, quick, formats=formats, container=container, effective_bits=bits)
    whole = study.export(tmp_path / "whole", check_logits=False)

    reopened = autoq.open_study(study.name, quick["store"])
    forbid_the_model(monkeypatch)
    streamed = reopened.export(tmp_path / "streamed", streamed=True)

    assert hashes(streamed) == hashes(whole)
    for key in ("plan", "container", "effective_bits", "stored_bytes"):
        assert streamed[key] == whole[key]
    for key in ("quantized_matrices", "unquantized_tensors", "container"):
        assert streamed["verification"][key] == whole["verification"][key]
    assert [(e.container, str(e.status)) for e in study.store.exports(study.id)] == [
        (container, "complete")
    ] * 2


def test_scales_that_the_container_lacks_are_taken_out_of_both_alike(
    quick: Any, tmp_path: Path
) -> None:
    folder = with_outliers(write_family_model("llama", tmp_path / "model"))
    study = search(folder, quick, formats=("int4_awq",), effective_bits=4.5, container=MODELOPT)
    scales = [entry.pre_quant_scale for entry in study.calibration.values()]
    assert any(scale is not None for scale in scales)
    options = {"container": COMPRESSED, "check_logits": False}
    whole = study.export(tmp_path / "whole", **options)
    streamed = study.export(tmp_path / "streamed", streamed=True, **options)
    assert hashes(streamed) == hashes(whole)


def test_the_words_of_transformers_and_a_cache_are_written_alike(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    blocks = search(
        llama_folder,
        quick,
        formats=("fp8_block", "none"),
        effective_bits=9.0,
        container=COMPRESSED,
    )
    options = {"container": "transformers-fp8", "check_logits": False}
    whole = blocks.export(tmp_path / "whole", **options)
    streamed = blocks.export(tmp_path / "streamed", streamed=True, **options)
    assert hashes(streamed) == hashes(whole)
    assert streamed["container"] == streamed["verification"]["container"] == "transformers-fp8"

    cached = search(llama_folder, quick, kv_formats=("fp8",))
    whole = cached.export(tmp_path / "whole-kv", check_logits=False)
    streamed = cached.export(tmp_path / "streamed-kv", streamed=True)
    assert hashes(streamed) == hashes(whole)
    manifest = json.loads((tmp_path / "streamed-kv" / "config.json").read_text())
    assert manifest["quantization_config"]["kv_cache_quant_algo"] == "FP8"


def test_shards_are_those_of_the_same_limit(llama_folder: Path, quick: Any, tmp_path: Path) -> None:
    study = search(llama_folder, quick)
    plan = study.plan()
    written = []
    for name, limit in (("one", 100_000), ("two", 100_000)):
        with study.store.lease(study.id):
            written.append(
                export_plan_streamed(
                    study,
                    plan,
                    tmp_path / name,
                    Container.MODELOPT,
                    overwrite=False,
                    progress=SilentProgress(),
                    max_shard_bytes=limit,
                )
            )
    assert hashes(written[0]) == hashes(written[1])
    assert len([name for name in hashes(written[0]) if name.endswith(".safetensors")]) > 2
    whole = study.export(tmp_path / "whole", check_logits=False)
    assert whole["stored_bytes"] < written[0]["stored_bytes"]  # of one file's header only
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    pieces: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "one").glob("*.safetensors"):
        pieces.update(load_file(file))
    assert pieces.keys() == tensors.keys()
    assert all(same_bits(pieces[name], tensors[name]) for name in tensors)


def test_entries_in_the_store_are_those_of_the_study(quick: Any, tmp_path: Path) -> None:
    folder = with_outliers(write_family_model("llama", tmp_path / "model"))
    study = search(folder, quick, formats=("nvfp4", "nvfp4_svdquant"), effective_bits=5.5)
    table = CalibrationInStore(study)
    assert list(table) == list(study.calibration)
    assert len(table) == len(study.calibration)
    seen = set()
    for key, expected in study.calibration.items():
        found = table[key]
        assert (found.weight_amax, found.input_amax, found.folds_into, found.input_rows) == (
            expected.weight_amax,
            expected.input_amax,
            expected.folds_into,
            expected.input_rows,
        )
        for name in ("pre_quant_scale", "importance", "codes"):
            one, other = getattr(found, name), getattr(expected, name)
            assert (one is None) == (other is None)
            if one is not None:
                seen.add(name)
                assert torch.equal(one, other)
        if expected.low_rank is not None:
            seen.add("low_rank")
            assert found.low_rank is not None
            factors = found.low_rank.tensors()
            for part, factor in expected.low_rank.tensors().items():
                assert torch.equal(factors[part], factor)
    assert seen == {"pre_quant_scale", "importance", "codes", "low_rank"}
    with pytest.raises(KeyError):
        table[next(iter(table))[0], FormatName("fp8")]


def test_refusals_name_the_way_out(llama_folder: Path, quick: Any, tmp_path: Path) -> None:
    study = search(llama_folder, quick)
    with pytest.raises(InputError, match="onnx is written from a model in memory"):
        study.export(tmp_path / "out", container="onnx", streamed=True)
    narrow = search(llama_folder, {**quick, "store": f"sqlite:///{tmp_path}/b.db"}, dtype="float16")
    with pytest.raises(ExportError, match="rounded bfloat16 ones to float16"):
        narrow.export(tmp_path / "out", streamed=True)


def test_a_folder_that_changed_is_refused(quick: Any, tmp_path: Path) -> None:
    folder = write_family_model("llama", tmp_path / "model")
    study = search(folder, quick)
    with_outliers(folder)
    with pytest.raises(ModelError, match="fingerprints differ"):
        study.export(tmp_path / "out", streamed=True)
    assert not (tmp_path / "out").exists()
