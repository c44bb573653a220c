"""Writing tensors to sharded safetensors, one shard in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from autoq.errors import ExportError
from autoq.export._folder import file_sha256
from autoq.export._read_back import compare_with_file
from autoq.memory import give_back_freed_memory

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Engines look at this key to know the framework; without it transformers refuses the file.
_METADATA = {"format": "pt"}


_LARGEST_REUSED_BYTES = 512 << 20
"""Shards up to this size lie in memory that is taken once for all of them."""

_ALIGNMENT = 64  # of a cache line; every dtype is content with it


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would not fit.

    A shard that was written is read back and compared at once, while its tensors are there. The
    disk takes it, and it is read for its hash, while the next is being made.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._reused = _Reused(max_shard_bytes if max_shard_bytes <= _LARGEST_REUSED_BYTES else 0)
        self._pending: dict[str, Tensor] = {}
        self._memory: set[int] = set()
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="autoq-disk")
        self._flushes: list[Future[str]] = []
        self.names: set[str] = set()
        """Of every tensor that was taken over."""
        self.hashes: dict[str, str] = {}
        """File -> SHA-256, when `finish` is through."""

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors over; they must not change until `finish`.

        Raises:
            ExportError: a name comes twice.
            VerificationError: a file does not read back as it was written.
        """
        for name, tensor in tensors:
            if name in self.names:
                raise ExportError(
                    f"a checkpoint has every tensor once, and {name} comes from two modules; "
                    "the model's names cannot be told apart on disk"
                )
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._max_shard_bytes:
                self._write_shard()
            self._pending[name] = self._owned(tensor)
            self.names.add(name)
            self._pending_bytes += size
            self._total_bytes += size

    def _owned(self, tensor: Tensor) -> Tensor:
        """Safetensors refuses tensors of one file that share memory, such as one scale of two."""
        copy = self._reused.copy_of(tensor)
        if copy is not None:
            return copy
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in self._memory:
            stored = stored.clone()
        self._memory.add(stored.untyped_storage().data_ptr())
        return stored

    def finish(self) -> None:
        """Write what is left, give the files their final names, and write the index.

        Raises:
            VerificationError: a file does not read back as it was written.
        """
        if self._pending or not self._shards:
            self._write_shard()
        hashes = [flush.result() for flush in self._flushes]  # raises what the disk had to say
        self._disk.shutdown()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            file = SINGLE_FILE if count == 1 else file
            self._partial(number).rename(self._folder / file)
            self.hashes[file] = hashes[number]
            weight_map.update(dict.fromkeys(names, file))
        if count == 1:
            return
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (self._folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")

    def _partial(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"

    def _write_shard(self) -> None:
        path = self._partial(len(self._shards))
        save_file(self._pending, path, metadata=_METADATA)
        self._flushes.append(self._disk.submit(_flushed, path))
        compare_with_file(self._pending, path)
        self._shards.append(list(self._pending))
        self._pending = {}
        self._memory = set()
        self._reused.clear()
        self._pending_bytes = 0
        give_back_freed_memory()


def _flushed(path: Path) -> str:
    """Have the disk take a file; its hash."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return file_sha256(path)


class _Reused:
    """Memory of a fixed size that takes copies of tensors, until it is cleared for others.

    Touching fresh memory costs more than filling what is there, several times as much on virtual
    machines; with long-lived tensors in here, what is short-lived finds its place again, too.
    """

    def __init__(self, size: int) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8)
        self._used = 0

    def copy_of(self, tensor: Tensor) -> Tensor | None:
        """A contiguous copy on the CPU; None where the rest of the memory is too small."""
        end = self._used + tensor.nbytes
        if end > len(self._memory):
            return None
        place = self._memory[self._used : end].view(tensor.dtype).view(tensor.shape)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return place.copy_(tensor.detach())

    def clear(self) -> None:
        """Give the memory free; tensors in it will be overwritten."""
        self._used = 0
