"""Measured trials of a refinement as tasks of a Ray cluster."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from autoq.api.distribution.ray_cluster import connect, share_of
from autoq.api.refinement.process import take_trials, trials_order
from autoq.errors import AutoqError, InputError
from autoq.progress import Progress
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study

_END_SECONDS = 5.0  # a task looks for work twice a second; a late one may still load its model


@contextmanager
def started_tasks(
    address: str,
    study: Study,
    plan: PlanRecord,
    options: Mapping[str, Any],
    count: int,
    progress: Progress,
) -> Iterator[None]:
    """Tasks that take trials of the refinement, until the context ends.

    They end by themselves when there are enough trials. Ray begins a task again, on another machine,
    whose machine is lost; its trial is tried again by whoever comes next.

    Args:
        address: of the cluster, or "auto".
        count: of tasks.
    Raises:
        InputError: there is no such cluster, it is too small, or its machines cannot share the store.
    """
    ray = connect(address)
    refuse_files_elsewhere(ray, study)
    share = share_of(ray, count, device=study.config.device)
    order = trials_order(study, plan, options)
    if study.store.file is not None:
        order["store"] = f"sqlite:///{study.store.file.resolve()}"  # tasks start in other folders
    task = ray.remote(**share.resources, max_retries=-1)(trials_task)
    running = [task.remote(order, share.threads) for _ in range(share.workers)]
    try:
        yield
    finally:
        for message in _ended(ray, running):
            progress.note(f"a worker ended early: {message}; its trial was tried again")


def trials_task(order: Mapping[str, Any], threads: int) -> str:
    """Take trials in a process of the cluster; what went wrong, if anything did."""
    import torch

    torch.set_num_threads(threads)
    try:
        take_trials(order)
    except AutoqError as error:
        return f"{platform.node()}: {error}"
    return ""


def refuse_files_elsewhere(ray: Any, study: Study) -> None:
    """
    Raises:
        InputError: the store is a file, and the cluster has machines that do not have it.
    """
    if study.store.file is None:
        return
    names = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    others = sorted(names - {platform.node()})
    if others:
        raise InputError(
            f"machines share trials through a database server, and {study.store.file} is a file that "
            f"{', '.join(others)} cannot lock safely; use --store postgresql+psycopg://..., or a "
            "cluster of this machine alone"
        )


def _ended(ray: Any, running: list[Any]) -> Iterator[str]:
    """Wait for the end of tasks, or bring it about; what went wrong in them."""
    done, late = ray.wait(running, num_returns=len(running), timeout=_END_SECONDS)
    for reference in late:
        with suppress(Exception):
            ray.cancel(reference, force=True)
    for reference in done:
        try:
            message = ray.get(reference)
        except Exception as error:  # noqa: BLE001  (Ray's own, of many kinds)
            message = " ".join(str(error).split())[:200]
        if message:
            yield message
