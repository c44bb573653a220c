"""ONNX graphs with a cache as inputs and outputs, and those of encoders with decoders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoq.errors import ExportError
from autoq.export._plan import ExportPlan
from autoq.formats import FormatName
from autoq.layers import Container
from autoq.layers.simulate import SimulatedModel
from autoq.models import discover
from autoq.testing.tiny_models import make_family_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from autoq.export._onnx_interface import interface_of
from autoq.export.onnx import ONNX_FILE, export_onnx

# Weights alone, so that no activation can fall on a neighbouring code: what is left is the order of
# float32 sums over a few layers.
WEIGHTS_ALONE = ("int8_wo", "int4_awq", "none")
BOUND = 1e-5

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def plan_of(kind: type, family: str, formats: tuple[str, ...]) -> ExportPlan:
    model = make_family_model(family)
    model_map = discover(model)
    chosen = {
        slot: FormatName(formats[number % len(formats)])
        for number, group in enumerate(model_map.groups)
        for slot in group.slots
    }
    calibration = kind(Path(), model, model_map).calibrate(chosen)
    return ExportPlan(model, model_map, chosen, calibration, Container.MODELOPT, torch.bfloat16)


@pytest.fixture
def planned(tiny: Callable[[str], Any]) -> Callable[..., ExportPlan]:
    kind = type(tiny("llama"))
    return lambda family, *formats: plan_of(kind, family, formats)


def session(path: Path) -> Any:
    """As a user opens the graph, with the options that its metadata name."""
    settings = onnxruntime.SessionOptions()
    graph = onnx.load(path / ONNX_FILE, load_external_data=False)
    metadata = {prop.key: prop.value for prop in graph.metadata_props}
    for name, value in json.loads(metadata["autoq"])["onnxruntime_options"].items():
        settings.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(
        str(path / ONNX_FILE), settings, providers=["CPUExecutionProvider"]
    )


def simulated(plan: ExportPlan, **inputs: torch.Tensor) -> np.ndarray[Any, Any]:
    """What the searched model computes in float32, without any cache."""
    model = plan.model.to(torch.float32)
    SimulatedModel(
        model,
        plan.model_map.slots,
        plan.slot_formats,
        plan.calibration,
        container=plan.container,
        scale_dtype=plan.scale_dtype,
    )
    with torch.no_grad():
        return np.asarray(model(**inputs, use_cache=False).logits)


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize(
    "family,tokens",
    # Gemma 3's layers look back 64 tokens here: beyond them the cache holds what is not looked at.
    [("llama", 12), pytest.param("gemma3", 80, marks=pytest.mark.slow)],
)
def test_a_prompt_and_then_a_token_each_are_the_whole(
    planned: Any, tmp_path: Path, family: str, tokens: int
) -> None:
    plan = planned(family, *WEIGHTS_ALONE)
    report = export_onnx(plan, source=None, destination=tmp_path / "out", with_past=True).report
    assert report.onnxruntime_products["relative_difference"] < BOUND
    running = session(tmp_path / "out")
    past = [one for one in running.get_inputs() if one.name.startswith("past_key_values.")]
    assert [one.name for one in running.get_outputs()] == [
        "logits",
        *(one.name.replace("past_key_values", "present") for one in past),
    ]
    assert len(past) == 4  # keys and values of two layers
    ids = torch.randint(5, 250, (3, tokens), generator=torch.Generator().manual_seed(3))
    whole = simulated(plan, input_ids=ids)
    cache = {one.name: np.zeros((3, one.shape[1], 0, one.shape[3]), np.float32) for one in past}
    first = tokens - 3
    for begin, end in ((0, first), *((at, at + 1) for at in range(first, tokens))):
        mask = np.ones((3, end), np.int64)
        feeds = {"input_ids": ids[:, begin:end].numpy(), "attention_mask": mask, **cache}
        logits, *present = running.run(None, feeds)
        assert distance(logits, whole[:, begin:end]) < BOUND
        cache = dict(zip(cache, present, strict=True))
        assert {value.shape[2] for value in present} == {end}


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_padding_in_front_changes_nothing(planned: Any, tmp_path: Path, family: str) -> None:
    """Prompts of several lengths, and then a token each: as each sequence alone, positions too."""
    plan = planned(family, *WEIGHTS_ALONE)
    export_onnx(plan, source=None, destination=tmp_path / "out", with_past=True)
    running = session(tmp_path / "out")
    ids = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    padding = 5
    mask = np.ones((2, 12), np.int64)
    mask[1, :padding] = 0
    first = simulated(plan, input_ids=ids[:1])[0]
    with torch.no_grad():  # the model is simulated already
        second = np.asarray(plan.model(input_ids=ids[1:, padding:], use_cache=False).logits)[0]
    cache = {
        one.name: np.zeros((2, one.shape[1], 0, one.shape[3]), np.float32)
        for one in running.get_inputs()
        if one.name.startswith("past_key_values.")
    }
    for begin, end in ((0, 10), (10, 11), (11, 12)):
        feeds = {"input_ids": ids[:, begin:end].numpy(), "attention_mask": mask[:, :end], **cache}
        logits, *present = running.run(None, feeds)
        start = max(begin, padding)
        assert distance(logits[0], first[begin:end]) < BOUND
        assert distance(logits[1, start - begin :], second[start - padding : end - padding]) < BOUND
        cache = dict(zip(cache, present, strict=True))


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_an_encoder_with_a_decoder(planned: Any, tmp_path: Path, family: str) -> None:
    plan = planned(family, *WEIGHTS_ALONE)
    report = export_onnx(plan, source=None, destination=tmp_path / "out").report
    quantized = [slot for slot, fmt in plan.slot_formats.items() if fmt != "none"]
    assert report.quantized_matrices == len(quantized) > 6
    for side in ("encoder.", "decoder."):
        assert any(side in slot for slot in quantized)
    assert report.onnxruntime_products["relative_difference"] < BOUND
    running = session(tmp_path / "out")
    names = ["input_ids", "attention_mask", "decoder_input_ids"]
    assert [one.name for one in running.get_inputs()] == names
    generator = torch.Generator().manual_seed(3)
    read = torch.randint(5, 250, (2, 11), generator=generator)
    said = torch.randint(5, 250, (2, 4), generator=generator)
    mask = torch.ones_like(read)
    mask[1, 7:] = 0
    feeds = dict(zip(names, (read, mask, said), strict=True))
    whole = simulated(plan, **feeds)
    for end in (1, 4):  # a token at a time, as one decodes
        part = {**feeds, "decoder_input_ids": said[:, :end]}
        (logits,) = running.run(None, {name: value.numpy() for name, value in part.items()})
        assert distance(logits, whole[:, :end]) < BOUND
    # What the mask covers is not read.
    other = {**feeds, "input_ids": read.masked_fill(mask == 0, 3)}
    (again,) = running.run(None, {name: value.numpy() for name, value in other.items()})
    assert distance(again, whole) < BOUND


def test_experts_that_read_every_token(planned: Any, tmp_path: Path) -> None:
    """The graph adds up all experts by their shares, the model only those that are chosen."""
    plan = planned("mixtral", "int8_wo", "int4_awq")
    report = export_onnx(plan, source=None, destination=tmp_path / "out").report
    assert report.quantized_matrices == 2 * (4 + 2 * 4)
    assert report.onnxruntime_products["relative_difference"] < BOUND
    graph = onnx.load(tmp_path / "out" / ONNX_FILE, load_external_data=False).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for number in range(4):
        codes = kinds[f"model.layers.1.mlp.experts.{number}.down_proj.codes"]
        assert codes in (onnx.TensorProto.INT8, onnx.TensorProto.INT4)
    ids = torch.randint(5, 250, (3, 11), generator=torch.Generator().manual_seed(3))
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids)}
    (logits,) = session(tmp_path / "out").run(None, feeds)
    assert distance(logits, simulated(plan, input_ids=ids)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_whose_inputs_are_quantised(planned: Any, tmp_path: Path, family: str) -> None:
    plan = planned(family, "fp8", "int8_sq", "none")
    report = export_onnx(plan, source=None, destination=tmp_path / "out").report
    assert report.quantized_matrices == len(plan.quantized_slots)
    assert report.onnxruntime_products["relative_difference"] < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("fp8", "w4a8_awq", "int8_sq"), ("fp8_block", "fp8_pc_pt")])
@pytest.mark.parametrize("family", ["t5", "flan_t5", "bart", "roberta"])
def test_encoders_in_every_format(
    planned: Any, tmp_path: Path, family: str, formats: tuple[str, ...]
) -> None:
    """Inputs are quantised, too: each product is compared under the inputs that onnxruntime has."""
    plan = planned(family, *formats)
    report = export_onnx(plan, source=None, destination=tmp_path / "out").report
    assert report.quantized_matrices == len(plan.quantized_slots) == len(plan.model_map.slots)
    assert report.onnxruntime_products["relative_difference"] < BOUND


@pytest.mark.parametrize(
    "family,reason",
    [
        ("t5", "continue one sequence, and the model is T5ForConditionalGeneration"),
        ("bert", "continue one sequence, and the model is Bert"),
        ("mamba", "keeps something else; leave with_past out"),
    ],
)
def test_what_has_no_cache_by_token_is_refused(family: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        interface_of(make_family_model(family), with_past=True)


def test_the_names_and_sizes_of_a_cache() -> None:
    """Two layers with two heads of keys and values of 32 features: by hand."""
    interface = interface_of(make_family_model("llama"), with_past=True)
    assert interface.cached == ((2, 32, 32), (2, 32, 32))
    assert interface.inputs[2:] == tuple(
        f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")
    )
    example = interface.example
    assert example["attention_mask"].shape == (2, 5 + 8)
    assert example["past_key_values.1.value"].shape == (2, 2, 5, 32)
