"""A plan of FP8 blocks as transformers' own fp8 checkpoint: recorded, loaded, looked at, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import autoq
from autoq.errors import ExportError
from autoq.export.checkup import check_checkpoint
from autoq.formats import Container, parse_target
from autoq.layers.packed import PackedLinear


def test_a_searched_plan_is_written_loaded_and_looked_at(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    arguments = {**quick, "formats": ("fp8_block", "none"), "effective_bits": 9.0}
    study = autoq.search(llama_folder, **arguments, container="compressed-tensors")
    out = tmp_path / "out"
    written = study.export(out, container="transformers-fp8")
    assert written["container"] == written["verification"]["container"] == "transformers-fp8"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "fp8"
    matrices = written["verification"]["quantized_matrices"]
    assert written["verification"]["transformers_weights"] == matrices > 0
    record = study.store.exports(study.id)[-1]
    assert (record.container, record.status.value) == ("transformers-fp8", "complete")

    model = autoq.load(out)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == matrices
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()

    report = check_checkpoint(out)
    assert (report.faults, report.container) == ((), Container.COMPRESSED_TENSORS)
    assert report.runners == ["transformers"]  # others want whole blocks, and k_proj has 64 rows
    for engine in ("vllm", "tensorrt-llm"):
        hopper = check_checkpoint(out, parse_target(f"{engine}:h200"))
        does = {layer.name: layer.outcomes[f"{engine}:h200"].does for layer in hopper.layers}
        narrow = {name for name in does if name.endswith(("k_proj", "v_proj"))}
        assert does["lm_head"] == "unquantised"
        assert {does[name] for name in narrow} == {"refuses"}
        assert sum(word == "native" for word in does.values()) == matrices - len(narrow)
    sglang = check_checkpoint(out, parse_target("sglang:h200"))
    words = [layer.outcomes["sglang:h200"].does for layer in sglang.layers]
    assert words.count("COMPUTES GARBAGE") == matrices  # its Llama class passes over the scales


def test_other_plans_are_refused(study: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="in transformers-fp8, which holds fp8_block alone"):
        study.export(tmp_path / "out", container="transformers-fp8")
    assert not (tmp_path / "out").exists()
