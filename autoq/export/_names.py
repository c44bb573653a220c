"""Where a model's tensors stand in its original checkpoint.

transformers renames, splits and fuses tensors while loading; engines want the names that are on
disk, so everything written goes back through the inverse of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoq.errors import ExportError
from autoq.formats import NONE, FormatName
from autoq.models import ModelMap, SlotKind, SlotName, WeightSlot
from autoq.models.families import expert_naming_known, expert_tensor_names


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPart:
    """The module of a checkpoint that holds some rows of a slot's matrix."""

    module: str
    first_row: int
    rows: int


class CheckpointNames:
    """Names in the original checkpoint, for one model."""

    def __init__(self, model: nn.Module, model_map: ModelMap) -> None:
        """
        Raises:
            ExportError: a module's weight is not one tensor in the checkpoint.
            ModelError: how the experts are spelled is not known.
        """
        self._model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        plain = [s.module for s in model_map.slots.values() if s.kind is not SlotKind.EXPERT]
        paths = {path for path, _ in model.named_modules()}
        left_out = [_excluded_slot(paths, slot.name) for slot in model_map.excluded]
        plain += [slot.module for slot in left_out if slot.kind is not SlotKind.EXPERT]
        self._modules = _renamed_modules(model, dict.fromkeys([*plain, *linear_modules(model)]))
        self._parts = {slot.name: self._parts_of(slot) for slot in model_map.slots.values()}
        self._left_out = self._left_out_modules(model, left_out)

    def module(self, path: str) -> str:
        """Name of a linear-like module."""
        return self._modules[path]

    def parts(self, slot: SlotName) -> tuple[CheckpointPart, ...]:
        """The modules that a slot is written to, by row; one, but for gate and up in one slot."""
        return self._parts[slot]

    def module_formats(self, slot_formats: Mapping[SlotName, FormatName]) -> dict[str, FormatName]:
        """Format of every linear-like module of the checkpoint, "none" for what is left out."""
        formats = {
            part.module: slot_formats.get(slot, NONE)
            for slot, parts in self._parts.items()
            for part in parts
        }
        for module in [*self._left_out, *self._modules.values()]:
            formats.setdefault(module, NONE)
        return formats

    @property
    def other_names(self) -> dict[str, str]:
        """Checkpoint module -> its path in transformers' model, where that is another."""
        return {name: path for path, name in self._modules.items() if path != name}

    def fusion_sets(self, model_map: ModelMap) -> list[list[str]]:
        """Modules that engines run as one matrix."""
        return [
            [part.module for slot in fused for part in self.parts(slot)]
            for group in model_map.groups
            for fused in group.fusion_sets
        ]

    def _left_out_modules(self, model: nn.Module, left_out: Iterable[WeightSlot]) -> list[str]:
        """Checkpoint modules that stay unquantised; experts that are stored in one piece too."""
        modules: dict[str, None] = {}
        for slot in left_out:
            if slot.kind is SlotKind.EXPERT and not expert_naming_known(self._model_type):
                modules[_name_of_experts(model, slot)] = None
            else:
                modules.update(dict.fromkeys(part.module for part in self._parts_of(slot)))
        return list(modules)

    def _parts_of(self, slot: WeightSlot) -> tuple[CheckpointPart, ...]:
        if slot.kind is SlotKind.EXPERT:
            names = expert_tensor_names(self._model_type, slot)
        else:
            names = (self._modules[slot.module],)
        rows = slot.out_features // len(names)
        return tuple(
            CheckpointPart(module=name, first_row=number * rows, rows=rows)
            for number, name in enumerate(names)
        )


def _excluded_slot(paths: set[str], name: SlotName) -> WeightSlot:
    """The slot that was left out under this name; its sizes are not known any more."""
    if name in paths:
        path, expert, parameter, kind = str(name), None, "weight", SlotKind.LINEAR
    else:
        path, number, parameter = name.rsplit(".", 2)
        expert, kind = int(number), SlotKind.EXPERT
    return WeightSlot(
        name=name,
        module=path,
        parameter=parameter,
        kind=kind,
        out_features=0,
        in_features=0,
        expert=expert,
    )


def _name_of_experts(model: nn.Module, slot: WeightSlot) -> str:
    """What a checkpoint calls the module with all experts of a layer."""
    marker = {f"{slot.module}.{slot.parameter}": torch.zeros(())}
    try:
        (name,) = checkpoint_tensors(model, marker)
    except (ValueError, IndexError, RuntimeError):
        return slot.module
    return name.rpartition(".")[0]


def linear_modules(model: nn.Module) -> list[str]:
    """Paths of everything that multiplies by a weight matrix of its own."""
    from transformers.pytorch_utils import Conv1D

    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]


def checkpoint_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Named tensors of the model, under the names and in the arrangement of its checkpoint.

    Tensors that the checkpoint holds in one piece have to be given together.
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def unquantized_groups(
    model: nn.Module, model_map: ModelMap, quantized: Iterable[WeightSlot]
) -> Iterator[dict[str, Tensor]]:
    """What stays as it is, in groups that fit into memory twice: a layer each, then the rest.

    Yields:
        Name in the model -> tensor. A shared tensor appears once, where transformers keeps it.
    """
    taken = {f"{slot.module}.{slot.parameter}" for slot in quantized} | tied_copies(model)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name not in taken:
            groups.setdefault(_block_of(name, model_map.blocks), {})[name] = tensor
    yield from groups.values()


def _block_of(name: str, blocks: Iterable[str]) -> str:
    return next((block for block in blocks if name.startswith(f"{block}.")), "")


def tied_copies(model: nn.Module) -> set[str]:
    """Names under which a tensor appears again, those that transformers calls tied first."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    owners: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    copies: set[str] = set()
    state = model.state_dict(keep_vars=True)
    for name in sorted(state, key=lambda key: key in tied):
        tensor = state[name]
        # On the meta device nothing has an address: there copies are one and the same object.
        address = id(tensor) if tensor.is_meta else tensor.data_ptr()
        place = (address, tensor.shape, tensor.stride())
        if tensor.numel() and owners.setdefault(place, name) != name:
            copies.add(name)
    return copies


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that share their tensor with another: name -> one other name."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in places.values()
        if len(names) > 1
        for name in names
    }


def renamed_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Name in the model -> name in the checkpoint, of tensors that are one there, too.

    Found by sending a marker through the renaming.

    Raises:
        ExportError: one of them is kept in pieces, or together with others.
    """
    wanted = list(names)
    # In float64 whatever the default is: bfloat16 counts to 256 only.
    markers = {
        name: torch.tensor(float(number), dtype=torch.float64) for number, name in enumerate(wanted)
    }
    try:
        renamed = checkpoint_tensors(model, markers)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ExportError(
            f"the checkpoint of {type(model).__name__} keeps the weight of a linear in several "
            f"pieces ({error}); exporting such a family is not supported, choose another model"
        ) from error
    found = {int(marker): name for name, marker in renamed.items()}
    if sorted(found) != list(range(len(wanted))):
        lost = [name for number, name in enumerate(wanted) if number not in found]
        raise ExportError(
            f"the checkpoint of {type(model).__name__} has no tensor of its own for {lost[0]}; "
            "exporting such a family is not supported, choose another model"
        )
    return {name: found[number] for number, name in enumerate(wanted)}


def _renamed_modules(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """Module path -> its name in the checkpoint."""
    paths = list(modules)
    names = renamed_tensors(model, [f"{path}.weight" for path in paths])
    return {path: names[f"{path}.weight"].removesuffix(".weight") for path in paths}
