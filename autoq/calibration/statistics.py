"""What calibration needs to know about the inputs of every layer, gathered in one pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoq.calibration import workers
from autoq.errors import ModelError
from autoq.kernels.scoring import input_statistics
from autoq.layers.taps import MatrixCall, tapped
from autoq.models import ModelMap, SlotKind, SlotName

Batch = TypeVar("Batch")

KEPT_ROWS = 256
"""Input rows kept per layer for searches that need real inputs (AWQ)."""

_VALUES_AT_ONCE = 1 << 22
"""Inputs that are squared together, in float32; across those sums are float64."""

_GOLDEN_RATIO = 0.6180339887498949

_STEPS_PER_OCTAVE_BITS = 5
_OCTAVES = 64
_SMALLEST_OCTAVE = 127 - _OCTAVES // 2  # biased, as float32 has it
"""Magnitudes are counted in bins of a 32nd of an octave, from 2^-32 on: a percentile is 3.1 per cent
too large at most, and never too small."""


@dataclass(slots=True)
class InputStatistics:
    """Statistics of the inputs of the slots that share one input."""

    channel_amax: Tensor  # float32 [in_features]
    channel_absolute_sum: Tensor  # float64 [in_features]
    channel_square_sum: Tensor  # float64 [in_features]
    row_storage: Tensor  # [rows that may be kept, in_features], in the inputs' dtype
    magnitude_counts: Tensor | None = None  # int64 [bins]; None: not counted
    row_count: int = 0
    kept_count: int = 0

    @classmethod
    def empty(
        cls,
        in_features: int,
        *,
        keep: int,
        dtype: torch.dtype,
        device: torch.device,
        counts_magnitudes: bool = False,
    ) -> InputStatistics:
        """Nothing seen yet, and room for `keep` rows.

        The room is taken at once: rows kept one by one between a forward pass's large buffers
        would stop the allocator from giving those back.
        """
        return cls(
            channel_amax=torch.zeros(in_features, device=device),
            channel_absolute_sum=torch.zeros(in_features, dtype=torch.float64, device=device),
            channel_square_sum=torch.zeros(in_features, dtype=torch.float64, device=device),
            row_storage=torch.zeros(keep, in_features, dtype=dtype, device=device),
            magnitude_counts=torch.zeros(
                _OCTAVES << _STEPS_PER_OCTAVE_BITS, dtype=torch.int64, device=device
            )
            if counts_magnitudes
            else None,
        )

    @property
    def kept_rows(self) -> Tensor:
        """The inputs that were kept, [rows, in_features]."""
        return self.row_storage[: self.kept_count]

    def channel_mean(self) -> Tensor:
        """Mean magnitude of every input channel, float32 [in_features]."""
        return (self.channel_absolute_sum / max(self.row_count, 1)).float()

    def magnitude_below(self, percentile: float) -> float:
        """An end of a bin that `percentile` per cent of the magnitudes are below; they are counted."""
        assert self.magnitude_counts is not None
        rank = math.ceil(percentile / 100 * int(self.magnitude_counts.sum()))
        reached = self.magnitude_counts.cumsum(0) >= max(rank, 1)
        number = int(reached.int().argmax()) + 1
        steps = 1 << _STEPS_PER_OCTAVE_BITS
        octave, step = divmod(number, steps)
        return math.ldexp(1 + step / steps, octave + _SMALLEST_OCTAVE - 127)

    def record(self, rows: Tensor, keep: int) -> None:
        """Add inputs [rows, in_features]; keep up to `keep` of them, one of every stretch."""
        if not rows.shape[0]:
            return
        amax, absolute_sum = input_statistics(rows)
        torch.maximum(self.channel_amax, amax, out=self.channel_amax)
        self.channel_absolute_sum += absolute_sum
        for piece in torch.split(rows, max(1, _VALUES_AT_ONCE // rows.shape[1])):
            # Not a norm along the rows: torch takes 10 to 25 times as long for it on CPUs.
            self.channel_square_sum += piece.float().square().sum(dim=0)
            if self.magnitude_counts is not None:
                self.magnitude_counts += _counted(piece, len(self.magnitude_counts))
        self.row_count += rows.shape[0]
        keep = min(keep, self.row_storage.shape[0] - self.kept_count)
        if keep:
            taken = rows[spread(rows.shape[0], keep).to(rows.device)]
            self.row_storage[self.kept_count : self.kept_count + len(taken)] = taken
            self.kept_count += len(taken)

    def share(self) -> None:
        """Make of the workers' sums, counts and rows those of all data; each calls it."""
        workers.make_sum(self.channel_absolute_sum)
        workers.make_sum(self.channel_square_sum)
        if self.magnitude_counts is not None:
            workers.make_sum(self.magnitude_counts)
        self.row_count = workers.total(self.row_count, self.channel_amax.device)
        if len(self.row_storage):
            rows = workers.joined_rows(self.row_storage, self.kept_count)[:KEPT_ROWS]
            self.kept_count = len(rows)
            self.row_storage[: len(rows)] = rows


def _counted(values: Tensor, bins: int) -> Tensor:
    """How many magnitudes lie in each bin, int64 [bins]; those outside are in the first or last."""
    exponents_and_steps = values.float().abs().view(torch.int32) >> (23 - _STEPS_PER_OCTAVE_BITS)
    numbers = exponents_and_steps - (_SMALLEST_OCTAVE << _STEPS_PER_OCTAVE_BITS)
    return torch.bincount(numbers.clamp(0, bins - 1).flatten(), minlength=bins)


def spread(total: int, count: int) -> Tensor:
    """Up to `count` of `total` row numbers, one of every stretch, ascending.

    Not the first of each: rows come sequence by sequence, and the length of a stretch often divides
    that of a sequence. The same few positions would be taken of all, the first among them, which
    has activations like no other. Multiples of the golden ratio spread evenly over a stretch.
    """
    if total < 2 * count:
        kept = min(count, total)
        return (torch.arange(kept, dtype=torch.float64) * (total / kept)).long()
    stretch = total // count
    index = torch.arange(min(count, total // stretch), dtype=torch.float64)
    return (index * stretch + (index * _GOLDEN_RATIO % 1 * stretch).floor()).long()


def collect_statistics(
    model: nn.Module,
    model_map: ModelMap,
    batches: Iterable[Batch],
    run: Callable[[Batch], Any],
    *,
    batch_count: int,
    keep_rows_of: Collection[SlotName] = (),
    counts_magnitudes: bool = False,
    also: Callable[[SlotName, Tensor], None] = lambda _, __: None,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[SlotName, InputStatistics]:
    """Run the model over `batches` and gather the input statistics of every slot.

    Slots of one fusion set share one entry.

    Args:
        run: runs the model on one batch; its result is ignored.
        batch_count: how many batches will come to all workers together; sets how many rows of each
            are kept.
        keep_rows_of: slots of which up to `KEPT_ROWS` input rows are kept for a search on real
            inputs; none of experts, which are many and never searched for.
        counts_magnitudes: whether magnitudes are counted, for percentiles.
        also: is given every entry's slot and inputs, [rows, in_features], too.
        after_batch: called after every batch, for progress.

    Raises:
        ModelError: an input holds NaN or Inf; names the layer.
    """
    rows_per_batch = -(-KEPT_ROWS // max(batch_count, 1))
    collector = _Collector(model_map, rows_per_batch, keep_rows_of, counts_magnitudes, also)
    with torch.no_grad(), tapped(model, model_map.slots.values(), collector):
        for batch in batches:
            run(batch)
            if not workers.are_several():  # who would wait for one that stops here
                collector.check_finite()
            after_batch()
    parameter = next(model.parameters())
    statistics = collector.statistics_by_slot(parameter.dtype, parameter.device)
    collector.share()
    return statistics


class _Collector:
    """The handler that records inputs, once for slots that receive the same tensor."""

    def __init__(
        self,
        model_map: ModelMap,
        keep: int,
        keep_of: Collection[SlotName],
        counts_magnitudes: bool,
        also: Callable[[SlotName, Tensor], None],
    ) -> None:
        self._slots = model_map.slots
        self._leader = _leaders(model_map)
        self._statistics: dict[SlotName, InputStatistics] = {}
        self._last_input: dict[SlotName, weakref.ref[Tensor]] = {}
        self._keep = keep
        self._keep_of = keep_of
        self._counts_magnitudes = counts_magnitudes
        self._also = also

    def __call__(self, call: MatrixCall, inputs: Tensor) -> Tensor:
        leader = self._leader[call.slot.name]
        last = self._last_input.get(leader)
        if last is None or last() is not inputs:
            self._last_input[leader] = weakref.ref(inputs)
            rows = inputs.flatten(0, -2)
            self._entry(leader, inputs.dtype, inputs.device).record(rows, self._keep)
            self._also(leader, rows)
        return call.compute(inputs)

    def _entry(self, leader: SlotName, dtype: torch.dtype, device: torch.device) -> InputStatistics:
        if leader not in self._statistics:
            slot = self._slots[leader]
            keeps = leader in self._keep_of and slot.kind is not SlotKind.EXPERT
            self._statistics[leader] = InputStatistics.empty(
                slot.in_features,
                keep=KEPT_ROWS if keeps else 0,
                dtype=dtype,
                device=device,
                counts_magnitudes=self._counts_magnitudes,
            )
        return self._statistics[leader]

    def share(self) -> None:
        """Make of the workers' statistics those of all data, or refuse on all what one refuses."""
        if not workers.are_several():
            return
        entries = [self._statistics[leader] for leader in sorted(self._statistics)]
        for entry in entries:
            workers.make_largest(entry.channel_amax)
        self.check_finite()
        for entry in entries:
            entry.share()

    def check_finite(self) -> None:
        for leader, statistics in self._statistics.items():
            if not bool(torch.isfinite(statistics.channel_amax).all()):
                raise ModelError(
                    f"the input of {leader} holds NaN or Inf on calibration data; search in a wider "
                    "dtype (--dtype float32) if it was not, or mend the model's weights"
                )

    def statistics_by_slot(
        self, dtype: torch.dtype, device: torch.device
    ) -> dict[SlotName, InputStatistics]:
        return {name: self._entry(leader, dtype, device) for name, leader in self._leader.items()}


def _leaders(model_map: ModelMap) -> Mapping[SlotName, SlotName]:
    """Slot -> the slot under whose name its input statistics are kept."""
    leaders = {name: name for name in model_map.slots}
    for group in model_map.groups:
        for fusion_set in group.fusion_sets:
            leaders.update(dict.fromkeys(fusion_set, fusion_set[0]))
    return leaders
