"""Second moments of layers' inputs, gathered while the model runs on calibration data.

A d x d matrix for every distinct input is more than a large model's memory holds, so the inputs are
taken in parts that fit, each part in a pass of its own; the first comes with the other statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autoq.calibration import workers
from autoq.calibration.scales import sharing_sets
from autoq.calibration.statistics import spread
from autoq.layers.taps import MatrixCall, tapped
from autoq.memory import available_bytes
from autoq.models import DecisionGroup, ModelMap, SlotName

Batch = TypeVar("Batch")

_SHARE_OF_FREE_MEMORY = 0.25
_BYTES = 4

ROWS_PER_CHANNEL = 32
"""Of so many rows the moment is as good as of all: the relative error of a correlation is the root
of the channels' share of the rows, and damping is above what is left of it."""


@dataclass(slots=True)
class SecondMoment:
    """Sum over input rows of x xᵀ."""

    total: Tensor  # float32 [in_features, in_features]
    rows: int = 0

    def mean(self) -> Tensor:
        """Mean of x xᵀ, float32 [in_features, in_features], its correlations shrunk.

        Fewer rows than a few times the channels show correlations that are not there. Off the
        diagonal the mean is multiplied by rows / (rows + channels): nothing is left of them
        without rows, and all of them with many.
        Source: shrinkage towards the diagonal, Ledoit and Wolf, "A well-conditioned estimator for
        large-dimensional covariance matrices" (2004), with the weight of that many prior rows.
        """
        mean = self.total / max(self.rows, 1)
        diagonal = mean.diagonal().clone()
        mean *= self.rows / (self.rows + len(diagonal))
        mean.diagonal().copy_(diagonal)
        return mean


class MomentCollector:
    """Adds the inputs of some groups up, each distinct one once."""

    def __init__(self, groups: Iterable[DecisionGroup], batch_count: int) -> None:
        """
        Args:
            batch_count: how many batches will come to all workers together.
        """
        self._batch_count = batch_count
        self._owners = moment_owners(groups)
        self.moments: dict[SlotName, SecondMoment] = {}

    @property
    def slots(self) -> Collection[SlotName]:
        """Whose inputs are wanted."""
        return self._owners.keys()

    def record(self, name: SlotName, rows: Tensor) -> None:
        """Add inputs [rows, in_features] of a slot; of others than are wanted they are passed over."""
        owner = self._owners.get(name)
        if owner is None or not rows.shape[0]:
            return
        enough = -(-ROWS_PER_CHANNEL * rows.shape[1] // self._batch_count)
        if enough < rows.shape[0]:
            rows = rows[spread(rows.shape[0], enough).to(rows.device)]
        values = rows.float()
        if owner not in self.moments:
            width = values.shape[-1]
            self.moments[owner] = SecondMoment(torch.zeros(width, width, device=rows.device))
        moment = self.moments[owner]
        moment.total.addmm_(values.t(), values)
        moment.rows += rows.shape[0]

    def share(self, model_map: ModelMap, device: torch.device) -> None:
        """Make of the workers' moments those of all data; each calls it.

        Some inputs, such as experts', may have come to other workers alone.
        """
        if not workers.are_several():
            return
        for name in sorted(set(self._owners.values())):
            width = model_map.slots[name].in_features
            moment = self.moments.get(name, SecondMoment(torch.zeros(width, width, device=device)))
            workers.make_sum(moment.total)
            moment.rows = workers.total(moment.rows, device)
            if moment.rows:
                self.moments[name] = moment


def moment_owners(groups: Iterable[DecisionGroup]) -> dict[SlotName, SlotName]:
    """First slot of each set that shares its scales -> the slot that names its input's moment.

    They differ for experts that read one tensor: each sees few of its rows, and they pool theirs.
    """
    owners: dict[SlotName, SlotName] = {}
    for group in groups:
        first_of = {name: members[0] for members in sharing_sets(group) for name in members}
        owners.update((name, name) for name in first_of.values())
        for names in group.input_sets:
            owners.update((first_of[name], first_of[names[0]]) for name in names)
    return owners


def collect_moments(
    model: nn.Module,
    model_map: ModelMap,
    groups: Sequence[DecisionGroup],
    batches: Sequence[Batch],
    run: Callable[[Batch], Any],
    *,
    batch_count: int,
) -> dict[SlotName, SecondMoment]:
    """Run the model over `batches` and gather the second moments of the groups' inputs.

    Args:
        batch_count: how many batches come to all workers together.
    """
    collector = MomentCollector(groups, batch_count)

    def handler(call: MatrixCall, inputs: Tensor) -> Tensor:
        collector.record(call.slot.name, inputs.flatten(0, -2))
        return call.compute(inputs)

    wanted = [model_map.slots[name] for name in collector.slots]
    with torch.no_grad(), tapped(model, wanted, handler):
        for batch in batches:
            run(batch)
    collector.share(model_map, next(model.parameters()).device)
    return collector.moments


def moment_memory(device: torch.device) -> int:
    """Bytes that moments may take on a device: a quarter of what is free there now."""
    return int(available_bytes(device) * _SHARE_OF_FREE_MEMORY)


def parts_in_memory(
    model_map: ModelMap, groups: Sequence[DecisionGroup], memory_bytes: int
) -> Iterator[list[DecisionGroup]]:
    """The groups in parts whose second moments fit in memory together, at least one in each.

    Args:
        memory_bytes: bound on the moments of a part.
    """
    part: list[DecisionGroup] = []
    taken = 0
    for group in groups:
        needed = sum(
            _BYTES * model_map.slots[owner].in_features ** 2
            for owner in set(moment_owners([group]).values())
        )
        if part and taken + needed > memory_bytes:
            yield part
            part, taken = [], 0
        part.append(group)
        taken += needed
    if part:
        yield part
