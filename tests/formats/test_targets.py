"""Engines, hardware and formats: picked cells of the published matrix, names, best containers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import product

import pytest

from autoq.errors import InputError, UnknownNameError
from autoq.formats import (
    ENGINES,
    FORMATS,
    HARDWARE,
    Container,
    Verdict,
    all_supports,
    containers_for,
    feasible_formats,
    offered_formats,
    parse_target,
    reasons,
    support,
)
from autoq.formats._support import SUPPORT

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
HELD_BY_COMPRESSED = set(FORMATS) - {"nvfp4_svdquant", "int4_dq"}

# target, container, format, how it runs, words of the reason
CELLS = [
    ("vllm:h200", MODELOPT, "fp8", "native", "FP8 matrix units"),
    ("vllm:h200", MODELOPT, "nvfp4", "weight-only", "no FP4 matrix units before 10.0"),
    ("vllm:h200", MODELOPT, "w4a8_awq", "no", "stops at the layer's scales"),
    ("vllm:h200", COMPRESSED, "w4a8_awq", "native", "INT4 x FP8 kernel"),
    ("vllm:b200", MODELOPT, "nvfp4", "native", "FP4 matrix units"),
    ("vllm:b200", COMPRESSED, "w4a8_awq", "no", "for 9.0 (Hopper) alone"),
    ("vllm:l40s", COMPRESSED, "w4a8_awq", "no", "for 9.0 (Hopper) alone"),
    ("vllm:a100", MODELOPT, "fp8", "weight-only", "no FP8 matrix units before 8.9"),
    ("vllm:t4", MODELOPT, "fp8", "no", "from 8.0 on"),
    ("vllm:t4", COMPRESSED, "fp8", "weight-only", "no FP8 matrix units before 8.9"),
    ("vllm:t4", MODELOPT, "nvfp4", "weight-only", "no FP4 matrix units"),
    ("vllm:cpu", MODELOPT, "fp8", "no", "not looked into"),
    ("sglang:a100", MODELOPT, "fp8", "no", "from 8.9 on"),
    ("sglang:a100", COMPRESSED, "fp8", "weight-only", "no FP8 matrix units"),
    ("sglang:h100", MODELOPT, "nvfp4", "weight-only", "no FP4 matrix units"),
    ("sglang:h100", COMPRESSED, "w4a8_awq", "no", "for experts only"),
    ("sglang:t4", COMPRESSED, "none", "no", "8.0 or newer"),
    ("sglang:b300", COMPRESSED, "nvfp4", "native", "FP4 matrix units"),
    ("tensorrt-llm:h100", MODELOPT, "w4a8_awq", "native", "INT4 x FP8 kernel"),
    ("tensorrt-llm:l40s", MODELOPT, "w4a8_awq", "native", "INT4 x FP8 kernel"),
    ("tensorrt-llm:b200", MODELOPT, "w4a8_awq", "no", "Blackwell"),
    ("tensorrt-llm:h100", MODELOPT, "nvfp4", "no", "development sources"),
    ("tensorrt-llm:rtx5090", MODELOPT, "nvfp4", "native", "FP4 matrix units"),
    ("tensorrt-llm:a100", MODELOPT, "fp8", "no", "from 8.9 on"),
    ("tensorrt-llm:b200", COMPRESSED, "fp8", "no", "one per tensor"),
    ("tensorrt-llm:b200", COMPRESSED, "nvfp4", "no", "released"),
    ("transformers:cpu", MODELOPT, "fp8", "no", "nonsense without an error"),
    ("transformers:h100", MODELOPT, "nvfp4", "no", "no reader"),
    ("transformers:cpu", COMPRESSED, "w4a8_awq", "emulated", "the model's dtype"),
    ("transformers:a100", COMPRESSED, "nvfp4", "emulated", "the model's dtype"),
    ("vllm:h100", MODELOPT, "fp8_pc_pt", "native", "FP8 matrix units"),
    ("vllm:a100", COMPRESSED, "fp8_pc_pt", "weight-only", "no FP8 matrix units"),
    ("sglang:h100", MODELOPT, "fp8_pc_pt", "no", "unquantised without an error"),
    ("sglang:h100", COMPRESSED, "fp8_pc_pt", "native", "FP8 matrix units"),
    ("tensorrt-llm:h200", COMPRESSED, "fp8_pc_pt", "native", "FP8 matrix units"),
    ("tensorrt-llm:b200", MODELOPT, "fp8_pc_pt", "no", "on 9.0 alone"),
    ("vllm:b200", MODELOPT, "fp8_block", "native", "FP8 matrix units"),
    ("sglang:b200", MODELOPT, "fp8_block", "no", "under another name"),
    ("tensorrt-llm:h100", MODELOPT, "fp8_block", "no", "that one format only"),
    ("tensorrt-llm:h100", COMPRESSED, "fp8_block", "native", "FP8 matrix units"),
    ("transformers:cpu", MODELOPT, "fp8_block", "no", "nonsense without an error"),
    ("vllm:b200", MODELOPT, "mxfp8", "native", "a power of two per 32"),
    ("vllm:h100", MODELOPT, "mxfp8", "weight-only", "widened"),
    ("vllm:t4", MODELOPT, "mxfp8", "no", "from 8.0 on"),
    ("vllm:t4", COMPRESSED, "mxfp8", "weight-only", "widened"),
    ("sglang:b200", MODELOPT, "mxfp8", "no", "that one format only"),
    ("tensorrt-llm:b200", MODELOPT, "mxfp8", "no", "development sources"),
    ("vllm:b200", COMPRESSED, "mxfp4", "native", "a power of two per 32"),
    ("vllm:b200", MODELOPT, "mxfp4", "no", "stops at the layer's scales"),
    ("sglang:b200", COMPRESSED, "mxfp4", "no", "experts only"),
    ("transformers:cpu", COMPRESSED, "mxfp4", "emulated", "the model's dtype"),
    ("transformers:cpu", MODELOPT, "none", "native", "as the model stores it"),
    ("vllm:h200", MODELOPT, "int4_awq", "no", "stops at the layer's scales"),
    ("vllm:h200", MODELOPT, "nvfp4", "weight-only", "rounds inputs to FP8"),
    ("vllm:t4", COMPRESSED, "int4_awq", "native", "inputs stay 16-bit, as the format says"),
    ("sglang:b200", COMPRESSED, "int4_awq", "native", "inputs stay 16-bit"),
    ("tensorrt-llm:h100", MODELOPT, "int4_awq", "native", "inputs stay 16-bit"),
    ("tensorrt-llm:b200", MODELOPT, "int4_awq", "no", "8.0, 8.9 and 9.0"),
    ("tensorrt-llm:h100", COMPRESSED, "int4_awq", "no", "W4A16_AWQ is modelopt's"),
    ("vllm:h200", MODELOPT, "nvfp4_wo", "native", "inputs stay 16-bit"),
    ("tensorrt-llm:b200", MODELOPT, "nvfp4_wo", "no", "in no release"),
    ("vllm:b200", MODELOPT, "nvfp4_svdquant", "no", "and stops while it loads"),
    ("tensorrt-llm:b200", MODELOPT, "nvfp4_svdquant", "no", "of language models"),
    ("transformers:cpu", COMPRESSED, "nvfp4_svdquant", "no", "no place for a branch"),
    ("vllm:h200", COMPRESSED, "int4_dq", "no", "scales in 8 bits under a second level"),
    ("vllm:t4", COMPRESSED, "int8_sq", "native", "INT8 matrix units"),
    ("vllm:h200", MODELOPT, "int8_sq", "no", "knows no INT8"),
    ("vllm:b200", COMPRESSED, "int8_sq", "no", "Blackwell"),
    ("sglang:rtx5090", COMPRESSED, "int8_sq", "no", "Blackwell"),
    ("sglang:b200", COMPRESSED, "int8_wo", "native", "inputs stay 16-bit"),
    ("tensorrt-llm:h100", MODELOPT, "int8_sq", "no", "no INT8 layers"),
    ("transformers:cpu", COMPRESSED, "int8_sq", "emulated", "the model's dtype"),
    ("transformers:cpu", MODELOPT, "int8_sq", "no", "nonsense without an error"),
]


@pytest.mark.parametrize(("target", "container", "fmt", "verdict", "words"), CELLS)
def test_picked_cells(target, container, fmt, verdict, words):
    found = support(parse_target(target), container, fmt)
    assert found.verdict == verdict
    assert words in found.reason
    assert found.source


def test_every_cell_has_one_record():
    covered = Counter(
        (record.engine, record.container, record.format, capability)
        for record in SUPPORT
        for capability in record.capabilities
    )
    capabilities = {entry.capability for entry in HARDWARE.values()}
    wanted = set(product(ENGINES, Container, FORMATS, capabilities))
    assert set(covered) == wanted
    assert set(covered.values()) == {1}


def test_matrix_names_every_target_and_says_why():
    cells = [(str(target), entry.container, entry.format) for target, entry in all_supports()]
    assert len(set(cells)) == len(cells) == len(ENGINES) * len(HARDWARE) * 2 * len(FORMATS)
    assert all(entry.reason and entry.source for _, entry in all_supports())


@pytest.mark.parametrize(
    ("target", "container", "formats"),
    [
        (
            "vllm:h200",
            MODELOPT,
            {"fp8", "nvfp4", "nvfp4_wo", "fp8_pc_pt", "fp8_block", "mxfp8", "none"},
        ),
        ("vllm:h200", COMPRESSED, HELD_BY_COMPRESSED),
        ("vllm:b200", COMPRESSED, HELD_BY_COMPRESSED - {"w4a8_awq", "int8_sq"}),
        ("sglang:a100", MODELOPT, {"nvfp4", "nvfp4_wo", "none"}),
        ("tensorrt-llm:a100", MODELOPT, {"int4_awq", "none"}),
        (
            "tensorrt-llm:h100",
            MODELOPT,
            {"fp8", "w4a8_awq", "int4_awq", "fp8_pc_pt", "none"},
        ),
        ("tensorrt-llm:h100", COMPRESSED, {"fp8_pc_pt", "fp8_block", "none"}),
        ("transformers:cpu", COMPRESSED, HELD_BY_COMPRESSED),
        ("vllm:cpu", COMPRESSED, set()),
    ],
)
def test_feasible_formats_and_reasons_share_the_formats_out(target, container, formats):
    parsed = parse_target(target)
    assert set(feasible_formats(parsed, container)) == formats
    assert set(reasons(parsed, container)) == set(FORMATS) - formats


@pytest.mark.parametrize(
    ("target", "container", "formats"),
    [
        ("vllm:h200", MODELOPT, ["fp8", "nvfp4"]),
        ("vllm:h200", COMPRESSED, ["fp8", "nvfp4", "w4a8_awq"]),
        ("sglang:a100", MODELOPT, ["nvfp4"]),
        # Nothing else runs there.
        ("tensorrt-llm:a100", MODELOPT, ["int4_awq"]),
        ("vllm:cpu", COMPRESSED, []),
    ],
)
def test_some_formats_are_offered_only_to_those_who_name_them(target, container, formats):
    assert list(offered_formats(parse_target(target), container)) == formats


@pytest.mark.parametrize(
    ("target", "formats", "containers"),
    [
        # One format more than modelopt's.
        ("vllm:h200", None, [COMPRESSED, MODELOPT]),
        # As many of each kind: the order of the containers counts.
        ("vllm:b200", None, [MODELOPT, COMPRESSED]),
        ("vllm:h200", ["fp8", "nvfp4"], [MODELOPT, COMPRESSED]),
        ("vllm:h200", ["fp8", "w4a8_awq"], [COMPRESSED]),
        # From compressed-tensors it runs only what is for those who name it.
        ("tensorrt-llm:h100", None, [MODELOPT, COMPRESSED]),
        ("tensorrt-llm:h100", ["w4a8_awq", "none"], [MODELOPT]),
        ("tensorrt-llm:h100", ["nvfp4"], []),
        ("transformers:cpu", None, [COMPRESSED]),
        ("tensorrt-llm:a100", None, [MODELOPT]),
        ("vllm:h100", ["int8_sq", "nvfp4"], [COMPRESSED]),
        ("vllm:b200", ["int8_sq"], []),
        ("vllm:cpu", None, []),
    ],
)
def test_best_container_first(target, formats, containers):
    assert list(containers_for(parse_target(target), formats)) == containers


def test_what_engines_ask_for_beyond_the_format():
    stricter = {
        (record.engine, record.format): record.out_features_multiple
        for record in SUPPORT
        if record.out_features_multiple != 1
    }
    block = {(engine, "fp8_block"): 128 for engine in ("vllm", "tensorrt-llm")}
    assert stricter == {("vllm", "w4a8_awq"): 128, **block}
    assert all(record.verdict.runs for record in SUPPORT if record.out_features_multiple != 1)
    without_experts = [record for record in SUPPORT if not record.runs_experts]
    assert {(entry.engine, entry.container, entry.format) for entry in without_experts} == {
        ("vllm", MODELOPT, "fp8_block"),
        ("vllm", MODELOPT, "fp8_pc_pt"),
        ("vllm", COMPRESSED, "int8_wo"),
    }
    assert {record.format for record in SUPPORT if record.counts_fused_rows} == {"w4a8_awq"}


def test_what_differs_between_one_format_and_several():
    differing = {
        (record.engine, record.format, capability): (record.alone, record.mixed)
        for record in SUPPORT
        for capability in record.capabilities
        if record.alone or record.mixed
    }
    formats_on_turing = {fmt for engine, fmt, capability in differing if engine == "vllm"}
    assert formats_on_turing == {"fp8", "fp8_pc_pt", "fp8_block", "mxfp8"}
    turing = support(parse_target("vllm:t4"), MODELOPT, "fp8")
    assert not turing.within(is_mixed=False)[0].runs
    assert turing.within(is_mixed=True)[0] == "weight-only"
    blackwell = support(parse_target("sglang:b200"), MODELOPT, "mxfp8")
    assert blackwell.within(is_mixed=False)[0] == "native"
    assert not blackwell.within(is_mixed=True)[0].runs


def test_a_misfit_is_said_of_experts_first_and_then_of_rows():
    blocks = support(parse_target("vllm:h200"), COMPRESSED, "fp8_block")
    assert blocks.misfit(256, is_expert=True) is None
    assert blocks.misfit(200, is_expert=False) == (
        "needs out_features divisible by 128 for fp8_block, got 200"
    )
    rows = support(parse_target("vllm:h200"), MODELOPT, "fp8_pc_pt")
    assert rows.misfit(200, is_expert=False) is None
    assert "runs no experts of fp8_pc_pt from modelopt checkpoints" in rows.misfit(
        128, is_expert=True
    )


@pytest.mark.parametrize("name", HARDWARE)
def test_generation_and_product_name_agree(name):
    entry = HARDWARE[name]
    if entry.capability is None:
        assert (entry.name, entry.generation) == ("cpu", "cpu")
    else:
        digits = f"{entry.capability:d}"
        assert entry.generation == f"{digits[:-1]}.{digits[-1]}"
        assert f"sm_{entry.capability}" in HARDWARE


def test_targets_are_read_whatever_their_case():
    target = parse_target(" vLLM:H200 ")
    assert str(target) == "vllm:h200"
    assert target.hardware.capability == 90


@pytest.mark.parametrize("text", ["vllm", "", ":", ":h200", "vllm:", "h200"])
def test_what_is_no_target_is_refused_with_its_shape(text):
    with pytest.raises(InputError, match=r"ENGINE:HARDWARE, got .* vllm:h200"):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vlm:h200", "no engine named 'vlm' (did you mean vllm"),
        ("trtllm:b200", "did you mean tensorrt-llm"),
        ("vllm:h2000", "no hardware named 'h2000' (did you mean h200"),
        ("vllm:mi300", "known: a10, a100"),
    ],
)
def test_near_misses_are_named(text, words):
    with pytest.raises(UnknownNameError) as caught:
        parse_target(text)
    assert words in str(caught.value)


def test_unknown_formats_are_refused_by_name():
    with pytest.raises(UnknownNameError, match="did you mean nvfp4"):
        reasons(parse_target("vllm:h200"), MODELOPT, ["nvfp5"])


def test_a_format_without_a_record_runs_nowhere(monkeypatch):
    mine = dataclasses.replace(FORMATS["fp8"], name="mine")
    monkeypatch.setitem(FORMATS._entries, "mine", mine)
    found = support(parse_target("vllm:h200"), MODELOPT, "mine")
    assert found.verdict is Verdict.NO
    assert found.reason == "nothing is known of mine in vLLM 0.33"
