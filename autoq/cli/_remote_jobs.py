"""`autoq jobs`, `autoq cancel`, `autoq resume`: work that a server does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from autoq.cli._output import print_columns, print_json
from autoq.cli._servers import Asked
from autoq.client import Client, JobHandle
from autoq.errors import UnknownNameError

if TYPE_CHECKING:
    from autoq.wire import Job

_ID = re.compile("[0-9a-f]+")


def ask_jobs(client: Client, asked: Asked) -> None:
    """`autoq jobs`."""
    values = asked.values
    wanted = {name: values[name] for name in ("status", "study", "kind", "limit")}
    found = [handle.job for handle in client.jobs(**wanted)]
    if asked.values["as_json"]:
        entries = [job.model_dump(mode="json") for job in found]
        print_json({"server": str(client.url), "jobs": entries})
        return
    if not found:
        typer.echo(f"no jobs on {client.url}")
        return
    head = ("job", "what", "status", "study", "progress", "created (UTC)")
    print_columns(head, [_row(job) for job in found])


def _row(job: Job) -> tuple[str, ...]:
    created = job.created[:16].replace("T", " ")
    study = job.study or "-"
    return job.id, job.kind.value, job.status.value, study, _progress(job), created


def _progress(job: Job) -> str:
    if job.problem is not None:
        return job.problem.title
    if job.progress is None or job.finished is not None:
        return "-"
    total = f" of {job.progress.total}" if job.progress.total else ""
    return f"{job.progress.task}: {job.progress.done}{total}"


def ask_cancel(client: Client, asked: Asked) -> None:
    """`autoq cancel`."""
    _tell(client.cancel, client.cancel_study, asked)


def ask_resume(client: Client, asked: Asked) -> None:
    """`autoq resume`."""
    _tell(client.resume, client.resume_study, asked)


def _tell(
    by_id: Callable[[str], JobHandle], by_study: Callable[[str], JobHandle], asked: Asked
) -> None:
    job = _told(by_id, by_study, asked.values["job"])
    if asked.values["as_json"]:
        print_json(job.model_dump(mode="json"))
    else:
        typer.echo(f"job {job.id}: {job.status.value}")


def _told(
    by_id: Callable[[str], JobHandle], by_study: Callable[[str], JobHandle], name: str
) -> Job:
    if _ID.fullmatch(name):
        try:
            return by_id(name).job
        except UnknownNameError:
            pass  # a study may be called so, too
    return by_study(name).job
