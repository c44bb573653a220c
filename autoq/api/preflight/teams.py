"""Who works on a stage at the same time: this process, others of this machine, or a Ray cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from autoq.api.distribution.crew import LocalCrew, crew_of
from autoq.api.distribution.ray_cluster import Share
from autoq.api.preflight.cluster import Cluster
from autoq.api.refinement.process import threads_each
from autoq.errors import InputError

THIS_MACHINE = "this machine"
_RAY = "the Ray cluster"


@dataclass(frozen=True, slots=True)
class Team:
    """Processes that do the same work, each a part of it."""

    count: int = 1
    owner_works: bool = True  # the process that owns the study is one of them
    threads: int | None = None  # of each; None: as they are
    place: str = THIS_MACHINE  # of the others
    devices: tuple[str, ...] = ()  # GPUs of the others, one each
    gpus_each: int = 0  # of a cluster
    waits_for_start: bool = False  # nobody starts the others before there is something to do
    starts_ray: bool = False  # a cluster is started on this machine
    lacks: str = ""  # of a cluster that has not room for them yet: what it said

    @property
    def others(self) -> int:
        """Processes beside the owner."""
        return self.count - self.owner_works

    def of(self, count: int) -> Team:
        """The same with fewer processes; the last one is the owner, where it works, too."""
        if count == 1 and self.owner_works:
            return ALONE
        return replace(self, count=count, devices=self.devices[: count - self.owner_works])

    @property
    def shares_memory(self) -> bool:
        """Whether the others take of the memory that the owner has."""
        return self.place == THIS_MACHINE and not self.devices and not self.gpus_each

    @property
    def share_of_a_core(self) -> float:
        """That each thread has, where there are more of them than cores; 1 elsewhere."""
        if not self.shares_memory:
            return 1.0
        return min(1.0, (os.cpu_count() or 1) / (self.count * (self.threads or 1)))


ALONE = Team()


def scoring_team(devices: int | None, cluster: Cluster | None, *, device: str) -> Team:
    """Who scores.

    Args:
        devices: as `autoq.search` takes them.
        cluster: None where nobody asked for one.
        device: the configured one.
    Raises:
        InputError: there are not so many devices.
    """
    if cluster is not None:
        share = cluster.share(devices, device=device)
        return _team_of(cluster, share, owner_works=False)
    crew = crew_of(devices, None, False, device=device, has_folder=True)
    if not isinstance(crew, LocalCrew):
        return ALONE
    gpus = tuple(name for name in crew.devices if name != "cpu")
    return Team(count=1 + len(crew.devices), threads=crew.threads, devices=gpus)


def trials_team(
    workers: int, cluster: Cluster | None, *, device: str, may_grow: bool = False
) -> Team:
    """Who measures trials.

    Args:
        may_grow: machines may join a cluster that runs, until there are trials to measure.
    Raises:
        InputError: the cluster has not room for so many.
    """
    if workers == 1:
        return ALONE
    if cluster is not None:
        try:
            share = cluster.share(workers - 1, device=device)
        except InputError as error:
            if not may_grow or cluster.is_to_be_started:
                raise
            one = cluster.share(1, device=device)
            later = Share(workers - 1, one.gpus, 1)
            team = _team_of(cluster, later, owner_works=True)
            return replace(team, place=_RAY, lacks=str(error))
        return _team_of(cluster, share, owner_works=True)
    threads = min(torch.get_num_threads(), threads_each(workers))
    return Team(count=workers, threads=threads, waits_for_start=True)


def _team_of(cluster: Cluster, share: Share, *, owner_works: bool) -> Team:
    is_here = cluster.is_this_machine and not share.gpus
    return Team(
        count=share.workers + owner_works,
        owner_works=owner_works,
        threads=share.threads,
        place=THIS_MACHINE if is_here else _RAY,
        gpus_each=share.gpus,
        waits_for_start=True,
        starts_ray=cluster.is_to_be_started,
    )
