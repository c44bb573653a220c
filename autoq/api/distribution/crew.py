"""All workers of a search, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from autoq.api.distribution.dealing import BatchWorker, Dealer
from autoq.api.distribution.messages import Message
from autoq.api.distribution.processes import ProcessWorker
from autoq.api.distribution.scorer import scoring_order
from autoq.api.refinement.process import fewer_threads, threads_each
from autoq.api.scoring import ScoredBatch, Take
from autoq.api.study import Study
from autoq.api.task import LoadedModel
from autoq.data import TokenData
from autoq.errors import InputError


class Crew(Protocol):
    """Who scores beside the process that owns the study."""

    scores_here: bool  # whether that process scores, too
    threads: int | None  # of the CPU, in that process while it scores; None: as they are

    def prepare(self) -> None:
        """Get ready what takes its time, as scores will be wanted."""
        ...

    def workers(self) -> Sequence[BatchWorker]:
        """One pass's workers."""
        ...

    def close(self) -> None:
        """Send everybody home."""
        ...


class LocalCrew:
    """Processes of this machine."""

    scores_here = True

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        """
        Args:
            devices: one for each process beside this one.
            threads: of each process.
        """
        self.threads: int | None = threads
        self.devices = devices
        self._ready: list[ProcessWorker] = []

    def prepare(self) -> None:
        """Start the processes, which import what they need while calibration runs."""
        assert self.threads is not None
        self._ready = [
            ProcessWorker(f"process {number}", device=device, threads=self.threads)
            for number, device in enumerate(self.devices, 1)
        ]

    def workers(self) -> Sequence[BatchWorker]:
        """See `Crew`."""
        if not self._ready:
            self.prepare()
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        """End processes that nobody has asked for."""
        for worker in self._ready:
            worker.close()
        self._ready = []


class Helpers:
    """A crew at work on one study; see `BatchHelpers`."""

    def __init__(self, crew: Crew, study: Study, loaded: LoadedModel, data: TokenData) -> None:
        self._crew = crew
        self._order: Callable[[], Message] = lambda: scoring_order(study, loaded, data)
        self._report: list[dict[str, Any]] = []

    @contextmanager
    def dealing(
        self,
        estimator: str,
        batches: range,
        here: Callable[[int], ScoredBatch],
        note: Callable[[str], None],
    ) -> Iterator[Take]:
        """See `BatchHelpers`."""
        dealer = Dealer(
            self._crew.workers(),
            self._order(),
            estimator,
            batches,
            here,
            scores_here=self._crew.scores_here,
        )
        try:
            with fewer_threads(self._crew.threads):
                yield lambda index, idle: dealer.take(index, idle=idle, note=note)
        finally:
            dealer.close()
            self._report = dealer.report()

    def report(self) -> list[dict[str, Any]]:
        """Who has scored how many batches, this process first."""
        return self._report


@contextmanager
def at_hand(crew: Crew | None) -> Iterator[None]:
    """Send the crew home when the context ends."""
    try:
        yield
    finally:
        if crew is not None:
            crew.close()


def crew_of(
    devices: int | None, ray: str | None, ranks: bool, *, device: str, has_folder: bool
) -> Crew | None:
    """The workers that are asked for; None where this process is to score alone.

    Args:
        devices: GPUs, or processes where there are none, this process's own included; of the
            cluster's with `ray`. None is one, or what the cluster has.
        ray: address of a Ray cluster, or "auto".
        ranks: the other ranks of this process's launch score.
        device: the configured one.
        has_folder: the model can be read from one.
    Raises:
        InputError: there are not so many, workers could not read the model, or two ways are asked
            for at once.
    """
    if devices is not None and devices < 1:
        raise InputError(f"devices must be >= 1, got {devices}")
    alone = devices in (None, 1) and ray is None and not ranks
    if not alone and not has_folder:
        raise InputError(
            "other processes read the model from its folder, and this one is in memory; give its "
            "folder, or score in this process alone (without --devices, --ray and torchrun)"
        )
    if ranks and not (devices in (None, 1) and ray is None):
        raise InputError(
            "ranks that a launcher started score already, and --devices or --ray asks for other "
            "workers; leave them out, or start autoq without the launcher"
        )
    if alone:
        return None
    if ranks:
        from autoq.api.distribution.ranks import RanksCrew, required_launch

        return RanksCrew(required_launch())
    if ray is not None:
        from autoq.api.distribution.ray_cluster import RayCrew

        return RayCrew(ray, devices, device=device)
    assert devices is not None  # or it is alone
    # The same number everywhere: sums over parts depend on how many parts there are.
    threads = min(torch.get_num_threads(), threads_each(devices))
    return LocalCrew(_devices(devices, device), threads)


def _devices(wanted: int, device: str) -> list[str]:
    """Devices of the processes beside this one, which has the first."""
    if device == "cpu" or not torch.cuda.is_available():
        return ["cpu"] * (wanted - 1)
    if device not in ("auto", "cuda", "cuda:0"):
        raise InputError(
            f"--device names one device ({device}) and --devices asks for {wanted}; leave one out"
        )
    found = torch.cuda.device_count()
    if wanted > found:
        raise InputError(
            f"--devices must be at most the number of GPUs, {found}, got {wanted}; give fewer, or "
            "--device cpu"
        )
    return [f"cuda:{number}" for number in range(1, wanted)]
