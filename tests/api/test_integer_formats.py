"""INT8 and weights alone, beside each other in one search: chosen, exported, loaded, aimed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autoq
from autoq.errors import ExportError, InputError
from autoq.layers.packed import PackedLinear
from autoq.progress import SilentProgress

NAMES = ("int4_awq", "int8_sq", "int8_wo", "nvfp4_wo")


class Noting(SilentProgress):
    """Keeps what is said aloud."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("method", ["best", "scales", "max"])
def test_they_are_searched_together_and_exported_where_all_of_them_fit(
    method: str, llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    progress = Noting()
    arguments = {**quick, "formats": (*NAMES, "fp8"), "effective_bits": 6.5, "progress": progress}
    out = tmp_path / "out"
    study = autoq.search(llama_folder, **arguments, calibration=method, export=out)
    summary = study.summary()
    assert summary["export"]["container"] == "compressed-tensors"
    assert summary["effective_bits"] <= 6.5
    assert set(summary["assignment"].values()) <= {*NAMES, "fp8", "none"}
    assert "aiming at compressed-tensors, the container that holds these formats" in progress.notes
    model = autoq.load(out)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == sum(fmt != "none" for fmt in summary["assignment"].values())
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize("fmt", NAMES)
def test_each_alone_loses_what_its_bits_suggest(fmt: str, llama_folder: Path, quick: Any) -> None:
    bits = 8.5 if fmt.startswith("int8") else 4.75
    study = autoq.search(
        llama_folder, **{**quick, "formats": (fmt, "none"), "effective_bits": bits}
    )
    assert fmt in study.summary()["assignment"].values()
    # Measured 1.6e-3 (int8_sq), 7e-4 (int8_wo), 0.05 (nvfp4_wo) and 0.06 (int4_awq) on noise of
    # weights, where everything matters: eight bits lose a thirtieth of what four lose.
    assert 0 < study.summary()["measured"]["kl_divergence"] < (5e-3 if bits > 8 else 0.15)


def test_a_container_that_cannot_hold_one_is_refused_with_what_can(
    llama_folder: Path, quick: Any
) -> None:
    with pytest.raises(ExportError, match=r"can hold no layer .* int8_sq.*compressed-tensors"):
        autoq.search(llama_folder, **{**quick, "formats": ("int8_sq",)}, container="modelopt")


@pytest.mark.parametrize(
    ("target", "fmt", "words"),
    [
        ("vllm:b200", "int8_sq", "Blackwell"),
        ("tensorrt-llm:h100", "int8_wo", "no INT8 layers"),
        ("tensorrt-llm:b200", "int4_awq", "8.0, 8.9 and 9.0"),
        ("tensorrt-llm:b200", "nvfp4_wo", "in no release"),
    ],
)
def test_a_target_without_the_format_is_refused_with_the_reason(
    target: str, fmt: str, words: str, llama_folder: Path, quick: Any
) -> None:
    with pytest.raises(InputError, match=words):
        autoq.search(llama_folder, **{**quick, "formats": (fmt,)}, target=target)
