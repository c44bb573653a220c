"""`autoq targets`: the matrix, one target, and what is refused."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from autoq.cli._tables import print_summary
from autoq.formats import ENGINES, FORMATS, Container, feasible_formats, parse_target
from autoq.formats.kv_cache import KV_CACHE_FORMATS
from autoq.report import report_data


def test_matrix_has_every_engine_with_a_numbered_reason_for_each_no(run):
    lines = run("targets").stdout.splitlines()
    for title in ("vllm: vLLM 0.33", "sglang: SGLang 0.5.23", "9.0: h100, h200, gh200, sm_90"):
        assert title in lines
    vllm = lines[lines.index("vllm: vLLM 0.33") : lines.index("sglang: SGLang 0.5.23")]
    (header,) = [line.split() for line in vllm if line.startswith(" format ")]
    assert header == ["format", "container", "native", "weight-only", "no"]
    nvfp4 = next(
        line.split() for line in vllm if line.split()[:2] == ["nvfp4", "compressed-tensors"]
    )
    assert nvfp4[2:8] == ["10.0", "to", "12.0", "7.5", "to", "8.9"]
    assert nvfp4[9] == "9.0"
    number = nvfp4[8].removesuffix(",")
    (reason,) = [line for line in lines if line.startswith(f"{number} ")]
    assert "no FP4 matrix units before 10.0" in reason


def test_every_number_in_the_matrix_is_explained(run):
    output = run("targets").stdout
    explained = {line.split()[0] for line in output.splitlines() if line.startswith("(")}
    tables = output[: output.index("\n(1) ")]
    used = {word.strip(",") for word in tables.split() if word.startswith("(")}
    assert used == explained
    rows = [
        line
        for line in tables.splitlines()
        if line.split()[1:2] and line.split()[1] in set(Container)
    ]
    caches = len(KV_CACHE_FORMATS) - 1  # "none" needs no word
    assert len(rows) == len(ENGINES) * (len(FORMATS) + caches) * len(Container)


def test_one_target_says_what_a_search_would_take(run):
    output = run("targets", "vllm:h200").stdout
    running = feasible_formats(parse_target("vllm:h200"), Container.COMPRESSED_TENSORS)
    named = [name for name in running if FORMATS[name].when_named]
    assert "vllm:h200: vLLM 0.33 on NVIDIA H200" in output
    assert "out_features must be divisible by 128" in " ".join(output.split())
    assert "no experts of a mixture" in " ".join(output.split())
    assert " ".join(output.split()).endswith(
        "`autoq search --target vllm:h200` aims at compressed-tensors with fp8, nvfp4, w4a8_awq, "
        f"none; --formats takes {', '.join(named)}, too"
    )
    assert run("targets", "vllm:cpu").stdout.splitlines()[-1] == "no quantised format runs there"


def test_caches_are_said_for_every_engine(run):
    output = " ".join(run("targets", "vllm:h200").stdout.split())
    assert "modelopt fp8 native kept so, under the stored scales" in output
    assert "modelopt nvfp4 native kept so by FlashInfer's attention alone" in output
    found = json.loads(run("targets", "--json").stdout)["kv_caches"]
    assert len(found) == 4 * 25 * 2 * len(KV_CACHE_FORMATS)  # engines, hardware, containers
    assert not [cell for cell in found if "nothing is known" in cell["reason"]]
    runs = {
        (cell["engine"], cell["container"], cell["format"])
        for cell in found
        if cell["runs"] and cell["hardware"] == "b200" and cell["format"] != "none"
    }
    assert runs == {
        ("vllm", "modelopt", "fp8"),
        ("vllm", "modelopt", "nvfp4"),
        ("vllm", "compressed-tensors", "fp8"),
        ("sglang", "modelopt", "fp8"),
        ("sglang", "compressed-tensors", "fp8"),
        ("tensorrt-llm", "modelopt", "fp8"),
        ("tensorrt-llm", "modelopt", "nvfp4"),
        ("transformers", "compressed-tensors", "fp8"),
        ("transformers", "compressed-tensors", "int8"),
    }


def test_json_has_one_entry_for_each_cell(run):
    everything = json.loads(run("targets", "--json").stdout)["targets"]
    assert len(everything) == 4 * 25 * 2 * len(FORMATS)  # engines, hardware, containers
    one = json.loads(run("targets", "tensorrt-llm:b200", "--json").stdout)["targets"]
    assert one == [entry for entry in everything if entry["target"] == "tensorrt-llm:b200"]
    (cell,) = [
        entry for entry in one if (entry["container"], entry["format"]) == ("modelopt", "w4a8_awq")
    ]
    assert cell == {
        "target": "tensorrt-llm:b200",
        "engine": "tensorrt-llm",
        "engine_version": "TensorRT-LLM 1.2, PyTorch backend",
        "hardware": "b200",
        "generation": "10.0",
        "container": "modelopt",
        "format": "w4a8_awq",
        "runs": False,
        "verdict": "no",
        "reason": "no engine has an INT4 x FP8 kernel for 10.0 and newer (Blackwell)",
        "out_features_multiple": 1,
        "runs_experts": True,
        "source": "TensorRT-LLM's documentation and source of about 1.2: read, not run",
    }


@pytest.mark.parametrize("target", ["vllm:h200", None])
def test_the_panel_of_a_plan_names_its_target(api, target):
    output = io.StringIO()
    data = report_data({**api.open_study(None, "").summary(), "target": target}, [])
    print_summary(Console(file=output, width=100), data)
    named = [
        line.split() for line in output.getvalue().splitlines() if line.startswith("│ target ")
    ]
    assert named == ([["│", "target", "vllm:h200", "│"]] if target else [])


def test_unknown_targets_end_with_one_line_and_code_2(run):
    result = run("targets", "vllm:h2000")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: no hardware named 'h2000' (did you mean h200")
    assert run("targets", "h200").exit_code == 2
