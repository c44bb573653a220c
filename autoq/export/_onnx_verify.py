"""Proving that an ONNX graph holds and computes what was searched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from autoq.errors import VerificationError
from autoq.export._folding import has_folded_scale
from autoq.export._onnx_graph import INPUT_KEY, SLOT_KEY, expected_constants
from autoq.export._onnx_interface import Interface, interface_of
from autoq.export._onnx_numerics import dequantized, runtime_options
from autoq.export._onnx_trace import OPSET, in_float32
from autoq.export._plan import ExportPlan
from autoq.formats import FORMATS
from autoq.layers.quantize import dequantize_weight, fake_quantize_input
from autoq.layers.simulate import SimulatedModel
from autoq.layers.taps import MatrixCall, tapped
from autoq.models import SlotName, WeightSlot

ONNX_FILE, ONNX_DATA = "model.onnx", "model.onnx.data"

PRODUCT_BOUND = 1e-4
"""Largest allowed root mean square of onnxruntime's values minus the simulation's, relative to these.
Each product's input is compared, and the simulation then goes on with onnxruntime's: so no activation
falls on a neighbouring code, and what is left is that float32 sums are added in another order, over
one layer: about 1e-6 of their size, more where attention sharpens it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxReport:
    """What was compared: all of it equal, logits within their bound."""

    quantized_matrices: int  # codes and scales, and the values that onnxruntime makes of them
    unquantized_tensors: int  # bit for bit what was handed to the writer
    stored_bytes: int  # of the graph and its data
    onnxruntime_products: Mapping[str, float]  # how far inputs and outputs are from the
    # simulation's that was given the same inputs before, and how far allowed
    onnxruntime_logits: Mapping[str, float]  # how far from the simulation's own: activations that
    # fell on neighbouring codes included


def tensor_digests(model: ir.Model) -> dict[str, str]:
    """SHA-256 of every initialiser's dtype, shape and bytes, by name."""
    return {name: _digest(_tensor(value)) for name, value in model.graph.initializers.items()}


def verify_onnx(
    folder: Path,
    plan: ExportPlan,
    digests: Mapping[str, str],
    interface: Interface | None = None,
) -> OnnxReport:
    """Read a graph back, compare all that it stores, and run it.

    Args:
        folder: holds `model.onnx` and `model.onnx.data`.
        plan: what was to be written.
        digests: `tensor_digests` of what was handed to the writer.
        interface: what the graph takes and gives; None is what it does without a cache.
    Raises:
        VerificationError: the graph is no valid ONNX; a code or scale is not the searched model's,
            or stands for another value in onnxruntime; another tensor is not as it was written; or
            a product's input or an output differs by more than `PRODUCT_BOUND`.
    """
    path = folder / ONNX_FILE
    _check(path)
    model = _read(path)
    known = _verify_slots(model, plan)
    others = _verify_others(model, digests, known)
    forced, free = _compare_run(path, model, plan, interface or interface_of(plan.model))
    return OnnxReport(
        quantized_matrices=len(plan.quantized_slots),
        unquantized_tensors=others,
        stored_bytes=sum((folder / name).stat().st_size for name in (ONNX_FILE, ONNX_DATA)),
        onnxruntime_products={"relative_difference": forced, "bound": PRODUCT_BOUND},
        onnxruntime_logits={"relative_difference": free},
    )


def _check(path: Path) -> None:
    from onnx import checker

    try:
        # By path: data beside the graph may be larger than a protocol buffer.
        checker.check_model(str(path), full_check=True)
    except Exception as error:  # ValidationError, InferenceError, and what protobuf raises
        raise VerificationError(f"{path} is no valid ONNX graph: {error}") from error


def _read(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # as above
        raise VerificationError(f"{path} does not read back: {error}") from error


def _verify_slots(model: ir.Model, plan: ExportPlan) -> set[str]:
    """Names of the initialisers of quantised matrices, all of them as searched."""
    known: set[str] = set()
    for slot in plan.quantized_slots:
        constants = expected_constants(plan, slot)
        for key, expected in constants.items():
            name = f"{slot.name}.{key}"
            value = model.graph.initializers.get(name)
            if value is None:
                raise VerificationError(f"the graph has no {name}; export again")
            _compare(name, _tensor(value), expected)
            known.add(name)
        _verify_values(plan, slot, constants)
    return known


def _verify_values(
    plan: ExportPlan, slot: WeightSlot, constants: Mapping[str, ir.TensorProtocol]
) -> None:
    """What onnxruntime makes of a slot's codes and scales, against the simulation."""
    fmt = FORMATS[plan.slot_formats[slot.name]]
    tape = Tape()
    values = {key: tape.initializer(tensor, key) for key, tensor in constants.items()}
    weight = dequantized(tape, values, fmt, plan.container, "weight")
    weight.type, weight.shape = ir.TensorType(ir.DataType.FLOAT), None
    graph = ir.Graph(
        [],
        [weight],
        nodes=tape.nodes,
        initializers=list(values.values()),
        opset_imports={"": OPSET},
        name="weight",
    )
    data = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    (found,) = _session(data, plan_options(plan)).run(None, {})
    searched = dequantize_weight(plan.quantize(slot), container=plan.container)
    if not np.array_equal(found.T.view(np.uint32), searched.cpu().numpy().view(np.uint32)):
        raise VerificationError(
            f"onnxruntime makes other values of {slot.name} than the searched model's; this is a "
            "fault of autoq or of onnxruntime, please report it"
        )


def _verify_others(model: ir.Model, digests: Mapping[str, str], known: set[str]) -> int:
    stored = {name: _tensor(value) for name, value in model.graph.initializers.items()}
    for name in sorted(stored.keys() ^ digests.keys()):
        raise VerificationError(f"{name} is not in both the graph and what was written of it")
    for name in sorted(stored.keys() - known):
        if _digest(stored[name]) != digests[name]:
            raise VerificationError(
                f"{name} differs from what was written; the file was changed or the disk is "
                "failing: export again"
            )
    return len(stored) - len(known)


def _compare(name: str, stored: ir.TensorProtocol, expected: ir.TensorProtocol) -> None:
    if stored.dtype != expected.dtype or tuple(stored.shape) != tuple(expected.shape):
        raise VerificationError(
            f"{name} must be {expected.dtype.name} {tuple(expected.shape)}, and the graph has "
            f"{stored.dtype.name} {tuple(stored.shape)}"
        )
    if stored.tobytes() != expected.tobytes():
        raise VerificationError(
            f"{name} differs from the searched model's; the file was changed or the disk is "
            "failing: export again"
        )


def _compare_run(
    path: Path, model: ir.Model, plan: ExportPlan, interface: Interface
) -> tuple[float, float]:
    """How far onnxruntime's values are from the simulation's: in a layer, and at the end.

    Of all probes the largest.
    """
    inputs = _expose_inputs(model)
    options = plan_options(plan)
    options["session.model_external_initializers_file_folder_path"] = str(path.parent)
    data = ir.serde.serialize_model(model).SerializeToString()
    forced = free = 0.0
    with in_float32(plan.model), torch.no_grad():
        simulated = _simulated(plan)
        try:
            for feeds in interface.probes:
                theirs = _run(_session(data, options), feeds, path)
                end = interface.output
                free = max(free, _distance(theirs[end], interface.call(feeds)[end]))
                forced = max(forced, _forced_distance(plan, interface, feeds, theirs, inputs))
        finally:
            simulated.restore()
    return forced, free


def _expose_inputs(model: ir.Model) -> dict[SlotName, list[str]]:
    """Make the inputs of quantised products outputs, too; their names, by slot, in order."""
    found: dict[SlotName, list[str]] = {}
    values = {value.name: value for node in model.graph for value in node.outputs}
    outputs = {value.name for value in model.graph.outputs}
    for node in model.graph:
        name = node.metadata_props.get(INPUT_KEY)
        if name is None:
            continue
        if name not in values:
            raise VerificationError(f"the graph has no value {name}; export again")
        found.setdefault(SlotName(node.metadata_props[SLOT_KEY]), []).append(name)
        if name not in outputs:
            model.graph.outputs.append(values[name])
            outputs.add(name)
    return found


def _forced_distance(
    plan: ExportPlan,
    interface: Interface,
    feeds: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    inputs: Mapping[SlotName, list[str]],
) -> float:
    """The largest distance of an input or of the output, each after onnxruntime's own inputs.

    Raises:
        VerificationError: one is larger than `PRODUCT_BOUND`; the message names the layer.
    """
    waiting = {name: list(values) for name, values in inputs.items()}
    largest = 0.0

    def product(call: MatrixCall, ours: Tensor) -> Tensor:
        nonlocal largest
        name = call.slot.name
        if not waiting.get(name):
            raise VerificationError(f"the graph lacks a product with {name}; export again")
        entry = plan.entry(call.slot)
        given = theirs[waiting[name].pop(0)]
        if call.token_rows is not None:  # the graph's experts read all tokens
            given = given[call.token_rows]
        if entry.pre_quant_scale is not None and has_folded_scale(entry):
            # The graph's norm has multiplied it already; powers of two divide exactly.
            given = given / entry.pre_quant_scale
        largest = max(largest, _checked(f"the input of {name}", _distance(given, ours)))
        fmt = FORMATS[plan.slot_formats[name]]
        read = fake_quantize_input(given, fmt, entry, container=plan.container)
        return call.compute(read)

    with tapped(plan.model, plan.quantized_slots, product):
        ours = interface.call(feeds)
    ends = [_checked(end, _distance(theirs[end], found)) for end, found in ours.items()]
    return max(largest, *ends)


def _checked(what: str, difference: float) -> float:
    if not difference <= PRODUCT_BOUND:
        raise VerificationError(
            f"{what} differs between onnxruntime and the simulation by {difference:.2g} of its size, "
            f"more than {PRODUCT_BOUND:g}; the graph is not what was searched"
        )
    return difference


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).norm() / other.norm().clamp(min=torch.finfo(other.dtype).tiny))


def _run(session: Any, feeds: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    names = [output.name for output in session.get_outputs()]
    try:
        found = session.run(names, {name: tensor.numpy() for name, tensor in feeds.items()})
    except Exception as error:  # onnxruntime's own exceptions have no common class but this
        raise VerificationError(f"onnxruntime cannot run {path}: {error}") from error
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def _session(data: bytes, options: Mapping[str, str]) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    settings.intra_op_num_threads = torch.get_num_threads()
    for name, value in options.items():
        settings.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise VerificationError(f"onnxruntime cannot load the graph: {error}") from error


def plan_options(plan: ExportPlan) -> dict[str, str]:
    """Entries of onnxruntime's session configuration that the plan's graph wants on CPUs."""
    used = {plan.slot_formats[slot.name] for slot in plan.quantized_slots}
    return runtime_options([FORMATS[name] for name in used], plan.container)


def _simulated(plan: ExportPlan) -> SimulatedModel:
    return SimulatedModel(
        plan.model,
        plan.model_map.slots,
        plan.slot_formats,
        plan.calibration,
        container=plan.container,
        scale_dtype=plan.scale_dtype,
    )


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise VerificationError(f"the initialiser {value.name} has no values; export again")
    return value.const_value


def _digest(tensor: ir.TensorProtocol) -> str:
    digest = hashlib.sha256(f"{tensor.dtype.name} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.tobytes())
    return digest.hexdigest()
