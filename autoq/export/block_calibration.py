"""Calibrating a model of which one block at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from autoq.calibration import calibrate
from autoq.errors import InputError
from autoq.formats import Calibration, Container, FormatName
from autoq.layers import LayerCalibration
from autoq.layers.taps import MatrixCall, tapped
from autoq.models import ModelMap, SlotName
from autoq.models.block_stream import BlockStream

_Key = tuple[SlotName, FormatName]


class TakesCalibrations(Protocol):
    """Where calibrations go."""

    def add(self, entries: Mapping[_Key, LayerCalibration], block: int | None) -> None:
        """Take calibrations over.

        Args:
            block: number of the block that they are of; None: of what lies in none.
        """
        ...


class StoredCalibration(Mapping[_Key, LayerCalibration]):
    """Calibrations whose codes are in files, and mapped when they are looked up."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: for the files.
        """
        self._folder = folder
        self._entries: dict[_Key, LayerCalibration] = {}
        self._codes: dict[_Key, tuple[Path, torch.Size]] = {}

    def add(self, entries: Mapping[_Key, LayerCalibration], block: int | None) -> None:
        """See `TakesCalibrations`."""
        del block
        for key, entry in entries.items():
            if entry.codes is not None:
                file = self._folder / f"codes-{len(self._codes)}.u8"
                entry.codes.contiguous().numpy().tofile(file)
                self._codes[key] = (file, entry.codes.shape)
            self._entries[key] = replace(entry, codes=None)

    def __getitem__(self, key: _Key) -> LayerCalibration:
        entry = self._entries[key]
        if key not in self._codes:
            return entry
        file, shape = self._codes[key]
        codes = torch.from_file(str(file), size=shape.numel(), dtype=torch.uint8)
        return replace(entry, codes=codes.view(shape))

    def __iter__(self) -> Iterator[_Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCalibration:
    """How each block is calibrated; the fields are those arguments of `calibrate`."""

    formats: Sequence[FormatName]
    container: Container
    scale_dtype: torch.dtype
    method: Calibration
    moment_bytes: int | None = None
    after_batch: Callable[[], None] = lambda: None
    takes_outside: bool = False  # whether layers in no block, such as the head, are calibrated, too

    def run(
        self,
        stream: BlockStream,
        model_map: ModelMap,
        batches: int,
        stored: TakesCalibrations,
        done: Collection[int] = (),
    ) -> None:
        """Calibrate block by block; what comes out is what `calibrate` gives of the whole model.

        Whether a norm takes a layer's input scale exactly is seen from the block's output, and not
        from the model's.

        Args:
            stream: whose inputs are the batches, and behind them the small input on which folding
                is tried.
            model_map: what to calibrate; all of it in blocks, unless `takes_outside`.
            stored: gets the calibrations.
            done: numbers of blocks whose calibrations are there: of them no more is computed than
                what the others need.
        Raises:
            InputError: a layer is in no block and not to be, or a group in several.
            ModelError: an input holds NaN or Inf on calibration data, or the model cannot be run
                block by block.
        """
        parts = [_part(model_map, path) for path in model_map.blocks]
        rest = outside_blocks(model_map) if self.takes_outside else None
        _refuse_outside(model_map, parts if rest is None else [*parts, rest])
        last = max(blocks_to_calibrate(model_map) - set(done), default=-1)
        if rest is not None and rest.groups:
            last = len(parts)
        for number, part in enumerate(parts):
            with stream.block(number) as block:
                stream.run(number, batches, keep=True)
                if number > last:
                    self._pass_over(batches)
                elif number in done or not part.groups:
                    self._keep_outputs(stream, number, batches, part, block)
                else:
                    entries = self._of_block(stream, number, batches, part, block)
                    stored.add(entries, number)
            if number:
                stream.forget(number - 1)
        if rest is not None and rest.groups:
            stream.finish(batches)  # layers outside blocks have their weights from then on
            run, small = stream.finish, partial(stream.finish, batches)
            stored.add(self._calibrated(stream.model, rest, batches, run, small), None)

    def _of_block(
        self, stream: BlockStream, number: int, batches: int, part: ModelMap, block: nn.Module
    ) -> dict[_Key, LayerCalibration]:
        whole = _holding(part.blocks[0], block)
        run = partial(stream.run, number, keep=True)
        small = partial(stream.run, number, batches, keep=False)
        return self._calibrated(whole, part, batches, run, small)

    def _keep_outputs(
        self, stream: BlockStream, number: int, batches: int, part: ModelMap, block: nn.Module
    ) -> None:
        """What the next block needs of one that is not to be calibrated."""
        whole = _holding(part.blocks[0], block)
        # Computed as calibrating computes it, to the same bits.
        with tapped(whole, part.slots.values(), MatrixCall.compute):
            for index in range(batches):
                stream.run(number, index, keep=True)
                self.after_batch()

    def _pass_over(self, batches: int) -> None:
        for _ in range(batches):
            self.after_batch()

    def _calibrated(
        self,
        model: nn.Module,
        part: ModelMap,
        batches: int,
        run: Callable[[int], Tensor],
        run_small: Callable[[], Tensor],
    ) -> dict[_Key, LayerCalibration]:
        return calibrate(
            model,
            part,
            self.formats,
            range(batches),
            run,
            run_small=run_small,
            container=self.container,
            scale_dtype=self.scale_dtype,
            method=self.method,
            moment_bytes=self.moment_bytes,
            after_batch=self.after_batch,
        )


def outside_blocks(model_map: ModelMap) -> ModelMap:
    """What of a model lies in none of its blocks."""
    inside = tuple(f"{path}." for path in model_map.blocks)
    slots = {
        name: slot
        for name, slot in model_map.slots.items()
        if not f"{slot.module}.".startswith(inside)
    }
    groups = tuple(group for group in model_map.groups if slots.keys() >= set(group.slots))
    return replace(model_map, slots=slots, groups=groups, blocks=())


def blocks_to_calibrate(model_map: ModelMap) -> frozenset[int]:
    """Numbers of the blocks that have groups; all of the others may be excluded."""
    parts = [_part(model_map, path) for path in model_map.blocks]
    return frozenset(number for number, part in enumerate(parts) if part.groups)


def _part(model_map: ModelMap, path: str) -> ModelMap:
    """What of a model lies in one of its blocks."""
    slots = {
        name: slot
        for name, slot in model_map.slots.items()
        if slot.module == path or slot.module.startswith(f"{path}.")
    }
    groups = tuple(group for group in model_map.groups if slots.keys() >= set(group.slots))
    return replace(model_map, slots=slots, groups=groups, blocks=(path,))


def _refuse_outside(model_map: ModelMap, parts: Sequence[ModelMap]) -> None:
    inside = {group.name for part in parts for group in part.groups}
    outside = [group.slots[0] for group in model_map.groups if group.name not in inside]
    if outside:
        raise InputError(
            "layers that are calibrated block by block must lie in one of the model's blocks, and "
            f"{outside[0]} does not; leave it out with --exclude, or search the model"
        )


def _holding(path: str, block: nn.Module) -> nn.Module:
    """A module in which the block has its path, and nothing else is."""
    root = module = nn.Module()
    *parents, last = path.split(".")
    for name in parents:
        child = nn.Module()
        module.add_module(name, child)
        module = child
    module.add_module(last, block)
    return root
