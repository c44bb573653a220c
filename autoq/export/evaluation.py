"""Running checkpoints: our own simulation of them, and transformers' as the second opinion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ExportError, VerificationError
from autoq.export._building import (
    built_model,
    declared_dtype,
    model_class,
    refuse_missing,
    storage_dtype,
)
from autoq.export._names import CheckpointNames
from autoq.export._types import CheckpointContents
from autoq.export.reader import QuantizedCheckpoint, SlotReader, read_quantized
from autoq.formats import FORMATS, NONE, WeightElement
from autoq.kernels import int8
from autoq.layers.quantize import Container
from autoq.layers.simulate import SimulatedModel
from autoq.models import ModelMap, SlotKind, SlotName
from autoq.models.discovery import discover
from autoq.models.forward import forward_logits
from autoq.models.loading import quiet_transformers
from autoq.models.weights import slot_weight

LOGITS_BOUND = 1e-2
"""Largest allowed root mean square of transformers' minus our logits, relative to ours. Both
compute in float32, but round in another order, which moves single activations to a neighbouring
code: the two are equal in most runs, and never guaranteed to be."""


def load_checkpoint_for_evaluation(
    path: Path | str, *, dtype: torch.dtype | None = None
) -> tuple[nn.Module, CheckpointContents]:
    """Rebuild the model of a checkpoint with dequantised weights, and say what to do to inputs.

    To run it as an engine would, pass both to `autoq.layers.simulate.SimulatedModel`, with
    `weights=contents.dequantized`; the model alone computes with unquantised inputs.

    Args:
        path: a checkpoint of either container, or an unquantised one.
        dtype: of the model; the checkpoint's own by default.
    Raises:
        ExportError: the folder is no readable checkpoint, its manifest and tensors contradict
            each other, or they do not fit the architecture that config.json names.
    """
    checkpoint = read_quantized(path)
    stored_in = storage_dtype(checkpoint.config)
    model, missing = built_model(checkpoint, dtype or stored_in)
    model_map = discover(model, include=("*",))
    names = CheckpointNames(model, model_map)
    refuse_missing(checkpoint, missing - _stored_packed(checkpoint, names, model_map))
    reader = SlotReader(checkpoint, names, model_map)
    contents = _contents(checkpoint, reader, model_map, stored_in, model)
    for name, matrix in contents.dequantized.items():
        slot = model_map.slots[name]
        parameter = getattr(model.get_submodule(slot.module), slot.parameter)
        dtype = declared_dtype(model, f"{slot.module}.{slot.parameter}", parameter.dtype)
        parameter.data = parameter.data.to(dtype)
        slot_weight(model, slot).copy_(matrix)
    return model, contents


def simulated_checkpoint(path: Path | str, *, dtype: torch.dtype | None = None) -> SimulatedModel:
    """The checkpoint's model, computing in the formats it is stored in.

    Args and errors are those of `load_checkpoint_for_evaluation`; restoring is not possible.
    """
    return _simulated(*load_checkpoint_for_evaluation(path, dtype=dtype))


def transformers_logits(
    path: Path | str, input_ids: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What transformers computes from a compressed-tensors checkpoint, on the CPU.

    Args:
        input_ids: int64 [batch, tokens].
        dtype: of the model. Weights of nvfp4 layers are of bfloat16 precision in any case, as
            transformers unpacks them to nothing else.
    Returns:
        Logits [batch, tokens, vocabulary], or hidden states as `forward_logits` gives them.
    Raises:
        ExportError: the checkpoint is of the modelopt container, which transformers misreads.
        VerificationError: transformers cannot load it, or finds keys missing, unexpected or of
            another shape.
    """
    checkpoint = read_quantized(path)
    if checkpoint.container is Container.MODELOPT:
        raise ExportError(
            f"transformers reads compressed-tensors checkpoints only, and {path} is modelopt; "
            "export it with --container compressed-tensors"
        )
    model = transformers_model(checkpoint, dtype)
    with torch.no_grad(), quiet_transformers():  # which unpacks what it needs as it goes
        return forward_logits(model, input_ids)


def verify_logits(path: Path | str, input_ids: Tensor) -> float:
    """Compare transformers' logits of a compressed-tensors checkpoint with our simulation's.

    Returns:
        Root mean square of the difference, relative to ours; at most `LOGITS_BOUND`.
    Raises:
        VerificationError: transformers cannot load it cleanly, or the difference is larger.
    """
    theirs = transformers_logits(path, input_ids)
    ours = _logits_with_transformers_weights(path, input_ids)
    difference = float((theirs - ours).norm() / ours.norm())
    if not difference <= LOGITS_BOUND:
        raise VerificationError(
            f"transformers' logits of {path} differ from the simulation's by {difference:.2g} of "
            f"their size, more than {LOGITS_BOUND:g}; the checkpoint is not what was searched"
        )
    return difference


def _logits_with_transformers_weights(path: Path | str, input_ids: Tensor) -> Tensor:
    model, contents = load_checkpoint_for_evaluation(path, dtype=torch.float32)
    simulated = _simulated(model, contents)
    for name, fmt in contents.slot_formats.items():
        slot = contents.model_map.slots[name]
        if fmt != NONE and FORMATS[fmt].weight_element is WeightElement.E2M1:
            weight = slot_weight(model, slot)
            weight.copy_(weight.bfloat16())
        elif fmt != NONE and slot.kind is SlotKind.EXPERT:
            weight = slot_weight(model, slot)  # unpacked to the dtype of its scales
            weight.copy_(weight.to(contents.storage_dtype))
    with torch.no_grad():
        return forward_logits(simulated.model, input_ids)


def _stored_packed(
    checkpoint: QuantizedCheckpoint, names: CheckpointNames, model_map: ModelMap
) -> set[str]:
    """Parameters that the checkpoint has as codes and scales."""
    return {
        f"{slot.module}.{slot.parameter}"
        for slot in model_map.slots.values()
        if all(part.module in checkpoint.formats for part in names.parts(slot.name))
    }


class _Dequantized(Mapping[SlotName, Tensor]):
    """Matrices that are read and dequantised when asked for."""

    def __init__(self, reader: SlotReader, slots: list[SlotName]) -> None:
        self._reader = reader
        self._slots = dict.fromkeys(slots)

    def __getitem__(self, name: SlotName) -> Tensor:
        if name not in self._slots:
            raise KeyError(name)
        return self._reader.dequantized(name)

    def __iter__(self) -> Iterator[SlotName]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def _simulated(model: nn.Module, contents: CheckpointContents) -> SimulatedModel:
    simulated = SimulatedModel(
        model,
        contents.model_map.slots,
        contents.slot_formats,
        contents.calibration,
        container=contents.container or Container.MODELOPT,
        scale_dtype=contents.storage_dtype,
        weights=contents.dequantized,
        keep_originals=False,
    )
    simulated.set_kv_cache(contents.kv_cache)
    return simulated


def _contents(
    checkpoint: QuantizedCheckpoint,
    reader: SlotReader,
    model_map: ModelMap,
    storage_dtype: torch.dtype,
    model: nn.Module,
) -> CheckpointContents:
    formats = {slot: reader.format_of(slot) for slot in model_map.slots}
    quantized = [slot for slot, fmt in formats.items() if fmt != NONE]
    return CheckpointContents(
        container=checkpoint.container,
        model_map=model_map,
        slot_formats=formats,
        dequantized=_Dequantized(reader, quantized),
        calibration={(slot, formats[slot]): reader.calibration(slot) for slot in quantized},
        storage_dtype=storage_dtype,
        config=checkpoint.config,
        kv_cache=checkpoint.cache_simulation(model),
    )


def transformers_model(checkpoint: QuantizedCheckpoint, dtype: torch.dtype) -> nn.Module:
    """The model that transformers loads, with nothing missing, unexpected or of another shape.

    Raises:
        VerificationError: it cannot, or something is.
    """
    try:
        with quiet_transformers():
            model, report = model_class(checkpoint).from_pretrained(
                str(checkpoint.path),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                experts_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # as above
        raise VerificationError(
            f"transformers cannot load {checkpoint.path}: {type(error).__name__}: {error}"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            first = min(str(key) for key in report[kind])
            raise VerificationError(
                f"transformers finds {kind.replace('_', ' ')} in {checkpoint.path}: {first}"
            )
    return _mended(model.eval(), dtype)


def _mended(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Mend what keeps transformers 5.23 and compressed-tensors 0.20 from the declared arithmetic.

    FP4 and MX weights are unpacked to bfloat16, and unquantised experts keep the dtype they are
    stored in, whatever the model's dtype; T5 rounds inputs to what it sees there. Of an input [tokens, features], as OPT's feed-forward has it,
    all tokens get one scale instead of one each; with a batch dimension they get their own. A
    token's INT8 scale is its largest magnitude / 127.5 there, and / 127 in GPU engines: their
    rounding stands in for it.
    """
    model.register_forward_pre_hook(partial(_widen_unpacked, dtype))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and getattr(scheme, "weights", None) is None:
            continue  # an attention: the scheme is its cache's
        if scheme is not None:
            _DeclaredArithmetic(module)
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


def _widen_unpacked(dtype: torch.dtype, model: nn.Module, _: tuple[Any, ...]) -> None:
    """Runs after the hook of the whole model that unpacks weights when it is first called."""
    for module in model.modules():
        status: Any = getattr(module, "quantization_status", None)
        weight = getattr(module, "weight", None)
        if status is not None and status.value == "decompressed" and weight is not None:
            weight.data = weight.data.to(dtype)


class _DeclaredArithmetic:
    """Hooks that run next to a quantised module's forward, after the one that unpacks its weight."""

    def __init__(self, module: nn.Module) -> None:
        self._adds_batch = False
        scheme: Any = module.quantization_scheme
        inputs = scheme.input_activations
        self._rounds_to_int8 = inputs is not None and (inputs.type, inputs.num_bits) == ("int", 8)
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values, *others = inputs
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        weight.data = weight.data.to(values.dtype)
        if self._rounds_to_int8:
            scheme: Any = module.quantization_scheme
            module.quantization_scheme = scheme.model_copy(update={"input_activations": None})
            values = int8.fake_quantize(values)
        self._adds_batch = values.ndim == 2
        return (values[None] if self._adds_batch else values, *others)

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[0] if self._adds_batch else output
