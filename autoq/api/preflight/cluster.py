"""What a Ray cluster has, asked for a few seconds in a process of its own.

Connecting may wait long for an address where nobody answers, and stays for the life of a process:
an estimate does neither.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autoq.api.distribution.ray_cluster import AUTO, Share, divided, ray_or_refuse
from autoq.api.preflight import asking
from autoq.errors import InputError
from autoq.memory import available_bytes

PATIENCE_SECONDS = 6.0
"""Ray's import takes about two of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine of a cluster."""

    cores: float
    gpus: float
    memory_bytes: int  # that Ray may give to workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is known of a cluster."""

    machines: tuple[Machine, ...]  # none: nothing is known
    is_this_machine: bool  # and no other
    is_to_be_started: bool = False  # by the search
    failure: str = ""  # where nothing is known: what the cluster did

    @property
    def has_answered(self) -> bool:
        """Whether anything is known."""
        return bool(self.machines)

    def share(self, workers: int | None, *, device: str) -> Share:
        """What each of so many workers would get.

        Args:
            workers: None: as many as suit the cluster; one, where nothing is known of it.
        Raises:
            InputError: it has not so many GPUs or cores.
        """
        if not self.has_answered:
            return Share(workers or 1, 0, torch.get_num_threads())
        resources = {
            "CPU": sum(machine.cores for machine in self.machines),
            "GPU": sum(machine.gpus for machine in self.machines),
        }
        return divided(resources, len(self.machines), workers, device=device)

    def room_for(self, share: Share, worker_bytes: int) -> int:
        """How many workers of a share all machines hold together, by cores, GPUs and memory."""
        return sum(_room(machine, share, worker_bytes) for machine in self.machines)

    @property
    def memory_bytes(self) -> int:
        """Of all machines."""
        return sum(machine.memory_bytes for machine in self.machines)


def _room(machine: Machine, share: Share, worker_bytes: int) -> int:
    by_cores = int(machine.cores // share.threads)
    if share.gpus:  # whose memory Ray does not know
        return min(by_cores, int(machine.gpus // share.gpus))
    return min(by_cores, machine.memory_bytes // max(1, worker_bytes))


def cluster_at(address: str, *, patience_seconds: float = PATIENCE_SECONDS) -> Cluster:
    """Ask a cluster what it has.

    Args:
        address: as `autoq.search` takes it. Where "auto" finds none, the search starts one of this
            machine.
    Returns:
        One without machines where the answer takes longer than `patience_seconds`, or asking fails.
    Raises:
        InputError: Ray is not installed, or says that nobody answers at the address.
    """
    if importlib.util.find_spec("ray") is None:
        ray_or_refuse()
    # By its file: what this package imports takes as long as Ray.
    command = [sys.executable, "-P", asking.__file__, address]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=patience_seconds,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        answer: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return _unknown(f"did not answer within {patience_seconds:g} s")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = str(getattr(error, "stderr", None) or "").strip().splitlines()
        return _unknown("could not be asked" + (f" ({said[-1]})" if said else ""))
    if asking.NOBODY not in answer:
        machines = tuple(Machine(**machine) for machine in answer["machines"])
        return Cluster(machines=machines, is_this_machine=answer["is_this_machine"])
    if address != AUTO:
        raise InputError(
            f"--ray must be the address of a running cluster or auto, and none answers at {address} "
            f"({answer[asking.NOBODY]}); start one with `ray start --head`"
        )
    return _cluster_of_this_machine()


def _unknown(failure: str) -> Cluster:
    return Cluster(machines=(), is_this_machine=False, failure=failure)


def _cluster_of_this_machine() -> Cluster:
    machine = Machine(
        cores=os.cpu_count() or 1,
        gpus=torch.cuda.device_count(),
        memory_bytes=available_bytes(torch.device("cpu")),
    )
    return Cluster(machines=(machine,), is_this_machine=True, is_to_be_started=True)
