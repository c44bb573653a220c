"""Tensors that wait for their turn: in memory as far as a bound allows, the others in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int]
"""A block and an input."""


@dataclass(frozen=True, slots=True)
class _InFile:
    """A tensor in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A tensor in the CPU's memory."""

    tensor: Tensor
    device: torch.device  # that it came from


class KeptTensors:
    """What blocks gave for inputs: tensors, or tuples and lists with tensors in them."""

    def __init__(self, folder: Path, memory_bytes: int = 0) -> None:
        """
        Args:
            folder: for what does not fit in memory.
            memory_bytes: what all tensors in memory may take together.
        """
        self._folder = folder
        self._free = memory_bytes
        self._kept: dict[Key, Any] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def put(self, key: Key, output: Any) -> None:
        """Keep an output.

        Raises:
            OSError: the folder cannot be written, or is full.
        """
        name = f"block-{key[0]}-input-{key[1]}."
        self._kept[key] = self._stored(output, self._folder / name)

    def get(self, key: Key) -> Any:
        """An output, on the device that it came from."""
        return self._read(self._kept[key])

    def take(self, key: Key) -> Any:
        """The same, and it is not kept any longer."""
        output = self.get(key)
        self._drop(key)
        return output

    def remove(self, block: int) -> None:
        """Drop all outputs of a block."""
        for key in [key for key in self._kept if key[0] == block]:
            self._drop(key)

    def clear(self) -> None:
        """Drop everything."""
        for key in list(self._kept):
            self._drop(key)

    def _drop(self, key: Key) -> None:
        self._free_parts(self._kept.pop(key))

    def _free_parts(self, stored: Any) -> None:
        if isinstance(stored, _InFile):
            stored.path.unlink()
        elif isinstance(stored, _InMemory):
            self._free += stored.tensor.nbytes
        elif type(stored) in (tuple, list):
            for part in stored:
                self._free_parts(part)

    def _stored(self, output: Any, path: Path) -> Any:
        """The output with what is kept in the places of tensors, files named after their places."""
        if isinstance(output, Tensor):
            return self._stored_tensor(output.detach(), path)
        if type(output) not in (tuple, list):
            return output
        parts = (
            self._stored(part, path.with_name(f"{path.name}-{place}"))
            for place, part in enumerate(output)
        )
        return type(output)(parts)

    def _stored_tensor(self, tensor: Tensor, path: Path) -> _InFile | _InMemory:
        if tensor.nbytes <= self._free:
            self._free -= tensor.nbytes
            # A copy, as the tensor may be a part of a larger one, or be written to.
            return _InMemory(tensor.to("cpu", copy=True).contiguous(), tensor.device)
        content = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            path.write_bytes(content.data)  # numpy's own writing loses the reason where it fails
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        return _InFile(path, tensor.shape, tensor.dtype, tensor.device)

    def _read(self, stored: Any) -> Any:
        if isinstance(stored, _InFile):
            content = torch.from_numpy(np.fromfile(stored.path, dtype=np.uint8))
            return content.view(stored.dtype).view(stored.shape).to(stored.device)
        if isinstance(stored, _InMemory):
            # A copy where it stays on the CPU: models add to what they are given.
            return stored.tensor.to(stored.device, copy=True)
        if type(stored) in (tuple, list):
            return type(stored)(self._read(part) for part in stored)
        return stored
