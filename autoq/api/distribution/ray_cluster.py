"""Workers on a Ray cluster: actors that score, and tasks that measure trials.

Ray is an extra (`pip install 'autoq[ray]'`). The driver, which is the process that the user started,
owns the study and leaves scoring to the actors: what it runs on need not be what they run on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from autoq.api.distribution.dealing import (
    BatchFailedError,
    BatchWorker,
    WorkerLostError,
    WorkerRefusedError,
)
from autoq.api.distribution.messages import Message
from autoq.api.distribution.scorer import BatchScorer, from_arrays, to_arrays
from autoq.api.scoring import ScoredBatch
from autoq.errors import AutoqError, InputError

AUTO = "auto"
"""The cluster that this machine belongs to, or a cluster of this machine alone."""

RESTARTS = 3
"""How often an actor that was lost is started again, where the cluster has room."""

START_SECONDS = 600.0
"""How long an actor may take until it is there: a cluster may have to start a machine."""

SILENCE_SECONDS = 120.0
"""After so long without a sign of life an actor counts as lost, though nobody says that it died."""

LONG_BATCH_SECONDS = 600.0
"""Least time after which an actor that lives counts as stuck in a batch."""

_LONG_BATCH = 20  # or so many times what its longest batch took; its first may take any time
_SIGN_SECONDS = 10.0  # between signs of life
_LONGEST_REASON = 200  # characters
_LOST = ("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError")


@dataclass(frozen=True, slots=True)
class Share:
    """What each worker has of the cluster."""

    workers: int
    gpus: int  # of each
    threads: int  # of its CPU

    @property
    def resources(self) -> dict[str, Any]:
        """As Ray is asked for them."""
        return {"num_gpus": self.gpus, "num_cpus": self.threads}

    @property
    def device(self) -> str:
        """Ray shows each actor its own GPU only."""
        return "cuda" if self.gpus else "cpu"


def ray_or_refuse() -> Any:
    """
    Raises:
        InputError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "--ray needs Ray, which is not installed; pip install 'autoq[ray]', or leave --ray out"
        ) from None
    return ray


def connect(address: str) -> Any:
    """Ray, connected to the cluster at `address`; stays so for the life of the process.

    Args:
        address: of a cluster, or "auto".
    Raises:
        InputError: no cluster answers there, or Ray is not installed.
    """
    ray = ray_or_refuse()
    if ray.is_initialized():
        return ray
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError) as error:
        if address != AUTO:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"--ray must be the address of a running cluster or auto, and none answers at "
                f"{address} ({reason}); start one with `ray start --head`"
            ) from None
        ray.init(address="local", include_dashboard=False, **quiet)
    return ray


def share_of(ray: Any, workers: int | None, *, device: str = "auto") -> Share:
    """What each of so many workers gets: a GPU where there are any, and its part of the cores.

    Args:
        workers: None: one for each GPU, or for each machine where there is none.
        device: the configured one; "cpu" leaves GPUs alone.
    Raises:
        InputError: there are not so many GPUs or cores.
    """
    machines = sum(1 for node in ray.nodes() if node["Alive"])
    return divided(ray.cluster_resources(), machines, workers, device=device)


def divided(
    resources: Mapping[str, float], machines: int, workers: int | None, *, device: str
) -> Share:
    """The same of a cluster with these resources, named as Ray names them.

    Raises:
        InputError: as `share_of`.
    """
    gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
    cores = max(1, int(resources.get("CPU", 1)))
    wanted = workers or gpus or machines
    most = gpus or cores
    if wanted > most:
        kind = "GPUs" if gpus else "cores"
        raise InputError(
            f"a worker must have one of the cluster's {most} {kind}, and {wanted} workers were asked "
            "for; ask for fewer, or add machines"
        )
    return Share(wanted, 1 if gpus else 0, max(1, cores // wanted))


class ScoringActor:
    """Runs in a process of the cluster; made an actor by `RayWorker`."""

    def __init__(self) -> None:
        self._scorer: BatchScorer | None = None

    def begin(
        self, header: str, arrays: Mapping[str, NDArray[Any]], device: str, threads: int
    ) -> dict[str, Any]:
        """Read the model; where this is, or {"refused": why}."""
        order = Message(json.loads(header), arrays)
        try:
            self._scorer = BatchScorer(order, device=device, threads=threads)
        except AutoqError as error:
            return {"refused": str(error)}
        return self._scorer.about()

    def score(self, index: int, estimator: str) -> dict[str, NDArray[Any]]:
        """Score a batch."""
        assert self._scorer is not None  # it was begun
        return to_arrays(self._scorer.score(index, estimator))

    def sign_of_life(self) -> bool:
        """Answered while another thread scores."""
        return True


class RayWorker:
    """An actor, and the one that takes its place when it is lost."""

    restarts = RESTARTS

    def __init__(self, ray: Any, name: str, share: Share, orders: _SharedOrder) -> None:
        self.name = name
        self._ray, self._share, self._orders = ray, share, orders
        self._actor: Any = None
        self._is_closed = False  # by the owner, for good
        self._longest_seconds = 0.0  # of a batch

    def begin(self, order: Message) -> dict[str, Any]:
        """See `BatchWorker`."""
        ray = self._ray
        threads = {"max_concurrency": 2}  # one scores, the other gives signs of life
        made = ray.remote(**self._share.resources, **threads, max_restarts=0)(ScoringActor)
        self._actor = made.remote()
        if self._is_closed:
            self._end_actor()
        answer = self._got(
            self._actor.begin.remote(
                *self._orders.references(order), self._share.device, self._share.threads
            ),
            START_SECONDS,
        )
        if "refused" in answer:
            raise WorkerRefusedError(answer["refused"])
        return dict(answer)

    def score(self, index: int, estimator: str) -> ScoredBatch:
        """See `BatchWorker`."""
        started = time.monotonic()
        asked = self._actor.score.remote(index, estimator)
        self._wait_while_it_lives(asked, started)
        arrays = self._got(asked, None)
        self._longest_seconds = max(self._longest_seconds, time.monotonic() - started)
        return from_arrays({name: array.copy() for name, array in arrays.items()})

    def _wait_while_it_lives(self, asked: Any, started: float) -> None:
        """Until the answer, whatever it is, is there.

        Raises:
            WorkerLostError: the actor gives no sign of life, or has a batch for far longer than any
                before; it is ended.
        """
        heard, sign = started, None
        while True:
            sign = sign or self._actor.sign_of_life.remote()
            wanted = [asked, sign]
            done, _ = self._ray.wait(wanted, num_returns=2, timeout=_SIGN_SECONDS)
            if asked in done:
                return
            now = time.monotonic()
            if sign in done:
                heard, sign = now, None
            if now - heard > SILENCE_SECONDS:
                self._lose(f"it gave no sign of life for {SILENCE_SECONDS:g} s")
            bound = max(LONG_BATCH_SECONDS, _LONG_BATCH * self._longest_seconds)
            if self._longest_seconds and now - started > bound:
                self._lose(
                    f"it has had one batch for {now - started:.0f} s, and none before took longer "
                    f"than {self._longest_seconds:.0f} s"
                )

    def _lose(self, reason: str) -> None:
        self._end_actor()
        raise WorkerLostError(reason)

    def _got(self, reference: Any, seconds: float | None) -> Any:
        from ray import exceptions

        lost = tuple(getattr(exceptions, name) for name in _LOST if hasattr(exceptions, name))
        try:
            return self._ray.get(reference, timeout=seconds)
        except exceptions.GetTimeoutError:
            self._end_actor()
            raise WorkerLostError(f"the cluster had no room for it in {seconds:g} s") from None
        except lost as error:
            raise WorkerLostError(" ".join(str(error).split())[:_LONGEST_REASON]) from None
        except exceptions.RayTaskError as error:
            raise BatchFailedError(f"{type(error.cause).__name__}: {error.cause}") from None

    def close(self) -> None:
        """See `BatchWorker`."""
        self._is_closed = True
        self._end_actor()

    def _end_actor(self) -> None:
        if self._actor is not None:
            with suppress(Exception):
                self._ray.kill(self._actor)


class _SharedOrder:
    """The order, put into the cluster once for all actors."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._of: Message | None = None
        self._references: tuple[Any, Any] | None = None

    def references(self, order: Message) -> tuple[Any, Any]:
        """Of its header and of its arrays."""
        if self._references is None or self._of is not order:
            self._of = order
            header = json.dumps(dict(order.header))
            self._references = self._ray.put(header), self._ray.put(dict(order.arrays))
        return self._references


class RayCrew:
    """Actors of a cluster."""

    scores_here = False
    threads: int | None = None

    def __init__(self, address: str, workers: int | None, *, device: str) -> None:
        """
        Raises:
            InputError: there is no such cluster, or it is too small.
        """
        self._ray = connect(address)
        self._share = share_of(self._ray, workers, device=device)

    def prepare(self) -> None:
        """Actors are started when there is something to score: others may want their GPUs."""

    def workers(self) -> Sequence[BatchWorker]:
        """See `Crew`."""
        orders = _SharedOrder(self._ray)
        return [
            RayWorker(self._ray, f"actor {number}", self._share, orders)
            for number in range(1, self._share.workers + 1)
        ]

    def close(self) -> None:
        """Actors end with their pass."""
