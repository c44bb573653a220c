"""What workers that calibrate on parts of the data tell each other, so that all find the same scales.

Where torch.distributed is initialised every rank calls `calibrate` with its own batches, and each
function here is called by all ranks in the same order. With one process nothing happens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as workers

from autoq.errors import DataError


def are_several() -> bool:
    """Whether there are other workers."""
    is_ready = workers.is_available() and workers.is_initialized()
    return is_ready and workers.get_world_size() > 1


def make_largest(tensor: Tensor) -> None:
    """Put in each place the largest of the workers' values, infinite where one is not finite."""
    if are_several():
        tensor.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        workers.all_reduce(tensor, workers.ReduceOp.MAX)


def make_sum(tensor: Tensor) -> None:
    """Put in each place the sum of the workers' values."""
    if are_several():
        workers.all_reduce(tensor)


def total(value: int, device: torch.device) -> int:
    """The sum of the workers' values."""
    return sum(_each(value, device))


def least(value: int, device: torch.device) -> int:
    """The smallest of the workers' values."""
    return min(_each(value, device))


def count_batches(own: int, device: torch.device) -> int:
    """Batches of all workers together.

    Raises:
        DataError: a worker among several has none; all of them raise it.
    """
    counts = _each(own, device)
    if len(counts) > 1 and 0 in counts:
        raise DataError(
            f"every worker needs calibration batches, and rank {counts.index(0)} has none; give each "
            "rank a part of the data, or calibrate with fewer ranks"
        )
    return sum(counts)


def all_hold(flags: list[bool], device: torch.device) -> list[bool]:
    """Which of the flags are set on every worker."""
    if not are_several():
        return flags
    unset = torch.tensor([not flag for flag in flags], dtype=torch.int64, device=device)
    workers.all_reduce(unset)
    return [not count for count in unset.tolist()]


def joined_rows(storage: Tensor, filled: int) -> Tensor:
    """The first rows of each worker's storage, worker by worker.

    Args:
        storage: [rows, columns], of one shape and dtype on all workers.
        filled: how many rows of it count.
    """
    if not are_several():
        return storage[:filled]
    own = storage.contiguous().view(torch.uint8)  # which every backend takes
    found = [torch.empty_like(own) for _ in range(workers.get_world_size())]
    workers.all_gather(found, own)
    counts = _each(filled, storage.device)
    return torch.cat(
        [part.view(storage.dtype)[:count] for part, count in zip(found, counts, strict=True)]
    )


def _each(value: int, device: torch.device) -> list[int]:
    if not are_several():
        return [value]
    own = torch.tensor([value], dtype=torch.int64, device=device)
    found = [torch.zeros_like(own) for _ in range(workers.get_world_size())]
    workers.all_gather(found, own)
    return torch.cat(found).tolist()
