"""A study's plan as an engine checkpoint of TensorRT-LLM: recorded, and refused before work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autoq.errors import ExportError, InputError


def test_a_searched_plan_is_written_for_two_ranks(study: Any, tmp_path: Path) -> None:
    written = study.export(tmp_path / "out", container="tensorrt-llm", tp_size=2, pp_size=1)
    assert written["container"] == "tensorrt-llm"
    names = {file["path"] for file in written["files"]}
    assert {"config.json", "rank0.safetensors", "rank1.safetensors"} <= names
    groups = {group.name: group.slots for group in study.model_map.groups}
    kept = [name for name, fmt in study.plan().assignment.items() if fmt != "none"]
    checked = written["verification"]
    assert checked["ranks"] == 2
    assert checked["quantized_matrices"] == sum(len(groups[name]) for name in kept) > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["exported_by"]["study"] == study.name
    (record,) = study.store.exports(study.id)
    assert (record.container, record.status.value) == ("tensorrt-llm", "complete")
    assert study.store.study(study.id).status.value == "done"


def test_what_cannot_be_is_said_before_work(study: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="tp_size must divide the model's 4 attention heads"):
        study.export(tmp_path / "out", container="tensorrt-llm", tp_size=3)
    with pytest.raises(InputError, match="leave tp_size 2 and pp_size 1 out"):
        study.export(tmp_path / "out", container="modelopt", tp_size=2)
    assert study.store.exports(study.id) == [] and not (tmp_path / "out").exists()
