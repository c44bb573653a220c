"""Running a model of which one block at a time is in memory.

The model is on the meta device. A run computes what stands before the blocks, from weights that are
read when they are first needed; blocks whose outputs are known answer with the last of those, the
block in question is computed, and the run ends there. So every block is called by the model's own
code, with the masks and positions that the code has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from autoq.errors import AutoqError, ModelError
from autoq.memory import give_back_freed_memory
from autoq.models._types import ModelMap
from autoq.models.forward import forward_logits
from autoq.models.kept_tensors import KeptTensors

_EMBEDDED_BYTES = 64 << 20
"""Rows of an embedding that stay in memory; with more of them, reading begins anew."""


class StoredWeights(Protocol):
    """A model's weights by their names in the model, wherever they are."""

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a parameter or buffer, in the shape that it has in the model.

        Raises:
            ModelError, ExportError: it is not there, has another shape, or cannot be read.
        """
        ...

    def rows(self, name: str, wanted: Tensor) -> Tensor:
        """Some rows of a parameter, in the dtype on disk.

        Args:
            wanted: int64 [rows], on the CPU.
        Raises:
            ModelError, ExportError: as `read_into`.
        """
        ...


class _Reached(Exception):
    """The block in question was computed."""


class StreamedModel:
    """A model that is one row of blocks, each of which has weights only while it is worked on."""

    def __init__(
        self,
        model: nn.Module,
        model_map: ModelMap,
        weights: StoredWeights,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            model: on the meta device, in the dtype to compute in; weights come and go.
            device: where they come to; the CPU if left out.
        Raises:
            ModelError: the model is an encoder-decoder, or has no blocks.
        """
        _refuse_others(model, model_map)
        self.model, self.map = model, model_map
        self.device = device or torch.device("cpu")
        self._weights = weights
        self._embeddings: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._embedded = 0
        self._blocks = [model.get_submodule(path) for path in model_map.blocks]
        self._outside = _outside(model, model_map)
        self._empty = {
            path: dict(module.named_parameters(recurse=False)) for path, module in self._outside
        }
        _make_buffers(model, self.device)
        for path, module in self._outside:
            module.register_forward_pre_hook(partial(self._read_outside, path))

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._blocks)

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """The block, with its weights while the context holds.

        Raises:
            ModelError: a weight is missing, or has another shape than the architecture says.
        """
        path, block = self.map.blocks[number], self._blocks[number]
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

    def output_of(self, number: int, ids: Tensor, before: Any) -> Any:
        """What a block, whose weights are there, gives for an input.

        Args:
            number: of the block.
            ids: int64 [sequences, tokens].
            before: what the block before it gave; of the first nothing is asked.
        Returns:
            Hidden states, or a tuple or list that begins with them.
        Raises:
            ModelError: the model cannot be run so.
        """
        found: list[Any] = []
        block = self._blocks[number]
        with ExitStack() as stack:
            for earlier in self._blocks[:number]:
                stack.enter_context(_doing(earlier, lambda *_, **__: before))
            stack.enter_context(_doing(block, partial(_compute, block.forward, found)))
            try:
                forward_logits(self.model, ids)
            except _Reached:
                pass
            except AutoqError:
                raise
            except Exception as error:  # whatever somebody's model code raises on the meta device
                raise self._refusal(number, error) from error
        if not found:
            raise self._refusal(number, "it never calls that block")
        return found[0]

    @contextmanager
    def ending_with(self, last: Any) -> Iterator[None]:
        """All blocks are done: running the model computes what stands behind them.

        Args:
            last: what the last block gave, or what `with_hidden` made of it.
        """
        with ExitStack() as stack:
            for block in self._blocks:
                stack.enter_context(_doing(block, lambda *_, **__: last))
            yield

    @contextmanager
    def loading_blocks(self) -> Iterator[None]:
        """The model runs as a whole, and each block has its weights while it is computed."""
        with ExitStack() as stack:
            for number, block in enumerate(self._blocks):
                stack.enter_context(_doing(block, partial(self._loaded, number, block.forward)))
            yield

    def _loaded(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.block(number):
            return forward(*args, **kwargs)

    def forget_outside(self) -> None:
        """Free the weights outside the blocks; they are read again when they are needed."""
        self._embedded = 0
        for path, module in self._outside:
            for name, parameter in self._empty[path].items():
                _put(module, name, parameter)
        give_back_freed_memory()

    def _refusal(self, number: int, reason: object) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} cannot be run block by block, at "
            f"{self.map.blocks[number]}: {reason}; search the model, and export that"
        )

    def _read(self, name: str, like: Tensor) -> Tensor:
        tensor = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        self._weights.read_into(name, tensor)
        return tensor

    def _read_outside(self, path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module is self._embeddings:
            self._read_rows(path, self._embeddings, arguments[0])
            return
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                _put(module, name, self._read(f"{path}.{name}", parameter))

    def _read_rows(self, path: str, module: nn.Embedding, ids: Tensor) -> None:
        """Rows of an embedding that are looked up; memory that nobody touches takes no room."""
        weight = module.weight
        if weight.is_meta or self._embedded > _EMBEDDED_BYTES:
            dtype = weight.dtype
            if self.device.type == "cpu":
                # Fresh memory of numpy's is mapped, not touched.
                words = np.zeros(weight.numel() * dtype.itemsize, dtype=np.uint8)
                fresh = torch.from_numpy(words).view(dtype).view(weight.shape)
            else:
                fresh = torch.zeros(weight.shape, dtype=dtype, device=self.device)
            _put(module, "weight", fresh)
            self._embedded = 0
        wanted = torch.unique(ids)
        rows = self._weights.rows(f"{path}.weight", wanted.cpu())
        module.weight.data[wanted] = rows.to(self.device, module.weight.dtype)
        self._embedded += rows.numel() * module.weight.dtype.itemsize


class BlockStream:
    """A model's blocks, one after the other, and what each gives for some inputs."""

    def __init__(
        self,
        streamed: StreamedModel,
        inputs: Sequence[Tensor],
        folder: Path,
        memory_bytes: int = 0,
    ) -> None:
        """
        Args:
            inputs: int64 [sequences, tokens] each.
            folder: where outputs of blocks are kept; about twice what a block gives for all inputs.
            memory_bytes: what of them may stay in memory.
        """
        self._streamed = streamed
        self._inputs = inputs
        self._outputs = KeptTensors(folder, memory_bytes)

    def block(self, number: int) -> Any:
        """See `StreamedModel.block`: the block, with its weights while the context holds."""
        return self._streamed.block(number)

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
        before = self._outputs.get((number - 1, index)) if number else None
        with torch.no_grad():
            found = self._streamed.output_of(number, self._inputs[index], before)
        if keep and (number, index) not in self._outputs:
            self._outputs.put((number, index), found)
        return hidden_of(found)

    @property
    def model(self) -> nn.Module:
        """The model, of which one block at most has weights."""
        return self._streamed.model

    def finish(self, index: int) -> Tensor:
        """What the model gives for an input, from the kept output of the last block.

        What stands before the blocks and behind them is computed, and has its weights from then on.
        """
        last = self._outputs.get((self._streamed.blocks - 1, index))
        with torch.no_grad(), self._streamed.ending_with(last):
            return forward_logits(self._streamed.model, self._inputs[index])

    def check(self, index: int) -> None:
        """See that all blocks were run as the model runs them, by the kept outputs of the last.

        Args:
            index: of an input, a small one: the whole model is read once more.
        Raises:
            ModelError: the model does not hand hidden states from each block to the next.
        """
        ids, last = self._inputs[index], self._outputs.get((self._streamed.blocks - 1, index))
        with torch.no_grad():
            with self._streamed.ending_with(last):
                found = forward_logits(self._streamed.model, ids)
            with self._streamed.loading_blocks():
                expected = forward_logits(self._streamed.model, ids)
        if not torch.equal(found, expected):
            raise ModelError(
                "a model that is run block by block must hand nothing but hidden states from each "
                f"block to the next, and {type(self._streamed.model).__name__} computes something "
                "else so; search the model in memory"
            )

    def forget(self, number: int) -> None:
        """Remove a block's outputs."""
        self._outputs.remove(number)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block gives.

    Raises:
        ModelError: there are none.
    """
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(
            "a model that is run block by block must pass hidden states from block to block, and its "
            f"blocks give {type(hidden).__name__}; search the model, and export that"
        )
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a block gave, with other hidden states."""
    if isinstance(output, tuple | list):
        return type(output)([hidden, *output[1:]])
    return hidden


def _refuse_others(model: nn.Module, model_map: ModelMap) -> None:
    is_double = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_double or not model_map.blocks:
        kind = "is an encoder-decoder" if is_double else "has none"
        raise ModelError(
            "calibrating block by block needs a model that is one row of blocks, and "
            f"{type(model).__name__} {kind}; search the model, and export that"
        )


def _outside(model: nn.Module, model_map: ModelMap) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own that lie in no block, by path."""
    inside = tuple(f"{path}." for path in model_map.blocks)
    return [
        (path, module)
        for path, module in model.named_modules()
        if dict(module.named_parameters(recurse=False)) and not f"{path}.".startswith(inside)
    ]


def _compute(forward: Callable[..., Any], found: list[Any], *args: Any, **kwargs: Any) -> Any:
    found.append(forward(*args, **kwargs))
    raise _Reached


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


def _make_buffers(model: nn.Module, device: torch.device) -> None:
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
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        owners = [p for p in makers if not p or f"{path}.".startswith(f"{p}.")]
        if lacking and owners:
            maker: Any = makers[max(owners, key=len)]
            maker._init_weights(module)
