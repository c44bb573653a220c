"""A target restricts formats and container before the search, with the reason of each refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.api.targeting import Offer, best_offer, note_target, offers
from autoq.errors import InputError, UnknownNameError
from autoq.formats import HARDWARE, Container, FormatName, parse_target
from autoq.models.discovery import discover
from autoq.progress import SilentProgress
from autoq.search.hardware import GPUS, MatrixUnit
from autoq.testing.tiny_models import make_tiny_model

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
H200 = parse_target("vllm:h200")


def offer_of(container: Container, *formats: str, named: bool = True) -> Offer:
    return Offer(container, tuple(map(FormatName, formats)), named)


def unasked(container: Container, *formats: str) -> Offer:
    return offer_of(container, *formats, named=False)


class Noting(SilentProgress):
    """Keeps what is said aloud."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_without_a_target_nothing_changes() -> None:
    assert offers(None, None, None) == (offer_of(MODELOPT, "fp8", "nvfp4"),)
    assert offers(None, ["w4a8_awq"], "compressed-tensors") == (offer_of(COMPRESSED, "w4a8_awq"),)
    assert offers(None, ["w4a8_awq", "none"], None) == (offer_of(MODELOPT, "w4a8_awq", "none"),)


def test_formats_that_one_container_alone_holds_lead_to_it() -> None:
    assert offers(None, ["int8_sq", "fp8"], None) == (offer_of(COMPRESSED, "int8_sq", "fp8"),)
    assert offers(None, ["int8_sq"], "modelopt") == (offer_of(MODELOPT, "int8_sq"),)


@pytest.mark.parametrize(
    ("target", "formats", "container", "expected"),
    [
        (
            *("vllm:h200", None, None),
            (
                unasked(COMPRESSED, "fp8", "nvfp4", "w4a8_awq"),
                unasked(MODELOPT, "fp8", "nvfp4"),
            ),
        ),
        ("vllm:h200", None, "modelopt", (unasked(MODELOPT, "fp8", "nvfp4"),)),
        ("vllm:h200", ["w4a8_awq", "none"], None, (offer_of(COMPRESSED, "w4a8_awq", "none"),)),
        ("tensorrt-llm:h100", None, None, (unasked(MODELOPT, "fp8", "w4a8_awq"),)),
        (
            *("transformers:cpu", None, None),
            (unasked(COMPRESSED, "fp8", "nvfp4", "w4a8_awq"),),
        ),
    ],
)
def test_what_a_target_offers(target: str, formats: Any, container: Any, expected: Any) -> None:
    assert offers(parse_target(target), formats, container) == expected


@pytest.mark.parametrize(
    ("target", "formats", "container", "words"),
    [
        pytest.param(
            *("tensorrt-llm:h100", ["fp8", "nvfp4"], None),
            r"tensorrt-llm:h100 does not run nvfp4 \(nvfp4 from modelopt: released TensorRT-LLM "
            r"runs nvfp4 from 10.0 on.*\); it runs from modelopt fp8, w4a8_awq, ",
            id="format",
        ),
        pytest.param(
            *("vllm:b200", ["w4a8_awq"], None),
            r"w4a8_awq from modelopt: vLLM knows no.*compressed-tensors: .*Hopper.* runs from modelopt fp8, "
            r"nvfp4, .*; from compressed-tensors .*int8_wo",
            id="format_in_no_container",
        ),
        pytest.param(
            *("vllm:h200", ["w4a8_awq"], "modelopt"),
            r"does not run w4a8_awq \(w4a8_awq from modelopt: vLLM knows no W4A8_AWQ",
            id="format_not_in_this_container",
        ),
        pytest.param(
            *("transformers:cpu", None, "modelopt"),
            r"reads no quantised format from the modelopt container: .*nonsense.*"
            r"use --container compressed-tensors$",
            id="container",
        ),
        pytest.param(
            *("vllm:cpu", None, None),
            r"vllm:cpu runs no quantised format: .*transformers:cpu runs them.*autoq targets",
            id="nothing",
        ),
    ],
)
def test_what_a_target_cannot_take_is_refused_with_the_reason(
    target: str, formats: Any, container: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        offers(parse_target(target), formats, container)


def test_a_dense_model_takes_the_container_with_most_formats() -> None:
    model = make_tiny_model("llama")
    model_map = discover(model)
    offer, unusable = best_offer(offers(H200, None, None), H200, model, model_map)
    assert offer.container is COMPRESSED
    # Two key and value heads of 32: 64 rows, and vLLM's INT4 kernel takes multiples of 128.
    lost = {(group, fmt): reason for (group, fmt), reason in unusable.items() if ".0." in group}
    assert list(lost) == [("model.layers.0.self_attn.q_proj+k_proj+v_proj", "w4a8_awq")]
    assert "out_features divisible by 128" in lost.popitem()[1]


def test_experts_that_an_engine_would_leave_unquantised_are_not_offered_there() -> None:
    model = make_tiny_model("mixtral")
    model_map = discover(model)
    named = [FormatName("fp8_pc_pt"), FormatName("fp8")]
    _, unusable = best_offer(offers(H200, named, MODELOPT), H200, model, model_map)
    experts = {group.name for group in model_map.groups if "experts" in group.name}
    assert {group for group, fmt in unusable if fmt == "fp8_pc_pt"} == experts
    assert all("runs no experts of fp8_pc_pt from modelopt" in text for text in unusable.values())
    hopper = parse_target("tensorrt-llm:h200")
    _, unusable = best_offer(offers(hopper, named, MODELOPT), hopper, model, model_map)
    assert not unusable


def test_fused_experts_go_where_they_can_be_held() -> None:
    model = make_tiny_model("mixtral")
    model_map = discover(model)
    offered = offers(H200, None, None)
    assert offered[0].container is COMPRESSED
    offer, unusable = best_offer(offered, H200, model, model_map)
    assert offer == unasked(MODELOPT, "fp8", "nvfp4")
    assert unusable == {}


def test_formats_that_nobody_named_and_no_layer_takes_are_left_out() -> None:
    target = parse_target("transformers:cpu")
    model = make_tiny_model("t5")
    model_map = discover(model)
    offer, unusable = best_offer(offers(target, None, None), target, model, model_map)
    assert offer == unasked(COMPRESSED, "fp8")
    assert unusable == {}
    progress = Noting()
    note_target(target, offer, progress)
    assert [note for note in progress.notes if "would run nvfp4, and no layer" in note]
    # What was named stays, and is refused by name later.
    named = offers(target, ["fp8", "nvfp4"], None)
    offer, unusable = best_offer(named, target, model, model_map)
    assert offer == offer_of(COMPRESSED, "fp8", "nvfp4")
    assert {fmt for _, fmt in unusable} == {"nvfp4"}


def test_a_model_that_takes_nothing_keeps_all_formats_for_the_refusal() -> None:
    target = parse_target("transformers:cpu")
    model = make_tiny_model("gpt2")
    model_map = discover(model)
    offered = offers(target, None, None)
    offer, unusable = best_offer(offered, target, model, model_map)
    assert offer == offered[0]
    assert len(unusable) == 3 * len(model_map.groups)


def test_a_target_restricts_the_search_and_is_shown(llama_folder: Path, quick: Any) -> None:
    progress = Noting()
    del quick["formats"]
    quick.update(measure=False, progress=progress)
    study = autoq.search(llama_folder, **quick, target="vLLM:h200")
    summary = study.summary()
    assert summary["target"] == "vllm:h200"
    assert summary["configuration"]["container"] == "compressed-tensors"
    assert summary["configuration"]["formats"] == ["fp8", "nvfp4", "w4a8_awq"]
    assert "target" not in summary["configuration"]
    assert (
        "for vllm:h200: fp8, nvfp4, w4a8_awq in the compressed-tensors container" in progress.notes
    )
    (weight_only,) = [note for note in progress.notes if "weight-only" in note]
    assert weight_only.startswith("nvfp4 runs weight-only on vllm:h200 (no FP4 matrix units")


def test_targets_that_take_the_same_share_a_study(llama_folder: Path, quick: Any) -> None:
    quick.update(measure=False, formats=("fp8", "nvfp4"))
    plain = autoq.search(llama_folder, **quick)
    assert plain.summary()["target"] is None
    blackwell = autoq.search(llama_folder, **quick, target="sglang:b200")
    assert (blackwell.id, blackwell.target) == (plain.id, "sglang:b200")
    assert autoq.open_study(None, quick["store"]).target == "sglang:b200"


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"target": "vllm:h2000"}, UnknownNameError, "did you mean h200"),
        ({"target": "vllm"}, InputError, "ENGINE:HARDWARE"),
        ({"target": "tensorrt-llm:b200", "formats": ("w4a8_awq",)}, InputError, "Blackwell"),
        ({"target": "transformers:cpu", "container": "modelopt"}, InputError, "nonsense"),
    ],
)
def test_refusals_come_before_anything_is_read_or_stored(
    tmp_path: Path, quick: Any, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        autoq.search(tmp_path / "no_model", **{**quick, **options})
    assert list(tmp_path.iterdir()) == []


def test_exports_that_the_target_cannot_run_say_so(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    quick.update(formats=("w4a8_awq",), effective_bits=14.0, measure=False)
    rules = ["*.o_proj=w4a8_awq"]
    study = autoq.search(llama_folder, **quick, rules=rules, target="vllm:h200")
    fitting, foreign = Noting(), Noting()
    study.export(tmp_path / "fitting", check_logits=False, progress=fitting)
    study.export(tmp_path / "foreign", container="modelopt", progress=foreign)
    start = "vllm:h200, which the study was searched for, does not run w4a8_awq from modelopt: "
    assert not [note for note in fitting.notes if "vllm:h200" in note]
    assert [note for note in foreign.notes if note.startswith(start)]


def test_gpus_whose_speed_is_known_are_known_as_targets() -> None:
    units = {MatrixUnit.FP8: 89, MatrixUnit.NVFP4: 100}  # and the first capability that has them
    nvidia = [gpu for gpu in GPUS.values() if gpu.description.startswith("NVIDIA")]
    assert len(nvidia) >= 5
    for gpu in nvidia:
        capability = HARDWARE[gpu.name].capability
        assert capability is not None
        for unit, first in units.items():
            assert (unit in gpu.operations_per_second) == (capability >= first), gpu.name
