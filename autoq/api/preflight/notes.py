"""What an estimate does not count, or takes for granted, in words."""

from __future__ import annotations

from collections.abc import Mapping

from autoq.api.preflight.cluster import Cluster
from autoq.api.preflight.workload import Workload


def notes_of_search(work: Workload, cluster: Cluster | None) -> list[str]:
    """What is not counted, or was taken for granted."""
    notes = []
    if cluster is not None and not cluster.has_answered:
        notes.append(
            f"the Ray cluster {cluster.failure}: whether it has room for {work.scorers.others} workers "
            "that score is not known"
        )
    elif cluster is not None and not cluster.is_this_machine:
        notes.append("the Ray cluster's machines are taken to be as fast as this one")
        if any(machine.gpus for machine in cluster.machines):
            notes.append("Ray does not know what memory its GPUs have, so that was not looked at")
    if work.trial_workers.lacks:
        notes.append(
            "machines must join the Ray cluster before trials are measured, or the search ends there: "
            f"{work.trial_workers.lacks}"
        )
    refining = work.refining
    if refining is not None and not refining.aim.is_divergence:
        notes.append("what --objective measures beside divergences takes time that is not counted")
    if refining is not None and refining.constraints:
        notes.append("what --min-task measures takes time that is not counted")
    return notes


def notes_of_gpus(work: Workload, free_bytes: Mapping[str, int] | None) -> list[str]:
    """That other processes' GPUs were not looked at, where nobody says what they have free."""
    if free_bytes is not None:
        return []
    names = ", ".join(work.scorers.devices)
    return [f"what is free on {names} could not be asked, and was not looked at"]
