"""The original's outputs on disk, so that measuring again does not run the original again."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.evaluators.compact import CompactLogits, bytes_per_token

DEFAULT_BYTES = 4 * 10**9
_LAYOUT = "autoq-reference-1"  # of the files; part of their key
_KEY = re.compile(r"[0-9a-f]{32}")
_FIELDS = ("indices", "log_probabilities", "log_rest", "next_token")
_BATCHES_AT_ONCE = 8  # computed before they are written, where changing between models is slow


@dataclass(frozen=True, slots=True)
class LogitsCache:
    """A folder of outputs, one subfolder for each model and tokens.

    Outputs are stored in full where all of them fit into the bound, else as their K likeliest
    tokens and the rest in one number, with the largest K that fits (see `CompactLogits`: the KL
    divergence is then a lower bound, and everything else exact). What was used longest ago is
    removed to make room. Files are safetensors; one that cannot be read is made again.
    """

    folder: Path
    max_bytes: int = DEFAULT_BYTES  # of the whole folder
    kept: int | None = None  # K; None: what fits

    def outputs(
        self, batches: Sequence[Tensor], *, fingerprint: str, width: int, dtype: torch.dtype
    ) -> CachedOutputs:
        """The outputs of one model on some tokens.

        Args:
            batches: token ids, int64 [sequences, tokens] each.
            fingerprint: of the model's weights.
            width: vocabulary, or features of a model that gives hidden states.
            dtype: of the model, whose outputs have it, too.
        Raises:
            InputError: not even one token's probability fits, or a K that was given does not.
        """
        tokens = sum(batch.numel() for batch in batches)
        kept = self._kept(tokens, width, dtype)
        needed = tokens * (width * dtype.itemsize if kept is None else bytes_per_token(kept))
        device = batches[0].device.type if batches else "cpu"
        digest = hashlib.sha256(f"{_LAYOUT} {fingerprint} {width} {dtype} {device} {kept}".encode())
        for batch in batches:
            digest.update(f"{tuple(batch.shape)}".encode())
            digest.update(batch.cpu().numpy().astype("<i8").tobytes())
        place = self.folder / digest.hexdigest()[:32]
        self._make_room(place, needed)
        return CachedOutputs(place, batches, kept)

    def _kept(self, tokens: int, width: int, dtype: torch.dtype) -> int | None:
        if self.kept is None and tokens * width * dtype.itemsize <= self.max_bytes:
            return None
        kept = min(self.kept or width, width)
        if self.kept is None:
            kept = min(kept, (self.max_bytes // max(tokens, 1) - bytes_per_token(0)) // 8)
        if kept < 1 or tokens * bytes_per_token(kept) > self.max_bytes:
            raise InputError(
                f"a cache of {tokens} tokens with {max(kept, 1)} of their likeliest each takes "
                f"{tokens * bytes_per_token(max(kept, 1))} bytes, and {self.max_bytes} are "
                "allowed; allow more, or measure on fewer sequences"
            )
        return kept

    def _make_room(self, place: Path, needed: int) -> None:
        """Remove what was used longest ago, until the new outputs fit."""
        place.mkdir(parents=True, exist_ok=True)
        os.utime(place)
        others = [
            folder
            for folder in self.folder.iterdir()
            if folder.is_dir() and _KEY.fullmatch(folder.name) and folder != place
        ]
        sizes = {folder: _bytes_in(folder) for folder in others}
        for folder in sorted(others, key=lambda folder: folder.stat().st_mtime):
            if sum(sizes.values()) + needed <= self.max_bytes:
                return
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]


class CachedOutputs:
    """An `OutputSource` that reads the original's outputs from files, and writes missing ones."""

    def __init__(self, place: Path, batches: Sequence[Tensor], kept: int | None) -> None:
        self._place, self._batches, self.kept = place, batches, kept

    @property
    def is_exact(self) -> bool:
        """Whether outputs are stored in full; otherwise divergences are lower bounds."""
        return self.kept is None

    def pairs(
        self,
        reference: Callable[[Sequence[Tensor]], list[Tensor]],
        changed: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple[Tensor, Tensor | CompactLogits, Tensor]]:
        """(token ids, the original's output, the changed model's) of every batch, in order.

        The original runs first, on all batches that are missing.
        """
        missing = [i for i in range(len(self._batches)) if self._read(i) is None]
        for start in range(0, len(missing), _BATCHES_AT_ONCE):
            part = missing[start : start + _BATCHES_AT_ONCE]
            found = reference([self._batches[index] for index in part])
            for index, output in zip(part, found, strict=True):
                self._write(index, output)
        for index, ids in enumerate(self._batches):
            expected = self._read(index)
            if expected is None:  # removed or spoilt by another process since
                (output,) = reference([ids])
                expected = self._reduced(index, output)
            yield ids, expected, changed(ids)

    def _reduced(self, index: int, output: Tensor) -> Tensor | CompactLogits:
        if self.kept is None:
            return output
        return CompactLogits.reduce(output, self._batches[index], self.kept)

    def _file(self, index: int) -> Path:
        return self._place / f"{index:06d}.safetensors"

    def _write(self, index: int, output: Tensor) -> None:
        from safetensors.torch import save_file

        reduced = self._reduced(index, output)
        if isinstance(reduced, CompactLogits):
            tensors = {name: getattr(reduced, name) for name in _FIELDS}
        else:
            tensors = {"output": reduced}
        partial = self._file(index).with_suffix(f".{os.getpid()}.partial")
        self._place.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, partial)
            partial.replace(self._file(index))
        finally:
            partial.unlink(missing_ok=True)

    def _read(self, index: int) -> Tensor | CompactLogits | None:
        """The stored output, on the tokens' device; None where there is none to be used."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        ids = self._batches[index]
        try:
            tensors = load_file(self._file(index), device=str(ids.device))
        except (OSError, SafetensorError):
            return None
        expected = {"output"} if self.kept is None else set(_FIELDS)
        if tensors.keys() != expected:
            return None
        if any(tensor.shape[:2] != ids.shape for tensor in tensors.values()):
            return None
        return tensors["output"] if self.kept is None else CompactLogits(**tensors)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
