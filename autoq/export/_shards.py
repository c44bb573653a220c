"""Writing tensors to sharded safetensors, one shard in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from autoq.errors import ExportError
from autoq.export._folder import file_sha256
from autoq.memory import give_back_freed_memory

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Engines look at this key to know the framework; without it transformers refuses the file.
_METADATA = {"format": "pt"}


_WORD_BYTES = 8
_HALF_WORD_BITS = np.uint64(32)
_WORDS_AT_ONCE = 1 << 14


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and bytes, against accidents and not against forgers.

    The bytes are summed up as 64-bit words, each times an odd number of its own, in stretches of
    128 KiB, and so are the words' upper halves, whose bits would else reach few of the sum's;
    BLAKE2b takes the sums. Several times as fast as BLAKE2b of everything. A word that changed
    always changes its stretch's sum; other accidents are missed once in about 2**32.
    Source: multilinear hashing, Lemire and Kaser, "Strongly universal string hashing is fast" (2014).
    """
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy()
    whole = len(content) // _WORD_BYTES * _WORD_BYTES
    digest.update(_stretch_sums(content[:whole]).data)
    digest.update(content[whole:].data)
    return digest.hexdigest()


def _stretch_sums(content: NDArray[np.uint8]) -> NDArray[np.uint64]:
    if content.ctypes.data % _WORD_BYTES:
        content = content.copy()
    words, keys = content.view(np.uint64), _odd_numbers()
    sums = []
    for start in range(0, len(words), _WORDS_AT_ONCE):
        stretch = words[start : start + _WORDS_AT_ONCE]
        own = keys[: len(stretch)]
        sums += [stretch @ own, (stretch >> _HALF_WORD_BITS) @ own]
    return np.array(sums, dtype=np.uint64)


@cache
def _odd_numbers() -> NDArray[np.uint64]:
    numbers = np.random.default_rng(0).integers(2**64, size=_WORDS_AT_ONCE, dtype=np.uint64)
    return numbers | np.uint64(1)


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would not fit.

    The disk takes a shard, which is then read for its hash, while the next is being made.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._memory: set[int] = set()
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="autoq-disk")
        self._flushes: list[Future[str]] = []
        self.digests: dict[str, str] = {}
        """Name -> digest of every tensor that was taken over."""
        self.hashes: dict[str, str] = {}
        """File -> SHA-256, when `finish` is through."""

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take tensors over; they must not change until `finish`.

        Raises:
            ExportError: a name comes twice.
        """
        for name, tensor in tensors:
            if name in self.digests:
                raise ExportError(
                    f"a checkpoint has every tensor once, and {name} comes from two modules; "
                    "the model's names cannot be told apart on disk"
                )
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._max_shard_bytes:
                self._write_shard()
            self._pending[name] = self._owned(tensor)
            self.digests[name] = tensor_digest(self._pending[name])
            self._pending_bytes += size
            self._total_bytes += size

    def _owned(self, tensor: Tensor) -> Tensor:
        """Safetensors refuses tensors of one file that share memory, such as one scale of two."""
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in self._memory:
            stored = stored.clone()
        self._memory.add(stored.untyped_storage().data_ptr())
        return stored

    def finish(self) -> None:
        """Write what is left, give the files their final names, and write the index."""
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
        self._shards.append(list(self._pending))
        self._pending = {}
        self._memory = set()
        self._pending_bytes = 0
        give_back_freed_memory()


def _flushed(path: Path) -> str:
    """Have the disk take a file; its hash."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return file_sha256(path)
