"""A study's plan as an ONNX graph: recorded like a checkpoint, refused before work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.api.exports import onnx as exporting_onnx
from autoq.errors import ExportError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_a_searched_plan_becomes_a_graph(
    llama_folder: Path, quick: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    formats = ("fp8", "int8_sq")  # the second with searched input scales
    study = autoq.search(
        llama_folder, **{**quick, "formats": formats, "effective_bits": 8.1}, measure=False
    )
    written = study.export(tmp_path / "out", container="onnx")
    assert written["container"] == "onnx" and (tmp_path / "out" / "model.onnx").is_file()
    checked = written["verification"]
    groups = {group.name: group.slots for group in study.model_map.groups}
    kept = [name for name, fmt in study.plan().assignment.items() if fmt != "none"]
    assert checked["quantized_matrices"] == sum(len(groups[name]) for name in kept) > 0
    assert checked["onnxruntime_products"]["relative_difference"] < 1e-4
    (record,) = study.store.exports(study.id)
    assert (record.container, record.status.value) == ("onnx", "complete")
    assert study.store.study(study.id).status.value == "done"
    with pytest.raises(ExportError, match="pass --overwrite"):
        study.export(tmp_path / "out", container="onnx")


def test_what_cannot_be_is_said_before_work(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExportError, match=r"cannot be nvfp4 in onnx.*it can hold: fp8, "):
        study.export(tmp_path / "out", container="onnx", effective_bits=5.0)
    with pytest.raises(InputError, match=r"only the container onnx .* leave with_past out"):
        study.export(tmp_path / "out", container="modelopt", with_past=True)
    monkeypatch.setattr(exporting_onnx, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="onnx, onnxscript, onnxruntime; install autoq with"):
        study.export(tmp_path / "out", container="onnx")
    assert study.store.exports(study.id) == [] and not (tmp_path / "out").exists()
