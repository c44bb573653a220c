"""What a checkpoint's manifests say, in whatever dialect of the two containers it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from autoq.errors import ExportError, ModelError
from autoq.export._aliases import experts_parent
from autoq.export._compressed_tensors_manifest import COMPRESSED_TENSORS_SCHEMES
from autoq.export._fp8_manifest import BLOCK_FORMAT, left_out_modules
from autoq.export._manifest_reading import container_of, pattern_matcher, spelling_of
from autoq.export._modelopt_manifest import MIXED, MODELOPT_ENTRIES
from autoq.export._types import Spelling
from autoq.export.checkup._fp8 import is_head
from autoq.formats import Container, FormatName
from autoq.models.folder import read_config

NESTED_MANIFEST = "hf_quant_config.json"
_LINEAR = "Linear"

_ARGUMENTS = ("num_bits", "type", "strategy", "group_size", "dynamic", "symmetric")
"""What makes two schemes of compressed-tensors one format; observers and the like do not."""

_DEFAULTS: Mapping[str, Any] = {"symmetric": True, "dynamic": False}


@dataclass(frozen=True, slots=True)
class Declared:
    """What a manifest says of one module."""

    label: str  # the algorithm or scheme, in the manifest's own words
    format: FormatName | None  # autoq's, if it is one


@dataclass(frozen=True, slots=True)
class Group:
    """A config group of compressed-tensors."""

    declared: Declared
    names: Callable[[str], bool]  # whether it names a module, or has a pattern for it
    is_for_all: bool  # linears that no group names


FP8_BLOCKS = Declared("fp8, blocks of 128 x 128", BLOCK_FORMAT)
"""What transformers' own manifest says of all that it does not leave out."""


@dataclass(frozen=True)
class Manifest:
    """Both manifests of a checkpoint."""

    container: Container
    config: Mapping[str, Any]
    flat: Mapping[str, Any]  # config.json's quantization_config
    nested: Mapping[str, Any] | None  # hf_quant_config.json's quantization

    @property
    def algorithm(self) -> str:
        """ModelOpt: what is declared of everything, or MIXED_PRECISION."""
        return str(self.flat.get("quant_algo"))

    @property
    def is_mixed(self) -> bool:
        """ModelOpt: whether each layer has an entry of its own."""
        return self.container is Container.MODELOPT and self.algorithm == MIXED

    @property
    def layers(self) -> Mapping[str, Any]:
        """ModelOpt: the entries of a mixed checkpoint."""
        found = self.flat.get("quantized_layers")
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def has_nvfp4_layers(self) -> bool:
        """ModelOpt: whether an entry of a mixed checkpoint is of NVFP4 weights."""
        entries = [entry for entry in self.layers.values() if isinstance(entry, Mapping)]
        return any("NVFP4" in str(entry.get("quant_algo")) for entry in entries)

    @property
    def is_fp8(self) -> bool:
        """Whether it is transformers' own: blocks of FP8 everywhere but where it says."""
        return spelling_of(self.flat) is Spelling.TRANSFORMERS_FP8

    @cached_property
    def ignored(self) -> list[str]:
        """What is excluded, as names and patterns.

        Raises:
            ExportError: transformers' own manifest is of other blocks, or lists no names.
        """
        if self.is_fp8:
            return left_out_modules(self.flat)
        found = self.flat.get("ignore") or []
        return [entry for entry in found if isinstance(entry, str)]

    @property
    def targets(self) -> list[str]:
        """compressed-tensors: what all groups are for; names, patterns and classes."""
        groups = self.flat.get("config_groups")
        parts = groups.values() if isinstance(groups, Mapping) else ()
        lists = [group.get("targets") for group in parts if isinstance(group, Mapping)]
        found = [target for one in lists if isinstance(one, list) for target in one]
        return [target for target in found if isinstance(target, str)]

    @property
    def plain_targets(self) -> list[str]:
        """compressed-tensors: modules that one of several groups gives by name.

        TensorRT-LLM looks for them where there are several; classes have no dot in their names.
        """
        groups = self.flat.get("config_groups")
        if not isinstance(groups, Mapping) or len(groups) < 2:
            return []
        return [name for name in self.targets if "." in name and not name.startswith("re:")]

    def entry(self, module: str) -> Declared | None:
        """ModelOpt: what the module's own entry, or the one of its experts, says."""
        found = self.layers.get(module) or self.layers.get(experts_parent(module) or module)
        return None if not isinstance(found, Mapping) else modelopt_declared(found)

    def declared(self, module: str) -> Declared | None:
        """What is said of a module by name; None: it is not quantised.

        Raises:
            ExportError: a pattern cannot be used, or several groups claim the module.
        """
        if self.is_fp8:
            return None if is_head(module) or module in self.ignored else FP8_BLOCKS
        if self.container is Container.COMPRESSED_TENSORS:
            return self._declared_by_groups(module)
        if self.is_mixed:
            return self.entry(module)
        if any(entry == module or fnmatchcase(module, entry) for entry in self.ignored):
            return None
        if any(module.startswith(f"{entry}.") for entry in self.ignored):
            return None
        return modelopt_declared(self.flat)

    def _declared_by_groups(self, module: str) -> Declared | None:
        if pattern_matcher(self.ignored)(module):
            return None
        groups = list(self.groups())
        found = [group for group in groups if group.names(module)]
        found = found or [group for group in groups if group.is_for_all]
        if len(found) > 1:
            raise ExportError(f"{len(found)} config groups match {module}; one may")
        return found[0].declared if found else None

    def groups(self) -> Iterator[Group]:
        """compressed-tensors: each group.

        Raises:
            ExportError: there are none, or one has no list of names.
        """
        groups = self.flat.get("config_groups")
        if not isinstance(groups, Mapping):
            raise ExportError("a compressed-tensors manifest must have an object config_groups")
        for name, group in groups.items():
            targets = group.get("targets") if isinstance(group, Mapping) else None
            if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
                raise ExportError(f"config group {name} must have a list of names targets")
            yield Group(_scheme(group), pattern_matcher(targets), _LINEAR in targets)


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifests; None for a model that is not quantised.

    Raises:
        ExportError: they are malformed, or of neither container.
    """
    try:
        config = read_config(folder)
    except ModelError as error:
        raise ExportError(str(error)) from error
    nested = _nested(folder / NESTED_MANIFEST)
    flat = config.get("quantization_config")
    if flat is None and nested is None:
        return None
    if flat is None:
        flat = {**(nested or {}), "quant_method": "modelopt"}
        flat["ignore"] = flat.pop("exclude_modules", None)
    if not isinstance(flat, Mapping):
        raise ExportError("config.json's quantization_config must be an object")
    if isinstance(flat.get("quantization"), Mapping):  # the nested spelling in config.json
        inner = dict(flat["quantization"])
        flat = {**inner, "quant_method": "modelopt", "ignore": inner.get("exclude_modules")}
    found = Manifest(container_of(flat), config, flat, nested)
    if found.is_fp8:
        left_out_modules(flat)  # which refuses other blocks
    return found


def _nested(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ExportError(f"{path.name} is no JSON: {error}") from error
    inner = content.get("quantization") if isinstance(content, Mapping) else None
    if not isinstance(inner, Mapping):
        raise ExportError(f"{path.name} must have an object quantization")
    return inner


def modelopt_declared(entry: Mapping[str, Any]) -> Declared:
    """What an entry of ModelOpt's says, as a format if autoq has it."""
    algorithm, size = entry.get("quant_algo"), entry.get("group_size")
    for fmt, known in MODELOPT_ENTRIES.items():
        is_alike = str(known["quant_algo"]).upper() == str(algorithm).upper()
        if is_alike and (size is None or known.get("group_size", size) == size):
            return Declared(str(algorithm), fmt)
    return Declared(f"{algorithm}" if size is None else f"{algorithm}, groups of {size}", None)


def _scheme(group: Mapping[str, Any]) -> Declared:
    for fmt, scheme in COMPRESSED_TENSORS_SCHEMES.items():
        if all(
            _arguments(group.get(key)) == _arguments(scheme.get(key))
            for key in ("weights", "input_activations")
        ) and group.get("format") in (scheme["format"], None):
            return Declared(str(scheme["format"]), fmt)
    return Declared(str(group.get("format")), None)


def _arguments(block: Any) -> tuple[Any, ...] | None:
    if not isinstance(block, Mapping):
        return None
    return tuple(block.get(key, _DEFAULTS.get(key)) for key in _ARGUMENTS)
