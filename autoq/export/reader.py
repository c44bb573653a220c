"""Reading quantised checkpoints back: as they are stored, and as the slots of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autoq.errors import ExportError, ModelError
from autoq.export._fp8_manifest import stored_name
from autoq.export._kv_cache import stored_cache, stored_codings
from autoq.export._manifest_reading import (
    FormatOf,
    compressed_tensors_formats,
    container_of,
    fp8_formats,
    modelopt_formats,
    spelling_of,
)
from autoq.export._names import CheckpointNames
from autoq.export._types import QuantizedModule, Spelling
from autoq.export._unpacking import (
    checked_tensors,
    expected_tensors,
    unpacked_calibration,
    unpacked_weight,
)
from autoq.formats import NONE, FormatName
from autoq.layers import LayerCalibration, LowRank, QuantizedWeight
from autoq.layers.kv_cache import CacheSimulation
from autoq.layers.quantize import Container, dequantize_weight
from autoq.models import ModelMap, SlotName, WeightSlot
from autoq.models.folder import INDEX_NAME, read_config, shard_paths

_SCALE = "weight_scale"
_CODES = ("weight", "weight_packed")
_CODE_DTYPES = ("F8_E4M3", "I8", "U8", "I32")  # as safetensors spells them


class QuantizedCheckpoint(Mapping[str, QuantizedModule]):
    """The quantised modules of a checkpoint, by name; tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ExportError: the folder is no readable checkpoint, or its manifest and its tensors
                contradict each other.
        """
        try:
            self.config = read_config(path)
            self._files = _tensor_files(path)
        except ModelError as error:
            raise ExportError(str(error)) from error
        self.path = path
        self._open: dict[Path, Any] = {}
        self._open_for_slices: dict[Path, Any] = {}
        self.manifest = self._manifest()
        self.container = container_of(self.manifest) if self.manifest else None
        self.spelling = spelling_of(self.manifest)
        self.formats = self._formats()
        self.kv_cache = stored_cache(self.manifest, self.container, self._files)

    @property
    def tensor_names(self) -> list[str]:
        """Every tensor of the checkpoint."""
        return list(self._files)

    @cached_property
    def unquantized_names(self) -> list[str]:
        """Tensors that belong to no quantised module, biases of quantised ones included."""
        taken = {
            self._stored(name, suffix) for name in self.formats for suffix in self._suffixes(name)
        }
        if self.kv_cache is not None:
            taken.update(name for names in self.kv_cache.scales.values() for name in names)
        return [name for name in self._files if name not in taken]

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is stored.

        Raises:
            ExportError: there is none of that name, or its file cannot be read.
        """
        return cast(Tensor, self._read(name, self._open, "get_tensor"))

    def slice(self, name: str) -> Any:
        """As `tensor`, but read only when it is indexed, for example with `[...]`."""
        return self._read(name, self._open_for_slices, "get_slice")

    def cache_simulation(self, model: nn.Module) -> CacheSimulation | None:
        """What makes a model cache as the checkpoint says; None where it says nothing of that.

        Raises:
            ExportError: a scale belongs to no attention of the model, or is no positive number.
        """
        if self.kv_cache is None:
            return None
        names = [name for pair in self.kv_cache.scales.values() for name in pair]
        scales = {name: self.tensor(name) for name in names}
        return CacheSimulation(model, stored_codings(model, self.kv_cache, scales))

    def release(self) -> None:
        """Close the files that `tensor` has opened.

        Tensors are views of a mapped file. While one of them lives or the file is open, every page
        that was read counts as this process's memory.
        """
        self._open.clear()

    def _read(self, name: str, opened: dict[Path, Any], method: str) -> Any:
        if name not in self._files:
            raise ExportError(f"{self.path} has no tensor {name}; it is incomplete")
        file = self._files[name]
        try:
            if file not in opened:
                opened[file] = safe_open(file, framework="pt")
            return getattr(opened[file], method)(name)
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{file} cannot be read: {error}") from error

    def __getitem__(self, name: str) -> QuantizedModule:
        fmt = self.formats[name]
        tensors = {
            suffix: self.tensor(self._stored(name, suffix)) for suffix in self._suffixes(name)
        }
        return QuantizedModule(name=name, format=fmt, tensors=tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.formats)

    def __len__(self) -> int:
        return len(self.formats)

    def _suffixes(self, module: str) -> list[str]:
        if self.container is None:
            return []
        known = sorted(expected_tensors(self.container, self.formats[module]))
        return [suffix for suffix in known if self._stored(module, suffix) in self._files]

    def _stored(self, module: str, suffix: str) -> str:
        """The name of a module's tensor in the files."""
        is_own = self.spelling is Spelling.OWN
        return f"{module}.{suffix if is_own else stored_name(suffix)}"

    def _manifest(self) -> Mapping[str, Any]:
        manifest = self.config.get("quantization_config")
        if manifest is None:
            return {}
        if not isinstance(manifest, dict):
            raise ExportError(f"quantization_config of {self.path} must be an object")
        return manifest

    def _formats(self) -> dict[str, FormatName]:
        ending = self._stored("", _SCALE)
        modules = [name.removesuffix(ending) for name in self._files if name.endswith(ending)]
        if self.container is None:
            if modules:
                raise ExportError(f"{modules[0]} has scales, and {self.path} has no manifest")
            return {}
        readers: Mapping[Container, Any] = {
            Container.MODELOPT: modelopt_formats,
            Container.COMPRESSED_TENSORS: compressed_tensors_formats,
        }
        own = readers[self.container]
        is_own = self.spelling is Spelling.OWN
        format_of: FormatOf = (own if is_own else fp8_formats)(self.manifest)
        self._refuse_codes_without_scale(set(modules))
        return {module: format_of(module) for module in modules}

    def _refuse_codes_without_scale(self, scaled: set[str]) -> None:
        """Codes would pass for the weights of a layer that is stored as it is."""
        for name in self._files:
            module, _, last = name.rpartition(".")
            if last not in _CODES or module in scaled:
                continue
            if last != "weight" or self.slice(name).get_dtype() in _CODE_DTYPES:
                raise ExportError(
                    f"{self.path} lacks {module}.{_SCALE}, and {name} holds codes; it is "
                    "incomplete: export it again"
                )


def read_quantized(path: Path | str) -> QuantizedCheckpoint:
    """Open a checkpoint of either container: module name -> its format and its stored tensors.

    Raises:
        ExportError: the folder is no readable checkpoint, or its manifest and its tensors
            contradict each other.
    """
    return QuantizedCheckpoint(Path(path))


class SlotReader:
    """The quantised matrices of a checkpoint, by the slots of a model."""

    def __init__(
        self, checkpoint: QuantizedCheckpoint, names: CheckpointNames, model_map: ModelMap
    ) -> None:
        self._checkpoint = checkpoint
        self._names = names
        self._slots = model_map.slots

    def tensor(self, name: str) -> Tensor:
        """One tensor of the checkpoint, as it is stored."""
        return self._checkpoint.tensor(name)

    def format_of(self, slot: SlotName) -> FormatName:
        """The format of a slot.

        Raises:
            ExportError: the modules it is stored in have different formats.
        """
        formats = {
            self._checkpoint.formats.get(part.module, NONE) for part in self._names.parts(slot)
        }
        if len(formats) > 1:
            raise ExportError(f"{slot} is stored in several formats: {', '.join(sorted(formats))}")
        return formats.pop()

    def calibration(self, name: SlotName) -> LayerCalibration:
        """How a quantised slot's input is scaled; of parts that differ engines take the maximum.

        Raises:
            ExportError: a stored tensor is not as the container tabulates it.
        """
        return self.packed(name)[1]

    def dequantized(self, name: SlotName) -> Tensor:
        """The matrix that engines of the container compute with, float32 [out, in].

        Raises:
            ExportError: a stored tensor is not as the container tabulates it.
        """
        container = self._checkpoint.container
        assert container is not None
        return torch.cat(
            [dequantize_weight(weight, container=container) for weight, _ in self._parts(name)]
        )

    def packed(self, name: SlotName) -> tuple[list[QuantizedWeight], LayerCalibration]:
        """Codes and scales of a quantised slot's parts, by row, and the calibration of them all.

        Raises:
            ExportError: a stored tensor is not as the container tabulates it.
        """
        weights, entries = zip(*self._parts(name), strict=True)
        smoothing = entries[0].pre_quant_scale
        if not all(_equal(entry.pre_quant_scale, smoothing) for entry in entries):
            raise ExportError(f"the parts of {name} must share one pre_quant_scale, and do not")
        calibration = LayerCalibration(
            low_rank=_joined_branch(name, weights),
            weight_amax=max(entry.weight_amax for entry in entries),
            input_amax=max(entry.input_amax for entry in entries),
            pre_quant_scale=smoothing,
        )
        return list(weights), calibration

    def check(self, name: SlotName) -> None:
        """Refuse a slot whose tensors are not as the container tabulates them, codes unread.

        Raises:
            ExportError: names the tensor.
        """
        for part in self._names.parts(name):
            self._checked(self._slots[name], part.module, part.rows, codes_known=True)

    def _parts(self, name: SlotName) -> list[tuple[QuantizedWeight, LayerCalibration]]:
        slot = self._slots[name]
        return [self._part(slot, part.module, part.rows) for part in self._names.parts(name)]

    def _part(
        self, slot: WeightSlot, module: str, rows: int
    ) -> tuple[QuantizedWeight, LayerCalibration]:
        container = self._checkpoint.container
        assert container is not None
        tensors, fmt = self._checked(slot, module, rows)
        shape = (rows, slot.in_features)
        weight = unpacked_weight(tensors, container=container, fmt=fmt, shape=shape)
        return weight, unpacked_calibration(tensors, weight, container)

    def _checked(
        self, slot: WeightSlot, module: str, rows: int, *, codes_known: bool = False
    ) -> tuple[dict[str, Tensor], FormatName]:
        container = self._checkpoint.container
        assert container is not None
        stored = self._checkpoint[module]
        tensors = checked_tensors(
            module,
            stored.tensors,
            container=container,
            fmt=stored.format,
            shape=(rows, slot.in_features),
            kind=slot.kind,
            codes_known=codes_known,
        )
        return tensors, stored.format


def _joined_branch(name: SlotName, parts: Sequence[QuantizedWeight]) -> LowRank | None:
    """The branch of low rank of parts that follow each other by row."""
    found = [branch for part in parts if (branch := LowRank.among(part.tensors)) is not None]
    if not found:
        return None
    down = found[0].down
    if len(found) < len(parts) or not all(torch.equal(branch.down, down) for branch in found):
        raise ExportError(
            f"the parts of {name} must share the first factor of their branches of low rank, and do "
            "not; export it again with autoq"
        )
    return LowRank(down, torch.cat([branch.up for branch in found]))


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from the headers."""
    files: dict[str, Path] = {}
    for shard in shard_paths(path):
        try:
            with safe_open(shard, framework="pt") as file:
                names = file.keys()
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{shard} cannot be read as safetensors: {error}") from error
        for name in names:
            if name in files:
                raise ExportError(f"{name} is in {files[name].name} and in {shard.name}")
            files[name] = shard
    index = path / INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(name): str(file) for name, file in content.items()}
        wrong = sorted(listed.items() ^ {name: file.name for name, file in files.items()}.items())
        if wrong:
            raise ExportError(f"{index} and the files disagree on where {wrong[0][0]} is")
    return files
