"""ONNX graphs with Q/DQ nodes: what they store, what onnxruntime makes of them, what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoq.errors import ExportError, VerificationError
from autoq.export._plan import ExportPlan
from autoq.formats import FormatName
from autoq.layers import Container
from autoq.layers.quantize import dequantize_weight
from autoq.models import ModelMap, SlotKind, SlotName, WeightSlot
from autoq.models.forward import forward_logits
from autoq.models.weights import slot_weight

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from autoq.export.onnx import (
    ONNX_DATA,
    ONNX_FILE,
    OnnxExport,
    export_onnx,
    onnx_formats,
    onnx_warnings,
    verify_onnx,
)

MODELOPT, COMPRESSED = Container.MODELOPT, Container.COMPRESSED_TENSORS
HELD = ("fp8", "w4a8_awq", "int8_sq", "int8_wo", "int4_awq", "fp8_pc_pt", "fp8_block")
FOLDED, STORED = "model.layers.0.input_layernorm", SlotName("model.layers.0.self_attn.o_proj")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def a_format_each(model_map: ModelMap, formats: tuple[str, ...]) -> dict[SlotName, FormatName]:
    """Formats in turn, a group each."""
    return {
        slot: FormatName(formats[number % len(formats)])
        for number, group in enumerate(model_map.groups)
        for slot in group.slots
    }


def plan_of(
    loaded: Any, formats: tuple[str, ...], container: Container, *, scales: bool = False
) -> ExportPlan:
    """A plan of a tiny model; with scales one that is folded and one that is stored."""
    chosen = a_format_each(loaded.model_map, formats)
    calibration = loaded.calibrate(chosen)
    if scales:
        for slot, fmt in list(calibration):
            columns = torch.arange(loaded.model_map.slots[slot].in_features)
            scale = torch.exp2((columns % 3 - 1).float())
            norm = FOLDED if slot.startswith("model.layers.0.self_attn.") else None
            if slot == STORED or (norm is not None and not slot.endswith("o_proj")):
                changed = {
                    "pre_quant_scale": scale,
                    "folds_into": None if slot == STORED else norm,
                    "weight_amax": 2 * calibration[slot, fmt].weight_amax,
                }
                calibration[slot, fmt] = replace(calibration[slot, fmt], **changed)
    return ExportPlan(
        loaded.model, loaded.model_map, chosen, calibration, container, torch.bfloat16
    )


@pytest.fixture(scope="module")
def llama(
    tiny: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportPlan, OnnxExport]:
    """Every format that ONNX holds in one model, with scales that fold and scales that do not."""
    loaded = tiny("llama")
    plan = plan_of(loaded, (*HELD, "none"), MODELOPT, scales=True)
    destination = tmp_path_factory.mktemp("onnx") / "out"
    return plan, export_onnx(
        plan, source=loaded.source, destination=destination, provenance={"plan": "5 bits"}
    )


def session(path: Path) -> Any:
    """As a user opens the graph, with the options that its metadata name."""
    settings = onnxruntime.SessionOptions()
    metadata = {prop.key: prop.value for prop in graph_of(path).metadata_props}
    for name, value in json.loads(metadata["autoq"])["onnxruntime_options"].items():
        settings.add_session_config_entry(name, value)
    return onnxruntime.InferenceSession(
        str(path / ONNX_FILE), settings, providers=["CPUExecutionProvider"]
    )


def graph_of(path: Path, *, data: bool = False) -> Any:
    return onnx.load(path / ONNX_FILE, load_external_data=data)


def initialisers(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in graph_of(path, data=True).graph.initializer}


def test_formats_that_onnx_holds_are_those_that_are_written_here():
    assert set(onnx_formats()) == set(HELD)


def test_every_layer_computes_what_the_simulation_does(
    llama: tuple[ExportPlan, OnnxExport],
):
    plan, written = llama
    report = written.report
    assert report.quantized_matrices == len(plan.quantized_slots) == 13
    found, bound = (report.onnxruntime_products[key] for key in ("relative_difference", "bound"))
    assert 0 < found < 1e-5 < bound


def test_the_folder_has_the_graph_its_data_and_what_readers_need(
    llama: tuple[ExportPlan, OnnxExport],
):
    _, written = llama
    names = {file.path for file in written.files}
    assert {ONNX_FILE, ONNX_DATA, "config.json", "tokenizer.json"} <= names
    sizes = [(written.path / name).stat().st_size for name in (ONNX_FILE, ONNX_DATA)]
    assert written.stored_bytes == sum(sizes)
    graph = graph_of(written.path)
    assert "/" not in "".join(
        prop.value for node in graph.graph.node for prop in node.metadata_props
    )
    metadata = json.loads({prop.key: prop.value for prop in graph.metadata_props}["autoq"])
    assert metadata["plan"] == "5 bits" and metadata["numerics"] == "modelopt"
    assert metadata["formats"]["model.layers.0.self_attn.q_proj"] == "fp8"


def test_codes_are_stored_in_their_own_types_and_as_few_bits(
    llama: tuple[ExportPlan, OnnxExport],
):
    plan, written = llama
    stored = initialisers(written.path)
    types = {
        "fp8": (onnx.TensorProto.FLOAT8E4M3FN, 8),
        "fp8_pc_pt": (onnx.TensorProto.FLOAT8E4M3FN, 8),
        "fp8_block": (onnx.TensorProto.FLOAT8E4M3FN, 8),
        "int8_sq": (onnx.TensorProto.INT8, 8),
        "int8_wo": (onnx.TensorProto.INT8, 8),
        "int4_awq": (onnx.TensorProto.INT4, 4),
        "w4a8_awq": (onnx.TensorProto.INT4, 4),
    }
    for slot in plan.quantized_slots:
        codes = stored[f"{slot.name}.codes"]
        kind, bits = types[plan.slot_formats[slot.name]]
        assert codes.data_type == kind
        assert tuple(codes.dims) == (slot.in_features, slot.out_features)
        assert len(codes.raw_data) * 8 == slot.weights * bits
    # What is not quantised keeps the model's own dtype.
    assert stored["model.model.embed_tokens.weight"].data_type == onnx.TensorProto.BFLOAT16


def test_int4_codes_times_scales_are_the_weight(llama: tuple[ExportPlan, OnnxExport]):
    """By hand, from what is in the file: no node of ours and no onnxruntime."""
    plan, written = llama
    stored = initialisers(written.path)
    slots = [s for s in plan.quantized_slots if plan.slot_formats[s.name] == "int4_awq"]
    assert slots
    for slot in slots:
        packed = np.frombuffer(stored[f"{slot.name}.codes"].raw_data, dtype=np.uint8)
        nibbles = np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(-1).astype(np.int8)
        codes = np.where(nibbles > 7, nibbles - 16, nibbles).reshape(slot.in_features, -1)
        scale = onnx.numpy_helper.to_array(stored[f"{slot.name}.scale"])
        values = codes.astype(np.float32) * np.repeat(scale, 128, axis=0)
        weight = slot_weight(plan.model, slot).detach().float().numpy()
        assert np.abs(values.T - weight).max() <= 0.51 * scale.max()
        searched = dequantize_weight(plan.quantize(slot), container=plan.container)
        assert np.array_equal(values.T, searched.numpy())


def test_the_graph_takes_any_batch_and_any_length(llama: tuple[ExportPlan, OnnxExport]):
    plan, written = llama
    opened = session(written.path)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 250, (4, 21), generator=generator)
    whole = opened.run(None, {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids)})[0]
    assert whole.shape == (4, 21, 288) and np.isfinite(whole).all()
    # Quantised to a few bits it is still the model: another's logits have nothing to do with it.
    with torch.no_grad():
        original = forward_logits(plan.model, ids).float().numpy()
    assert np.corrcoef(whole.flatten(), original.flatten())[0, 1] > 0.9
    # Causal: what follows, and what is masked, changes nothing before.
    mask = np.ones_like(ids)
    mask[:, 9:] = 0
    start = opened.run(None, {"input_ids": ids.numpy(), "attention_mask": mask})[0]
    np.testing.assert_allclose(start[:, :9], whole[:, :9], atol=1e-4)


def test_scales_are_folded_into_norms_or_multiplied(llama: tuple[ExportPlan, OnnxExport]):
    plan, written = llama
    stored = initialisers(written.path)
    scale = torch.exp2((torch.arange(128) % 3 - 1).float())
    norm = onnx.numpy_helper.to_array(stored[f"model.{FOLDED}.weight"])
    own = plan.model.get_submodule(FOLDED).weight.detach().float()
    assert np.array_equal(norm, (own * scale).numpy())
    assert [name for name in stored if name.endswith("pre_quant_scale")] == [
        f"{STORED}.pre_quant_scale"
    ]


def test_the_model_is_as_it_was(llama: tuple[ExportPlan, OnnxExport], tiny: Callable[[str], Any]):
    from autoq.models import load_model

    again = dict(load_model(tiny("llama").source).named_parameters())
    for name, parameter in llama[0].model.named_parameters():
        assert parameter.dtype == again[name].dtype and torch.equal(parameter, again[name]), name


@pytest.mark.parametrize(
    ("name", "formats", "container"),
    [
        ("gpt2", ("w4a8_awq", "int8_sq", "fp8"), COMPRESSED),  # Conv1D; INT4 beside FP8 per token
        ("bert", ("fp8_block", "fp8_pc_pt", "int8_wo"), MODELOPT),
    ],
)
def test_other_models(
    name: str,
    formats: tuple[str, ...],
    container: Container,
    tiny: Callable[[str], Any],
    tmp_path: Path,
):
    plan = plan_of(tiny(name), formats, container)
    written = export_onnx(plan, source=tiny(name).source, destination=tmp_path / "out")
    assert written.report.quantized_matrices == len(plan.quantized_slots) > 6
    assert written.report.onnxruntime_products["relative_difference"] < 1e-5
    levels = [node for node in graph_of(written.path).graph.node if node.op_type == "Div"]
    scales = [key for key in initialisers(written.path) if key.endswith("tensor_scale")]
    assert levels and not scales  # found in the graph; a second level belongs to modelopt


# Refusals


def refused(plan: ExportPlan, destination: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export_onnx(plan, source=None, destination=destination, **options)
    assert list(destination.parent.iterdir()) == []  # no half a folder is left
    return str(caught.value)


@pytest.mark.parametrize(
    ("fmt", "reason"),
    [("nvfp4", "E2M1 codes"), ("nvfp4_wo", "E2M1 codes"), ("mxfp8", "power of two")],
)
def test_formats_that_onnx_cannot_hold(
    fmt: str, reason: str, tiny: Callable[[str], Any], tmp_path: Path
):
    message = refused(plan_of(tiny("llama"), (fmt,), MODELOPT), tmp_path / "out")
    assert f"cannot be {fmt} in onnx" in message and reason in message
    assert "fp8, w4a8_awq" in message  # what works instead


def test_experts_that_are_computed_in_a_way_of_their_own(
    tiny: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(tiny("mixtral"), ("fp8",), MODELOPT)
    assert "all of a layer's 4 experts for every token" in onnx_warnings(plan)[0]
    monkeypatch.setattr(plan.model.model.layers[0].mlp.experts, "has_bias", True)
    experts = refused(plan, tmp_path / "out")
    assert "how MixtralExperts computes an expert is not known to autoq" in experts


def test_a_matrix_that_serves_two_modules(tiny: Callable[[str], Any], tmp_path: Path):
    plan = plan_of(tiny("gpt2"), ("none",), MODELOPT)  # whose head is its embedding
    head = WeightSlot(
        name=SlotName("lm_head"),
        module="lm_head",
        parameter="weight",
        kind=SlotKind.LINEAR,
        out_features=288,
        in_features=128,
    )
    with_head = replace(
        plan,
        model_map=replace(plan.model_map, slots={**plan.model_map.slots, head.name: head}),
        slot_formats={head.name: FormatName("fp8")},
    )
    assert "its matrix serves another module" in refused(with_head, tmp_path / "out")


def test_a_model_that_cannot_be_traced(
    tiny: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(tiny("llama"), ("fp8",), MODELOPT)
    rotary = plan.model.get_submodule("model.rotary_emb")
    untraceable = lambda x, *_, **__: (x * float(x.sum()), x)
    monkeypatch.setattr(rotary, "forward", untraceable)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = refused(plan, tmp_path / "out")
    assert "torch's exporter" in message and "cannot trace LlamaForCausalLM" in message


# What is damaged is found


def copied(written: OnnxExport, folder: Path) -> Path:
    folder.mkdir()
    for name in (ONNX_FILE, ONNX_DATA):
        (folder / name).write_bytes((written.path / name).read_bytes())
    return folder


def digests_of(path: Path) -> dict[str, str]:
    import onnx_ir

    from autoq.export._onnx_verify import tensor_digests

    return tensor_digests(onnx_ir.load(path / ONNX_FILE))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.codes",
        "model.layers.0.mlp.down_proj.scale",
        "model.model.embed_tokens.weight",
    ],
)
def test_a_changed_byte_is_found_and_named(
    name: str, llama: tuple[ExportPlan, OnnxExport], tmp_path: Path
):
    plan, written = llama
    folder = copied(written, tmp_path / "damaged")
    handed = digests_of(folder)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph_of(folder).graph.initializer
    }
    data = bytearray((folder / ONNX_DATA).read_bytes())
    data[int(places[name].get("offset", 0)) + 5] ^= 1
    (folder / ONNX_DATA).write_bytes(data)
    with pytest.raises(VerificationError, match=name.replace(".", r"\.")):
        verify_onnx(folder, plan, handed)


def test_a_changed_node_is_found_where_it_is(llama: tuple[ExportPlan, OnnxExport], tmp_path: Path):
    """The input's scale of one projection taken for another's: all that is stored is right."""
    plan, written = llama
    folder = copied(written, tmp_path / "damaged")
    handed = digests_of(folder)
    graph = graph_of(folder)
    wrong, right = (
        "model.layers.0.self_attn.q_proj.scale",
        "model.layers.0.self_attn.q_proj.input_scale",
    )
    changed = [
        node
        for node in graph.graph.node
        if node.op_type == "DequantizeLinear" and right in node.input
    ]
    assert changed
    for node in changed:
        node.input[1] = wrong
    (folder / ONNX_FILE).write_bytes(graph.SerializeToString())
    with pytest.raises(VerificationError, match="differs between onnxruntime and the simulation"):
        verify_onnx(folder, plan, handed)


def test_lost_data_and_a_file_that_is_no_graph(
    llama: tuple[ExportPlan, OnnxExport], tmp_path: Path
):
    plan, written = llama
    folder = copied(written, tmp_path / "damaged")
    handed = digests_of(folder)
    (folder / ONNX_DATA).unlink()
    with pytest.raises(VerificationError, match=ONNX_FILE):
        verify_onnx(folder, plan, handed)
    (folder / ONNX_FILE).write_bytes(b"no graph")
    with pytest.raises(VerificationError, match="no valid ONNX"):
        verify_onnx(folder, plan, handed)
