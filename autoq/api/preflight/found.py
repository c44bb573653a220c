"""What an estimate says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from autoq.api.preflight.memory import largest


@dataclass(frozen=True, slots=True)
class Misfit:
    """Something that there is not enough of."""

    what: str  # "memory" or "disk"
    place: str  # the device, the folder, or the cluster
    needed_bytes: int
    free_bytes: int
    remedies: tuple[str, ...]  # each would make it fit


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerNeeds:
    """Processes that work on a stage beside the one that owns the study."""

    stage: str
    count: int
    memory_bytes: int  # of each; of a GPU, where it has one
    place: str  # "this machine", its GPUs, or a Ray cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The estimate; `benchmarks/preflight.py` holds it against what searches take."""

    seconds: Mapping[str, float]  # by stage
    memory_bytes: Mapping[str, int]  # peak of each stage, of the process that owns the study
    machine_bytes: Mapping[str, int]
    """The same of all processes of this machine that share the device; pages that they share count
    once. On GPUs each process has its own, so these are the owner's."""
    workers: tuple[WorkerNeeds, ...]  # beside the owner
    store_bytes: int
    checkpoint_bytes: int  # 0 where none is written
    temporary_bytes: int  # what blocks give and memory does not hold; 0 with the model in memory
    outputs_bytes: int  # of the original's outputs, which trials share beside the store
    free_memory_bytes: int  # that the process could still take
    used_memory_bytes: int  # that it has already, and that is part of the peaks
    misfits: tuple[Misfit, ...]
    notes: tuple[str, ...]  # what is not counted, or was taken for granted

    @property
    def fits(self) -> bool:
        """Whether all of it fits."""
        return not self.misfits

    @property
    def peak_bytes(self) -> int:
        """Of the owner's resident memory, over all stages."""
        return largest(self.memory_bytes)[1]

    @property
    def machine_peak_bytes(self) -> int:
        """Of all processes of this machine together, over all stages."""
        return largest(self.machine_bytes)[1]

    @property
    def disk_bytes(self) -> int:
        """All that is written."""
        written = self.store_bytes + self.checkpoint_bytes
        return written + self.temporary_bytes + self.outputs_bytes

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "peak_stage": largest(self.memory_bytes)[0],
            "machine_peak_bytes": self.machine_peak_bytes,
            "disk_bytes": self.disk_bytes,
            "total_seconds": self.total_seconds,
        }
