"""The whole job on a tiny folder of every architecture: search, export, read back, measure."""

from __future__ import annotations

from pathlib import Path

import pytest

import autoq
from autoq.testing.tiny_models import TINY_ARCHITECTURES, write_tiny_model

WITHOUT_COMPRESSED_TENSORS = {"gpt2", "mixtral", "qwen3_moe"}
"""Conv1D and fused experts: that container's readers do not take them."""

FP8_ONLY = {"t5"}
"""Under compressed-tensors, transformers cannot load T5's packed weights."""

CASES = [
    *((name, "modelopt") for name in TINY_ARCHITECTURES),
    *((n, "compressed-tensors") for n in TINY_ARCHITECTURES if n not in WITHOUT_COMPRESSED_TENSORS),
]


@pytest.mark.parametrize(("name", "container"), CASES)
def test_search_export_and_measure(name: str, container: str, tmp_path: Path) -> None:
    folder = write_tiny_model(name, tmp_path / "model")
    only_fp8 = name in FP8_ONLY and container == "compressed-tensors"
    study = autoq.search(
        folder,
        effective_bits=9.0 if only_fp8 else 6.0,
        formats=("fp8",) if only_fp8 else ("fp8", "nvfp4", "w4a8_awq"),
        calibration_sequences=4,
        sequence_length=32,
        batch_size=2,
        held_out_sequences=2,
        container=container,
        store=f"sqlite:///{tmp_path / 'studies.db'}",
        export=tmp_path / "out",
    )
    summary = study.summary()
    assert summary["effective_bits"] <= summary["budget"]
    assert set(summary["assignment"].values()) - {"none"}
    assert summary["export"]["verification"]["quantized_matrices"] > 0
    measured = autoq.evaluate(tmp_path / "out", reference=folder, sequence_length=32, sequences=2)
    # The checkpoint computes what was searched; a stored input scale may round otherwise.
    assert measured["metrics"]["kl_divergence"]["value"] == pytest.approx(
        summary["measured"]["kl_divergence"], rel=1e-3
    )
