"""Writing tensors to sharded safetensors, one shard in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from autoq.errors import ExportError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Engines look at this key to know the framework; without it transformers refuses the file.
_METADATA = {"format": "pt"}


def tensor_digest(tensor: Tensor) -> str:
    """BLAKE2b of a tensor's dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ShardWriter:
    """Collects tensors and writes a shard whenever the next one would not fit."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._memory: set[int] = set()
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self.digests: dict[str, str] = {}
        """Name -> digest of every tensor that was taken over."""

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
        count = len(self._shards)
        if count == 1:
            self._partial(0).rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._partial(number).rename(self._folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (self._folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")

    def _partial(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"

    def _write_shard(self) -> None:
        save_file(self._pending, self._partial(len(self._shards)), metadata=_METADATA)
        self._shards.append(list(self._pending))
        self._pending = {}
        self._memory = set()
        self._pending_bytes = 0
