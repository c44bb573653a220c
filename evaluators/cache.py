"""The original's outputs on disk, so that measuring again does not run the original again."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.evaluators.compact import CompactLogits, bytes_per_token

DEFAULT_BYTES = 4 * 10**9
_LAYOUT = "autoq-reference-2"  # of the files; part of their key
_KEY = re.compile(r"[0-9a-f]{32}")
_FIELDS = ("indices", "log_probabilities", "log_rest", "next_token")
_BATCHES_AT_ONCE = 8  # computed before they are written, where changing between models is slow
_BATCHES_BETWEEN_LOOKS = 4  # at what other processes have written meanwhile
_DIGEST = "sha256"


@dataclass(frozen=True, slots=True)
class LogitsCache:
    """A folder of outputs, one subfolder for each model and tokens.

    Outputs are stored in full where all of them fit into the bound, else as their K likeliest
    tokens and the rest in one number, with the largest K that fits (see `CompactLogits`: the KL
    divergence is then a lower bound, and everything else exact). What was used longest ago is
    removed to make room. Files are safetensors with a digest of what is in them; one that cannot
    be read, or holds something else than was written, is made again, and `note` is told.

    Any number of processes may share a folder. Outputs of another version of torch, on another
    kind of device or with another number of threads are kept apart: their last bits may differ.
    """

    folder: Path
    max_bytes: int = DEFAULT_BYTES  # of the whole folder
    kept: int | None = None  # K; None: what fits
    note: Callable[[str], None] = field(default=lambda text: None, compare=False)

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
            InputError: not even one token's probability fits, or a K that was given does not; or
                the folder cannot be written to.
        """
        tokens = sum(batch.numel() for batch in batches)
        kept = self._kept(tokens, width, dtype)
        needed = tokens * (width * dtype.itemsize if kept is None else bytes_per_token(kept))
        device = batches[0].device.type if batches else "cpu"
        about = f"{_LAYOUT} {fingerprint} {width} {dtype} {_arithmetic(device)} {kept}"
        digest = hashlib.sha256(about.encode())
        for batch in batches:
            digest.update(f"{tuple(batch.shape)}".encode())
            digest.update(batch.cpu().numpy().astype("<i8").tobytes())
        place = self.folder / digest.hexdigest()[:32]
        try:
            self._make_room(place, needed)
        except OSError as error:
            raise InputError(
                f"a cache must be a folder that can be written to, and {self.folder} is not "
                f"({error.strerror}); name another"
            ) from None
        return CachedOutputs(place, batches, kept, self.note)

    def outputs_in_full(
        self, batches: Sequence[Tensor], *, fingerprint: str, width: int, dtype: torch.dtype
    ) -> CachedOutputs | None:
        """As `outputs`, but None where they do not fit to the bit."""
        tokens = sum(batch.numel() for batch in batches)
        if self.kept is not None or tokens * width * dtype.itemsize > self.max_bytes:
            return None
        return self.outputs(batches, fingerprint=fingerprint, width=width, dtype=dtype)

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
        for folder in sorted(others, key=_last_used):
            if sum(sizes.values()) + needed <= self.max_bytes:
                return
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]


class CachedOutputs:
    """An `OutputSource` that reads the original's outputs from files, and writes missing ones."""

    def __init__(
        self,
        place: Path,
        batches: Sequence[Tensor],
        kept: int | None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._place, self._batches, self.kept, self._note = place, batches, kept, note
        self._numbers = {id(ids): index for index, ids in enumerate(batches)}
        self._seen: set[int] = set()  # batches whose files were good at least once

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
        unseen = [index for index in range(len(self._batches)) if index not in self._seen]
        missing = [index for index in unseen if self._read(index) is None]
        for start in range(0, len(missing), _BATCHES_AT_ONCE):
            self._computed(missing[start : start + _BATCHES_AT_ONCE], reference)
        for index, ids in enumerate(self._batches):
            expected = self._read(index)
            if expected is None:  # removed or spoilt by another process since
                (output,) = reference([ids])
                expected = self._reduced(index, output)
            yield ids, expected, changed(ids)

    def through(
        self, reference: Callable[[Sequence[Tensor]], list[Tensor]]
    ) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """`reference`, run on those batches alone that no file has yet; for exact outputs only.

        Processes that begin together share the work: each begins elsewhere, and looks again and
        again at what the others have written.
        """

        def outputs(part: Sequence[Tensor]) -> list[Tensor]:
            indices = [self._numbers[id(ids)] for ids in part]
            first = os.getpid() * _BATCHES_BETWEEN_LOOKS % max(len(indices), 1)
            found: dict[int, Tensor] = {}
            for start in range(0, len(indices), _BATCHES_BETWEEN_LOOKS):
                some = (indices[first:] + indices[:first])[start : start + _BATCHES_BETWEEN_LOOKS]
                found |= self._known(some)
                found |= self._computed([i for i in some if i not in found], reference)
            return [found[index] for index in indices]

        assert self.is_exact  # a reduced output is no tensor
        return outputs

    def _known(self, indices: Sequence[int]) -> dict[int, Tensor]:
        read = {index: self._read(index) for index in indices}
        return {index: output for index, output in read.items() if isinstance(output, Tensor)}

    def _computed(
        self, indices: Sequence[int], reference: Callable[[Sequence[Tensor]], list[Tensor]]
    ) -> dict[int, Tensor]:
        if not indices:
            return {}
        outputs = reference([self._batches[index] for index in indices])
        found = dict(zip(indices, outputs, strict=True))
        for index, output in found.items():
            self._write(index, output)
        return found

    def _reduced(self, index: int, output: Tensor) -> Tensor | CompactLogits:
        if self.kept is None:
            return output
        return CompactLogits.reduce(output, self._batches[index], self.kept)

    def _file(self, index: int) -> Path:
        return self._place / f"{index:06d}.safetensors"

    def _write(self, index: int, output: Tensor) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        reduced = self._reduced(index, output)
        if isinstance(reduced, CompactLogits):
            tensors = {name: getattr(reduced, name) for name in _FIELDS}
        else:
            tensors = {"output": reduced}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        partial = self._file(index).with_suffix(f".{os.getpid()}.partial")
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={_DIGEST: _digest(tensors)})
            partial.replace(self._file(index))
        except (OSError, SafetensorError) as error:  # a full disk, say: measuring goes on
            self._note(f"an output of the original was not kept in {self._place}: {error}")
        finally:
            partial.unlink(missing_ok=True)

    def _read(self, index: int) -> Tensor | CompactLogits | None:
        """The stored output, on the tokens' device; None where there is none to be used."""
        file, ids = self._file(index), self._batches[index]
        self._seen.discard(index)
        if not file.exists():
            return None
        tensors = _checked(file)
        expected = {"output"} if self.kept is None else set(_FIELDS)
        if (
            tensors is None
            or tensors.keys() != expected
            or any(tensor.shape[:2] != ids.shape for tensor in tensors.values())
        ):
            self._note(f"{file} is not what was written there, so the original is run again")
            return None
        self._seen.add(index)
        own = {name: tensor.to(ids.device) for name, tensor in tensors.items()}
        return own["output"] if self.kept is None else CompactLogits(**own)


def _checked(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None where it does not hold what its digest says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return tensors if metadata.get(_DIGEST) == _digest(tensors) else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _arithmetic(device: str) -> str:
    """What decides the last bits of an output, besides the model and the tokens."""
    if device == "cuda":
        return f"{torch.__version__} {torch.cuda.get_device_name()}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.__version__} {device} {capability} {torch.get_num_threads()}"


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another process made room, too
        return 0.0


def _bytes_in(folder: Path) -> int:
    total = 0
    try:
        for file in folder.iterdir():
            total += file.stat().st_size
    except OSError:  # another process made room, too
        pass
    return total
