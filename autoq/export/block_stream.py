"""Running a model of which one block at a time is in memory.

The model is on the meta device. A run computes what stands before the blocks, from weights that are
read when they are first needed; blocks whose outputs are known answer with the last of those, the
block in question is computed, and the run ends there. So every block is called by the model's own
code, with the masks and positions that the code has for it. Outputs wait on the disk for the next
block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoq.errors import AutoqError, ModelError
from autoq.export._names import renamed_tensors
from autoq.export.streaming import SourceMatrices
from autoq.memory import give_back_freed_memory
from autoq.models import ModelMap, SlotKind, WeightSlot
from autoq.models.forward import forward_logits


class _Reached(Exception):
    """The block in question was computed."""


class BlockStream:
    """A model's blocks, one after the other, and what each gives for some inputs."""

    def __init__(
        self,
        model: nn.Module,
        model_map: ModelMap,
        matrices: SourceMatrices,
        inputs: Sequence[Tensor],
        folder: Path,
    ) -> None:
        """
        Args:
            model: on the meta device, in the dtype to compute in; weights come and go.
            matrices: where its weights are.
            inputs: int64 [sequences, tokens] each.
            folder: where outputs of blocks are kept; about twice what a block gives for all inputs.
        Raises:
            ModelError: the model is an encoder-decoder, or has no blocks.
            ExportError: a tensor has no name of its own in the checkpoint.
        """
        _refuse_others(model, model_map)
        self._model, self._map, self._matrices = model, model_map, matrices
        self._inputs = inputs
        self._embeddings: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._outputs = _Outputs(folder)
        self._blocks = [model.get_submodule(path) for path in model_map.blocks]
        self._slots: dict[str, list[WeightSlot]] = {}
        for slot in model_map.slots.values():
            self._slots.setdefault(f"{slot.module}.{slot.parameter}", []).append(slot)
        names = [name for name in model.state_dict() if name not in self._slots]
        self._names = renamed_tensors(model, names)
        _make_buffers(model)
        self._read_outside_when_needed()

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """The block, with its weights while the context holds.

        Raises:
            ModelError: a weight is missing, or has another shape than the architecture says.
        """
        path, block = self._map.blocks[number], self._blocks[number]
        empty = dict(block.named_parameters())
        try:
            for name, parameter in empty.items():
                _put(block, name, self._read(f"{path}.{name}", parameter))
            for name, buffer in list(block.named_buffers()):
                if buffer.is_meta:
                    _put(block, name, self._read(f"{path}.{name}", buffer))
            yield block
        finally:
            for name, parameter in empty.items():
                _put(block, name, parameter)
            give_back_freed_memory()

    def run(self, number: int, index: int, *, keep: bool) -> Tensor:
        """What a block, whose weights are there, gives for an input.

        Args:
            number: of the block; of all before it the outputs must have been kept.
            index: of the input.
            keep: whether the next block is to read it.
        Returns:
            Its hidden states [sequences, tokens, hidden].
        Raises:
            ModelError: the model cannot be run so.
        """
        found: list[Any] = []
        block = self._blocks[number]
        before = self._outputs.get(number - 1, index) if number else None
        with ExitStack() as stack:
            for earlier in self._blocks[:number]:
                stack.enter_context(_doing(earlier, lambda *_, **__: before))
            stack.enter_context(_doing(block, partial(_compute, block.forward, found)))
            try:
                with torch.no_grad():
                    forward_logits(self._model, self._inputs[index])
            except _Reached:
                pass
            except AutoqError:
                raise
            except Exception as error:  # whatever somebody's model code raises on the meta device
                raise self._refusal(number, error) from error
        if not found:
            raise self._refusal(number, "it never calls that block")
        if keep and not self._outputs.has(number, index):
            self._outputs.put(number, index, found[0])
        return _hidden(found[0])

    def forget(self, number: int) -> None:
        """Remove a block's outputs."""
        self._outputs.remove(number)

    def _refusal(self, number: int, reason: object) -> ModelError:
        return ModelError(
            f"{type(self._model).__name__} cannot be run block by block, at "
            f"{self._map.blocks[number]}: {reason}; search the model, and export that"
        )

    def _read(self, name: str, like: Tensor) -> Tensor:
        tensor = self._stored(name).to(like.dtype, copy=True)
        if tensor.shape != like.shape:
            raise ModelError(
                f"{name} must have shape {tuple(like.shape)} by config.json, and the files have "
                f"{tuple(tensor.shape)}; they do not belong together"
            )
        return tensor

    def _stored(self, name: str) -> Tensor:
        slots = self._slots.get(name)
        if slots is None:
            return self._matrices.source.tensor(self._names[name])
        if slots[0].kind is SlotKind.EXPERT:
            return torch.stack([self._matrices.matrix(slot) for slot in slots])
        matrix = self._matrices.matrix(slots[0])
        return matrix.t() if slots[0].kind is SlotKind.CONV1D else matrix

    def _read_outside_when_needed(self) -> None:
        inside = tuple(f"{path}." for path in self._map.blocks)
        for path, module in self._model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if own and not f"{path}.".startswith(inside):
                module.register_forward_pre_hook(partial(self._read_outside, path))

    def _read_outside(self, path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module is self._embeddings:
            self._read_rows(path, self._embeddings, arguments[0])
            return
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                _put(module, name, self._read(f"{path}.{name}", parameter))

    def _read_rows(self, path: str, module: nn.Embedding, ids: Tensor) -> None:
        """Rows of an embedding that are looked up; memory that nobody touches takes no room."""
        if module.weight.is_meta:
            rows = np.zeros(tuple(module.weight.shape), dtype=np.float32)
            _put(module, "weight", torch.from_numpy(rows))
        wanted = torch.unique(ids)
        stored = self._matrices.source.tensor(self._names[f"{path}.weight"])
        module.weight.data[wanted] = stored[wanted].float()


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype


class _Outputs:
    """What blocks gave for inputs, in files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[tuple[int, int], Any] = {}

    def has(self, block: int, index: int) -> bool:
        return (block, index) in self._kept

    def put(self, block: int, index: int, output: Any) -> None:
        """Keep an output: a tensor, or tuples and lists with tensors in them."""
        self._kept[block, index] = self._stored(output, self._path(block, index))

    def get(self, block: int, index: int) -> Any:
        return self._read(self._kept[block, index])

    def _stored(self, output: Any, path: Path) -> Any:
        """The output with files in the places of tensors, named after their places."""
        if isinstance(output, Tensor):
            output.contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
            return _Stored(path, output.shape, output.dtype)
        if type(output) not in (tuple, list):
            return output
        parts = (
            self._stored(part, path.with_name(f"{path.name}-{place}"))
            for place, part in enumerate(output)
        )
        return type(output)(parts)

    def _read(self, stored: Any) -> Any:
        if isinstance(stored, _Stored):
            content = torch.from_numpy(np.fromfile(stored.path, dtype=np.uint8))
            return content.view(stored.dtype).view(stored.shape)
        if type(stored) in (tuple, list):
            return type(stored)(self._read(part) for part in stored)
        return stored

    def remove(self, block: int) -> None:
        for number, index in [key for key in self._kept if key[0] == block]:
            for file in self._folder.glob(f"{self._path(number, index).name}*"):
                file.unlink()
            del self._kept[number, index]

    def _path(self, block: int, index: int) -> Path:
        return self._folder / f"block-{block}-input-{index}."


def _refuse_others(model: nn.Module, model_map: ModelMap) -> None:
    is_double = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_double or not model_map.blocks:
        kind = "is an encoder-decoder" if is_double else "has none"
        raise ModelError(
            "calibrating block by block needs a model that is one row of blocks, and "
            f"{type(model).__name__} {kind}; search the model, and export that"
        )


def _compute(forward: Callable[..., Any], found: list[Any], *args: Any, **kwargs: Any) -> Any:
    found.append(forward(*args, **kwargs))
    raise _Reached


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(
            "a model that is run block by block must pass hidden states from block to block, and its "
            f"blocks give {type(hidden).__name__}; search the model, and export that"
        )
    return hidden


@contextmanager
def _doing(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The block computes something else."""
    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its path from the module."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf not in owner._parameters:
        owner._buffers[leaf] = tensor
    elif isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _make_buffers(model: nn.Module) -> None:
    """Give buffers that no checkpoint holds the values that transformers computes for them."""
    from transformers import PreTrainedModel

    makers = {p: m for p, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    for path, module in model.named_modules():
        lacking = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        ]
        for name in lacking:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        owners = [p for p in makers if not p or f"{path}.".startswith(f"{p}.")]
        if lacking and owners:
            maker: Any = makers[max(owners, key=len)]
            maker._init_weights(module)
