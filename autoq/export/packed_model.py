"""Loading a checkpoint so that its weights stay packed: no matrix is dequantised to be kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ExportError
from autoq.export._building import (
    built_model,
    declared_dtype,
    mismatch,
    refuse_missing,
    storage_dtype,
)
from autoq.export._names import CheckpointNames
from autoq.export.reader import QuantizedCheckpoint, SlotReader, read_quantized
from autoq.formats import NONE
from autoq.layers.packed import PackedExperts, PackedMatrix, packed_rows
from autoq.models import ModelMap, SlotKind, WeightSlot
from autoq.models.discovery import discover


def load_packed(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a checkpoint, its quantised matrices as codes and scales.

    It computes what `simulated_checkpoint`'s model computes; on CPUs bit for bit. Parameters need
    no gradient, as none flows through packed matrices.

    Args:
        path: a checkpoint of either container, or an unquantised one, which is loaded as it is.
        dtype: of what is not quantised, and of what layers give; the checkpoint's own by default.
        device: where the model goes; packed matrices go there one by one.
        trust_remote_code: run the model code that lies in the folder.
    Raises:
        ExportError: the folder is no readable checkpoint, its manifest and tensors contradict
            each other, or they do not fit the architecture.
    """
    checkpoint = read_quantized(path)
    packing = _Packing(checkpoint, torch.device(device)) if checkpoint.formats else None
    model, missing = built_model(
        checkpoint,
        dtype or storage_dtype(checkpoint.config),
        change=None if packing is None else packing.prepare,
        trust_remote_code=trust_remote_code,
    )
    refuse_missing(checkpoint, missing)
    if packing is not None:
        packing.fill(model)
        model.requires_grad_(False)
        config: Any = model.config
        config.quantization_config = dict(checkpoint.manifest)
    _refuse_unfilled(checkpoint, model)
    _load_generation_config(checkpoint.path, model)
    moved: nn.Module = model.to(device)
    kv_cache = checkpoint.cache_simulation(moved)
    if kv_cache is not None:
        kv_cache.install()
    return moved


class _Pending(nn.Module):
    """Stands where a packed matrix will be while transformers loads everything else.

    What looks for weights to fill with noise finds these filled.
    """

    _is_hf_initialized = True

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight.detach()  # on the meta device, and in no state dict
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_parameter("bias", bias)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a model gets a packed matrix, or those of the experts of one parameter."""

    parent: str
    name: str
    slots: tuple[WeightSlot, ...]
    dtype: torch.dtype  # of the parameter that is not there any more
    pending: _Pending


class _Packing:
    """Puts the packed matrices of one checkpoint into one model."""

    def __init__(self, checkpoint: QuantizedCheckpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._places: list[_Place] = []

    def prepare(self, model: nn.Module) -> None:
        """Take what is quantised out of a model whose parameters are on the meta device."""
        model_map = discover(model, include=("*",))
        names = self._names(model, model_map)
        self._reader = SlotReader(self._checkpoint, names, model_map)
        by_parameter: dict[tuple[str, str], list[WeightSlot]] = {}
        for slot in model_map.slots.values():
            by_parameter.setdefault((slot.module, slot.parameter), []).append(slot)
        for slots in by_parameter.values():
            if self._is_quantized(slots):
                self._places.append(_taken_out(model, slots))
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def fill(self, model: nn.Module) -> None:
        """Put packed matrices in, one by one; what is there already must have the right shape."""
        for name, tensor in model.state_dict().items():
            if (
                tensor.shape != self._shapes[name]
            ):  # transformers 5.20 takes any for quantised models
                raise mismatch(self._checkpoint, name, tensor.shape, self._shapes[name])
        for place in self._places:
            matrices = [self._matrix(slot, place) for slot in place.slots]
            is_linear = place.slots[0].kind is not SlotKind.EXPERT
            filled = matrices[0] if is_linear else PackedExperts(matrices)
            model.get_submodule(place.parent).add_module(place.name, filled.eval())
            self._checkpoint.release()

    def _matrix(self, slot: WeightSlot, place: _Place) -> PackedMatrix:
        parts, calibration = self._reader.packed(slot.name)
        matrix = packed_rows(
            parts,
            calibration,
            container=self._checkpoint.container,
            dtype=place.dtype,
            bias=place.pending.bias,
            transposed=slot.kind is SlotKind.CONV1D,
        )
        return matrix.to(self._device)

    def _is_quantized(self, slots: Sequence[WeightSlot]) -> bool:
        quantized = {self._reader.format_of(slot.name) != NONE for slot in slots}
        if len(quantized) > 1:
            raise ExportError(
                f"{self._checkpoint.path} has some experts of {slots[0].module} quantised and "
                "others not, which autoq does not load; export it with one format for them all"
            )
        return quantized.pop()

    def _names(self, model: nn.Module, model_map: ModelMap) -> CheckpointNames:
        """Names under which the checkpoint has all that it has quantised."""
        names = CheckpointNames(model, model_map)
        unknown = self._unknown(names, model_map)
        if unknown:
            with _every_conversion(model):
                names = CheckpointNames(model, model_map)
            if self._unknown(names, model_map):
                raise ExportError(
                    f"{self._checkpoint.path} has quantised weights for {unknown[0]}, which is no "
                    f"linear of {model_map.architecture}; it belongs to another model"
                )
        return names

    def _unknown(self, names: CheckpointNames, model_map: ModelMap) -> list[str]:
        known = {part.module for slot in model_map.slots for part in names.parts(slot)}
        return sorted(set(self._checkpoint) - known)


@contextmanager
def _every_conversion(model: Any) -> Iterator[None]:
    """Name tensors as if loading had used every conversion that the architecture offers.

    Those that add or remove a prefix are used for some checkpoints only, and so are left out
    before a model is loaded.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    try:
        yield
    finally:
        del model._weight_conversions


def _taken_out(model: nn.Module, slots: Sequence[WeightSlot]) -> _Place:
    """The place of a parameter that is replaced by something without weights."""
    slot = slots[0]
    owner = model.get_submodule(slot.module)
    weight: Tensor = getattr(owner, slot.parameter)
    dtype = declared_dtype(model, f"{slot.module}.{slot.parameter}", weight.dtype)
    parent, name = slot.module, slot.parameter
    bias: nn.Parameter | None = None
    if slot.kind is SlotKind.EXPERT:
        delattr(owner, slot.parameter)
    else:
        parent, _, name = slot.module.rpartition(".")
        bias = getattr(owner, "bias", None)
    pending = _Pending(weight.to(dtype), bias)
    model.get_submodule(parent).add_module(name, pending)
    return _Place(parent, name, tuple(slots), dtype, pending)


def _refuse_unfilled(checkpoint: QuantizedCheckpoint, model: nn.Module) -> None:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ExportError(
                f"{checkpoint.path} has no values for {name} of its architecture; "
                "its files do not belong together"
            )


def _load_generation_config(path: Path, model: Any) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (path / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise ExportError(
                f"{path / 'generation_config.json'} cannot be read: {error}"
            ) from error
