"""What `autoq verify` says of key/value caches: every reader has a rule of its own.

Of vLLM and SGLang `test_engine_golden.py` compares the same with their own code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autoq.cli import app
from autoq.export._types import Spelling
from autoq.export.checkup import Outcome, check_checkpoint
from autoq.formats import FormatName, parse_target
from autoq.layers import Container
from tests.export.engine_cases import LLAMA, MIXED, Case, change_manifests, write_case

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
FP8 = FormatName("fp8")
SILENT = "SILENTLY UNQUANTISED"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(container: Container, kind: str, spelling: Spelling = Spelling.OWN) -> Path:
        fmt = FP8 if spelling is Spelling.OWN else FormatName("fp8_block")
        return write_case(Case(LLAMA, container, kind, fmt, spelling), tmp_path / "out")

    return make


def found(folder: Path, target: str) -> Outcome:
    report = check_checkpoint(folder, parse_target(target))
    assert report.cache is not None
    return report.cache.outcomes[target]


@pytest.mark.parametrize(
    ("container", "kind", "target", "does", "reason"),
    [
        (MODELOPT, "fp8 cache", "vllm:h100", "native", "under the stored scales"),
        (MODELOPT, "fp8 cache", "sglang:h100", "native", "under the stored scales"),
        (MODELOPT, "fp8 cache", "tensorrt-llm:h100", "native", "under a scale of 1"),
        (MODELOPT, "fp8 cache", "transformers:cpu", SILENT, "no reader of modelopt"),
        (MODELOPT, "fp8 cache", "vllm:a100", "refuses", "was not looked into"),
        (MODELOPT, "fp8 cache by name alone", "vllm:h100", "native", "under a scale of 1"),
        (MODELOPT, "fp8 cache by name alone", "sglang:h100", "native", "the stored scales"),
        (MODELOPT, "fp8 cache, perhaps dynamic", "vllm:h100", "unquantised", "said not to be"),
        (MODELOPT, "fp8 cache, perhaps dynamic", "sglang:h100", "native", "the stored scales"),
        (MODELOPT, "nvfp4 cache", "sglang:b200", SILENT, "takes FP8 alone"),
        (MODELOPT, "nvfp4 cache", "vllm:b200", "native", "under a scale of 1"),
        (MODELOPT, "nvfp4 cache", "tensorrt-llm:b200", "native", "six times"),
        (COMPRESSED, "fp8 cache", "vllm:h100", "native", "under the stored scales"),
        (COMPRESSED, "fp8 cache", "transformers:cpu", "emulated", "rounded as the format says"),
        (COMPRESSED, "fp8 cache", "tensorrt-llm:h100", "refuses", "was not looked into"),
        (COMPRESSED, "int8 cache", "vllm:h100", "refuses", "not static, symmetric FP8"),
        (COMPRESSED, "int8 cache", "sglang:h100", "unquantised", "warns of others"),
        (COMPRESSED, "int8 cache", "transformers:cpu", "emulated", "rounded as the format says"),
    ],
)
def test_what_a_target_does(
    write: Write, container: Container, kind: str, target: str, does: str, reason: str
) -> None:
    outcome = found(write(container, kind), target)
    assert outcome.does == does
    assert reason in outcome.reason
    assert outcome.runs == (does in ("native", "emulated"))


@pytest.mark.parametrize(
    ("target", "does"),
    [("vllm:h100", SILENT), ("sglang:h100", "native"), ("transformers:cpu", SILENT)],
)
def test_of_fp8_checkpoints_sglang_alone_reads_a_cache(
    write: Write, target: str, does: str
) -> None:
    folder = write(COMPRESSED, "cache promised", Spelling.TRANSFORMERS_FP8)
    assert found(folder, target).does == does


@pytest.mark.parametrize("container", Container)
def test_without_a_promise_nothing_is_said(write: Write, container: Container) -> None:
    report = check_checkpoint(write(container, MIXED))
    assert report.cache is None
    assert report.faults == ()


def test_tensorrt_llm_looks_in_the_second_manifest(write: Write) -> None:
    folder = write(MODELOPT, "fp8 cache")
    path = folder / "hf_quant_config.json"
    content = json.loads(path.read_text())
    content["quantization"]["kv_cache_quant_algo"] = None
    path.write_text(json.dumps(content))
    assert found(folder, "tensorrt-llm:h100").does == SILENT
    assert found(folder, "vllm:h100").does == "native"
    report = check_checkpoint(folder)
    assert any("states fp8 key/value cache" in fault for fault in report.faults), report.faults

    path.unlink()
    assert found(folder, "tensorrt-llm:h100").does == "native"


def test_transformers_takes_0_for_scales_under_other_names(write: Write) -> None:
    def promise(manifest: dict[str, Any]) -> None:
        numbers = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        manifest["kv_cache_scheme"] = {**numbers, "symmetric": True, "dynamic": False}

    folder = change_of(write(COMPRESSED, MIXED), promise)
    outcome = found(folder, "transformers:cpu")
    assert (outcome.does, outcome.runs) == ("COMPUTES GARBAGE", False)
    assert "scales that are not stored" in outcome.reason
    assert found(folder, "vllm:h100").runs


def change_of(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    change_manifests(folder, change)
    return folder


def test_a_target_that_does_not_keep_it_is_no_runner(write: Write) -> None:
    folder = write(MODELOPT, "nvfp4 cache")
    runner = CliRunner()
    result = runner.invoke(app, ["verify", str(folder), "--target", "sglang:b200"])
    assert result.exit_code == 3, result.output
    assert "key/value cache, stated as nvfp4:" in result.output
    assert "-> sglang:b200: SILENTLY UNQUANTISED: SGLang takes FP8 alone" in result.output
    assert "none runs every layer and keeps the key/value cache" in result.output

    result = runner.invoke(app, ["verify", str(folder), "--json"])
    stated = json.loads(result.output)["kv_cache"]
    assert stated["stored"] == "nvfp4"
    assert stated["outcomes"]["sglang"]["runs"] is False
    assert stated["outcomes"]["vllm"]["does"] == "native on 8.0 to 12.0"
    assert result.exit_code == 0


@pytest.mark.parametrize("bits", [[8], {"of": 8}, "8", None])
@pytest.mark.parametrize("container", Container)
def test_bits_that_are_no_number_are_of_no_format(
    write: Write, container: Container, bits: object
) -> None:
    scheme = {"type": "float", "num_bits": bits, "dynamic": False}
    folder = write(container, "fp8 cache")
    change_of(folder, lambda given: given.update(kv_cache_scheme=scheme))
    report = check_checkpoint(folder)
    assert report.cache is not None
    assert not report.cache.outcomes["vllm"].runs
