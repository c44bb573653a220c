"""Reading an engine checkpoint of TensorRT-LLM back: ranks put together, matrices taken apart.

It goes by config.json, quant_cfg.json and the ranks' files alone, and shares with the writer
nothing but names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoq.errors import ExportError
from autoq.export._tensorrt_llm_families import (
    EngineLinear,
    Fused,
    engine_linears,
    family_called,
)
from autoq.export._tensorrt_llm_layouts import ENGINE_LAYOUTS, WHOLE
from autoq.export._tensorrt_llm_unpacking import ALGORITHMS, LEAVES, UNPACKERS
from autoq.formats import NONE, FormatName
from autoq.layers import QuantizedWeight

Shares = list[Tensor]
"""One tensor of every rank of a stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMatrix:
    """What the checkpoint holds of one of the model's linears."""

    format: FormatName
    weight: Tensor | QuantizedWeight  # the tensor where the format is none
    input_scale: Tensor | None  # float32 [1]
    input_multiplier: Tensor | None  # float32 [in_features]
    bias: Tensor | None


@dataclass
class EngineCheckpoint:
    """An open checkpoint; use `opened`."""

    config: Mapping[str, Any]
    formats: Mapping[str, FormatName]  # by the engine's names on a stage
    _ranks: list[Any]
    _unread: list[set[str]] = field(default_factory=list)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return int(self.config["num_hidden_layers"])

    @property
    def left(self) -> set[str]:
        """Names of tensors that nothing was read of."""
        return set().union(*self._unread)

    def rows(self, name: str) -> Tensor:
        """A matrix of the first or the last stage whose rows the ranks share."""
        is_last = name.startswith("lm_head")
        stage = self.config["mapping"]["pp_size"] - 1 if is_last else 0
        return torch.cat(self._shares(stage, name))

    def last(self, name: str) -> Tensor:
        """A tensor that all ranks of the last stage hold."""
        return _same(name, self._shares(self.config["mapping"]["pp_size"] - 1, name))

    def layer_tensor(self, layer: int, name: str) -> Tensor:
        """A tensor that all ranks of a layer hold."""
        stage, prefix = self._place(layer)
        return _same(name, self._shares(stage, f"{prefix}.{name}"))

    def matrices(self, layer: int) -> Iterator[tuple[str, StoredMatrix]]:
        """Path in the model's layer -> what is stored."""
        for linear in _linears(self.config):
            found = self._experts if linear.is_stacked else self._parts
            yield from zip(linear.parts, found(layer, linear), strict=True)

    def _place(self, layer: int) -> tuple[int, str]:
        size = self.layers // self.config["mapping"]["pp_size"]
        return layer // size, f"transformer.layers.{layer % size}"

    def _shares(self, stage: int, name: str) -> Shares:
        count = self.config["mapping"]["tp_size"]
        found = []
        for rank in range(stage * count, stage * count + count):
            if name not in self._ranks[rank].keys():  # noqa: SIM118 - no container, has only keys()
                raise ExportError(f"rank{rank}.safetensors lacks {name}; it is incomplete")
            self._unread[rank].discard(name)
            found.append(self._ranks[rank].get_tensor(name))
        return found

    def _has(self, stage: int, name: str) -> bool:
        return name in self._ranks[stage * self.config["mapping"]["tp_size"]].keys()  # noqa: SIM118

    def _parts(self, layer: int, linear: EngineLinear) -> Iterator[StoredMatrix]:
        stage, prefix = self._place(layer)
        path = f"{prefix}.{linear.name}"
        fmt = self.formats.get(path, NONE)
        stored = {leaf: self._shares(stage, f"{path}.{leaf}") for leaf in LEAVES[fmt]}
        ranks = [
            UNPACKERS[fmt]({leaf: shares[rank] for leaf, shares in stored.items()})
            for rank in range(self.config["mapping"]["tp_size"])
        ]
        whole = {
            name: self._joined(name, [tensors[name] for tensors in ranks], linear)
            for name in ranks[0]
        }
        scale, multiplier = self._inputs(stage, path, fmt, linear)
        biases = self._biases(stage, f"{path}.bias", linear)
        for number in range(len(linear.parts)):
            tensors = {name: parts[number] for name, parts in whole.items()}
            yield StoredMatrix(
                format=fmt,
                weight=_weight(fmt, tensors),
                input_scale=scale,
                input_multiplier=multiplier,
                bias=None if biases is None else biases[number],
            )

    def _experts(self, layer: int, linear: EngineLinear) -> Iterator[StoredMatrix]:
        stage, prefix = self._place(layer)
        path = f"{prefix}.{linear.name}"
        fmt = self.formats.get(path, NONE)
        stored = {leaf: self._shares(stage, f"{path}.{leaf}") for leaf in LEAVES[fmt]}
        scale, multiplier = self._inputs(stage, path, fmt, linear)
        for number in range(len(linear.parts)):
            ranks = [
                UNPACKERS[fmt]({leaf: shares[rank][number] for leaf, shares in stored.items()})
                for rank in range(self.config["mapping"]["tp_size"])
            ]
            tensors = {
                name: _expert(name, [tensors[name] for tensors in ranks], linear)
                for name in ranks[0]
            }
            yield StoredMatrix(
                format=fmt,
                weight=_weight(fmt, tensors),
                input_scale=scale,
                input_multiplier=multiplier,
                bias=None,
            )

    def _joined(self, name: str, shares: Shares, linear: EngineLinear) -> list[Tensor]:
        """Each part's tensor, of all ranks."""
        if shares[0].ndim < 2:
            return [_same(name, shares)] * len(linear.parts)
        if linear.splits_rows:
            return self._taken_apart(shares, linear)
        return [_same(name, shares) if name in WHOLE else torch.cat(shares, 1)]

    def _taken_apart(self, shares: Shares, linear: EngineLinear) -> list[Tensor]:
        """Rows of the matrices of each rank, put together matrix by matrix."""
        count = self.config["mapping"]["tp_size"]
        sizes = [number // count for number in self._rows(linear)]
        pieces = [torch.split(share, sizes) for share in shares]
        whole = [torch.cat([rank[number] for rank in pieces]) for number in range(len(sizes))]
        if linear.fused is None:
            return whole
        if linear.fused is Fused.HEADS:
            size = self.config["head_size"]
            by_head = [part.reshape(-1, size, *part.shape[1:]) for part in whole]
            return [torch.stack(by_head, 1).flatten(0, 2)]
        return [torch.cat(whole[::-1] if linear.fused is Fused.GATE_UP else whole)]

    def _rows(self, linear: EngineLinear) -> list[int]:
        """Of how many rows each matrix of a linear is, on all ranks together."""
        if linear.name != "attention.qkv":
            count = 2 if linear.fused is Fused.GATE_UP else 1
            return [self.config["intermediate_size"]] * count
        size = self.config["head_size"]
        shared = self.config["num_key_value_heads"] * size
        return [self.config["num_attention_heads"] * size, shared, shared]

    def _inputs(
        self, stage: int, path: str, fmt: FormatName, linear: EngineLinear
    ) -> tuple[Tensor | None, Tensor | None]:
        if fmt == NONE:
            return None, None
        layout = ENGINE_LAYOUTS[fmt]
        scale = multiplier = None
        if layout.input_scaling is not None:
            name = f"{path}.{layout.input_scaling}"
            scale = _same(name, self._shares(stage, name))
        if layout.input_multiplier is not None:
            shares = self._shares(stage, f"{path}.{layout.input_multiplier}")
            whole = _same(path, shares) if linear.splits_rows else torch.cat(shares)
            multiplier = whole.float()
        if layout.input_divisor is not None and not linear.splits_rows:
            shares = self._shares(stage, f"{path}.{layout.input_divisor}")
            multiplier = torch.cat(shares, 1).reshape(-1).reciprocal()
        return scale, multiplier

    def _biases(self, stage: int, name: str, linear: EngineLinear) -> list[Tensor] | None:
        if not self._has(stage, name):
            return None
        shares = self._shares(stage, name)
        if linear.splits_rows:
            return self._taken_apart(shares, linear)
        _, family = family_called(self.config["architecture"])
        return [_first(name, shares) if family.adds_up_biases else _same(name, shares)]


@contextmanager
def opened(folder: Path) -> Iterator[EngineCheckpoint]:
    """The checkpoint in a folder.

    Raises:
        ExportError: a file is missing or damaged, an algorithm is unknown.
    """
    with ExitStack() as stack:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            ranks = [
                stack.enter_context(safe_open(folder / f"rank{rank}.safetensors", framework="pt"))
                for rank in range(config["mapping"]["world_size"])
            ]
            formats = _formats(folder, config)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ExportError(
                f"{folder} is no engine checkpoint of tensorrt-llm: {error}"
            ) from error
        yield EngineCheckpoint(config, formats, ranks, [set(rank.keys()) for rank in ranks])


def _formats(folder: Path, config: Mapping[str, Any]) -> dict[str, FormatName]:
    said = config["quantization"]
    algorithm = said["quant_algo"]
    if algorithm is None:
        return {}
    if algorithm == "MIXED_PRECISION":
        layers = json.loads((folder / "quant_cfg.json").read_text(encoding="utf-8"))
        entries = layers["quantized_layers"].items()
        return {name: ALGORITHMS[entry["quant_algo"]] for name, entry in entries}
    size = config["num_hidden_layers"] // config["mapping"]["pp_size"]
    linears = _linears(config)
    names = [f"transformer.layers.{n}.{linear.name}" for n in range(size) for linear in linears]
    left_out = set(said["exclude_modules"] or ())
    return {name: ALGORITHMS[algorithm] for name in names if name not in left_out}


def _linears(config: Mapping[str, Any]) -> tuple[EngineLinear, ...]:
    experts = config.get("moe", {}).get("num_experts", 0)
    return engine_linears(family_called(config["architecture"])[0], experts)


def _expert(name: str, shares: Shares, linear: EngineLinear) -> Tensor:
    """One expert's tensor of all ranks, gate before up."""
    if shares[0].ndim < 2:
        return _same(name, shares)
    if not linear.splits_rows:
        return torch.cat(shares, 1)
    halves = [share.tensor_split(2) for share in shares]
    return torch.cat([*(gate for _, gate in halves), *(up for up, _ in halves)])


def _same(name: str, shares: Shares) -> Tensor:
    if any(not torch.equal(share, shares[0]) for share in shares[1:]):
        raise ExportError(
            f"all ranks hold the same {name}, and these differ; the files are damaged"
        )
    return shares[0]


def _first(name: str, shares: Shares) -> Tensor:
    if any(bool(share.any()) for share in shares[1:]):
        raise ExportError(
            f"the engine adds up {name} of all ranks, and not only the first has one; the files are "
            "damaged"
        )
    return shares[0]


def _weight(fmt: FormatName, tensors: Mapping[str, Tensor]) -> Tensor | QuantizedWeight:
    if fmt == NONE:
        return tensors["weight"]
    rows = len(tensors["codes"])
    packed = 2 if fmt == "nvfp4" else 1
    shape = rows, tensors["codes"].shape[1] * packed
    return QuantizedWeight(format=fmt, tensors=tensors, shape=shape)
