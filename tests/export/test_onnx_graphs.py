"""ONNX graphs with a cache as inputs and outputs."""

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
