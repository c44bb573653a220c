"""What a program asks a server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from autoq.client._failures import UnreachableError
from autoq.client._job import JobHandle
from autoq.client._transport import Transport
from autoq.errors import InputError
from autoq.wire import (
    ExportEntry,
    ExportRequest,
    FormatEntry,
    Frontier,
    Identity,
    Job,
    JobPage,
    MeasureRequest,
    ModelEntry,
    PlanReply,
    PlanRequest,
    Readiness,
    RefineRequest,
    SearchRequest,
    Sensitivities,
    StudyDetail,
    StudyEntry,
    StudyPage,
    TargetEntry,
    TrialEntry,
    TrialPage,
    VerifyRequest,
)

_Body = TypeVar("_Body", bound=BaseModel)
_Read = TypeVar("_Read")

_PAGE = 200


class Client:
    """A server of `autoq serve`. Close it, or use it in a `with` statement.

    Paths of models, data and checkpoints are the server's: `ROOT/inside/it`, or "bundled". Every
    method raises `UnreachableError` where the server does not answer, and otherwise the exception
    of `autoq.errors` that the same mistake raises in process, with the server's sentence.
    """

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 30.0, retries: int = 4
    ) -> None:
        """
        Args:
            url: of the server, as http://127.0.0.1:8731.
            token: what `autoq token create` printed; None takes the environment's AUTOQ_TOKEN, if
                it is set.
            timeout: seconds that a connection or a part of a reply may take.
            retries: how often what is safe to ask twice is asked again where the connection fails
                or the server is busy.

        Raises:
            InputError: the URL is no server's, or a number is out of range.
        """
        self.transport = Transport(url, token, timeout, retries)

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Of the server."""
        return str(self.transport.url)

    def close(self) -> None:
        """End the connections; jobs go on."""
        self.transport.close()

    # What the server is.

    def me(self) -> Identity:
        """Who the server takes this client for."""
        return self._get("v1/me", Identity)

    def ready(self) -> Readiness:
        """Whether work can be done: the store answers, and a worker waits or works."""
        response = self.transport.send("GET", "v1/ready", accepted=(503,))
        return _read(response.content, Readiness)

    def formats(self) -> list[FormatEntry]:
        """The number formats."""
        return self._get("v1/formats", list[FormatEntry])

    def targets(self) -> list[TargetEntry]:
        """Engines on hardware, and what runs there."""
        return self._get("v1/targets", list[TargetEntry])

    def models(self) -> list[ModelEntry]:
        """The models that can be searched."""
        return self._get("v1/models", list[ModelEntry])

    # What is in the store.

    def studies(
        self,
        *,
        status: str | None = None,
        model: str | None = None,
        q: str | None = None,
        limit: int | None = None,
    ) -> Iterator[StudyEntry]:
        """Studies, those that were worked on last first; pages are asked for on the way.

        Args:
            status: only those, one of `autoq.wire.StudyStatus`.
            model: only those of models that are called so.
            q: only those whose name holds this.
            limit: only so many.
        """
        wanted = {"status": status, "model": model, "q": q}
        yield from self._pages("v1/studies", StudyPage, wanted, limit)

    def study_page(self, *, limit: int = 50, cursor: str | None = None) -> StudyPage:
        """One page of studies, and how many there are."""
        return self._get("v1/studies", StudyPage, {"limit": limit, "cursor": cursor})

    def study(self, study: str) -> StudyDetail:
        """Everything about a study that is not a table."""
        return self._get(_study(study), StudyDetail)

    def summary(self, study: str, plan: int | None = None) -> dict[str, Any]:
        """What `autoq show --json` prints of a stored plan, or of the study's last one."""
        return self._get(f"{_study(study)}/summary", dict[str, Any], {"plan": plan})

    def plan(self, study: str, **fields: Any) -> PlanReply:
        """The best plan for budgets, from the stored table; the study's last one for none.

        Args:
            fields: of `autoq.wire.PlanRequest`: effective_bits, max_gb, max_active_bits,
                max_latency_ms, max_kl, gpu, rules, and keep, which stores the plan.
        """
        body = _checked(PlanRequest, fields)
        return self._post(f"{_study(study)}/plans", body, PlanReply, repeatable=not body.keep)

    def stored_plan(self, study: str, plan: int) -> PlanReply:
        """A plan that the study keeps."""
        return self._get(f"{_study(study)}/plans/{plan}", PlanReply)

    def frontier(self, study: str, points: int = 64) -> Frontier:
        """The best plans by rising bits, at so many evenly spaced budgets and where they change."""
        return self._get(f"{_study(study)}/frontier", Frontier, {"points": points})

    def sensitivity(self, study: str) -> Sensitivities:
        """The table that plans are solved from: groups x formats."""
        return self._get(f"{_study(study)}/sensitivity", Sensitivities)

    def trials(self, study: str, *, limit: int | None = None) -> Iterator[TrialEntry]:
        """Measured trials of refinements, the oldest first."""
        yield from self._pages(f"{_study(study)}/trials", TrialPage, {}, limit)

    def exports(self, study: str) -> list[ExportEntry]:
        """The study's checkpoints."""
        return self._get(f"{_study(study)}/exports", list[ExportEntry])

    def report(self, study: str, path: str | Path) -> Path:
        """Write the study's report, one HTML file, to a path of this machine.

        Raises:
            OSError: the file cannot be written.
        """
        page = self.transport.send("GET", f"{_study(study)}/report", repeatable=True)
        Path(path).write_bytes(page.content)
        return Path(path)

    def delete(self, study: str) -> None:
        """Remove a study from the store, which needs the scope admin; checkpoints stay."""
        self.transport.send("DELETE", _study(study))

    # Work.

    def search(self, model: str, **fields: Any) -> JobHandle:
        """Start a search, or go on with the one that has the same configuration.

        Args:
            model: of the server, as "bundled" or "models/llama".
            fields: of `autoq.wire.SearchRequest`, which are arguments of `autoq.search`.
        """
        return self._job("v1/studies", _checked(SearchRequest, {"model": model, **fields}))

    def refine(self, study: str, trials: int, **fields: Any) -> JobHandle:
        """Measure so many plans and keep what is better; fields of `autoq.wire.RefineRequest`."""
        body = _checked(RefineRequest, {"trials": trials, **fields})
        return self._job(f"{_study(study)}/refinements", body)

    def measure(self, study: str, plan: int) -> JobHandle:
        """Measure a stored plan on held-out data."""
        body = _checked(MeasureRequest, {"plan": plan})
        return self._job(f"{_study(study)}/measurements", body)

    def export(self, study: str, output: str, **fields: Any) -> JobHandle:
        """Write a checkpoint below one of the server's export roots.

        Args:
            output: as "exports/llama-5".
            fields: of `autoq.wire.ExportRequest`: plan, or budgets, container, tp_size, pp_size,
                overwrite.
        """
        body = _checked(ExportRequest, {"output": output, **fields})
        return self._job(f"{_study(study)}/exports", body)

    def verify(self, checkpoint: str, target: str | None = None) -> JobHandle:
        """Check a checkpoint of the server's; the result is what `autoq verify --json` prints."""
        body = _checked(VerifyRequest, {"checkpoint": checkpoint, "target": target})
        return self._job("v1/verifications", body)

    def jobs(
        self,
        *,
        status: str | None = None,
        study: str | None = None,
        kind: str | None = None,
        limit: int | None = None,
    ) -> Iterator[JobHandle]:
        """Jobs, the newest first."""
        wanted = {"status": status, "study": study, "kind": kind}
        for job in self._pages("v1/jobs", JobPage, wanted, limit):
            yield JobHandle(self, job)

    def job(self, identifier: str) -> JobHandle:
        """A job by its id."""
        return JobHandle(self, self._get(f"v1/jobs/{quote(identifier, safe='')}", Job))

    def log(self, identifier: str) -> str:
        """What a job's process printed."""
        path = f"v1/jobs/{quote(identifier, safe='')}/log"
        return self.transport.send("GET", path, repeatable=True).text

    def cancel(self, identifier: str) -> JobHandle:
        """Ask a job to end; what it finished is kept."""
        return self._told(f"v1/jobs/{quote(identifier, safe='')}/cancel")

    def resume(self, identifier: str) -> JobHandle:
        """Queue a failed or cancelled job again; it goes on where it was."""
        return self._told(f"v1/jobs/{quote(identifier, safe='')}/resume")

    def cancel_study(self, study: str) -> JobHandle:
        """Ask the newest job of a study to end."""
        return self._told(f"{_study(study)}/cancel")

    def resume_study(self, study: str) -> JobHandle:
        """Queue the newest job of a study again."""
        return self._told(f"{_study(study)}/resume")

    def _told(self, path: str) -> JobHandle:
        return JobHandle(self, _read(self.transport.send("POST", path).content, Job))

    def _job(self, path: str, body: BaseModel) -> JobHandle:
        # One key for all attempts of this call: a reply that is lost makes no second job.
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        response = self.transport.send(
            "POST", path, body=_plain(body), headers=headers, repeatable=True
        )
        return JobHandle(self, _read(response.content, Job))

    def _get(self, path: str, kind: type[_Read], query: dict[str, Any] | None = None) -> _Read:
        return _read(self.transport.send("GET", path, query=query, repeatable=True).content, kind)

    def _post(self, path: str, body: BaseModel, kind: type[_Read], *, repeatable: bool) -> _Read:
        response = self.transport.send("POST", path, body=_plain(body), repeatable=repeatable)
        return _read(response.content, kind)

    def _pages(
        self, path: str, kind: Any, query: dict[str, Any], limit: int | None
    ) -> Iterator[Any]:
        cursor: str | None = None
        left = limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(left, _PAGE)
            page = self._get(path, kind, {**query, "limit": size, "cursor": cursor})
            yield from page.items[:left]
            left = None if left is None else left - len(page.items)
            cursor = page.next_cursor
            if cursor is None:
                return


def _study(name: str) -> str:
    return f"v1/studies/{quote(name, safe='')}"


def _read(content: bytes, kind: type[_Read]) -> _Read:
    """
    Raises:
        UnreachableError: it is no reply of a service that this client knows.
    """
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError:
        raise UnreachableError(
            "the server's reply is none that this client reads; see that the URL is that of "
            "`autoq serve`, and that server and client are of versions that go together"
        ) from None


def _plain(body: BaseModel) -> dict[str, Any]:
    return body.model_dump(mode="json", exclude_unset=True)


def _checked(kind: type[_Body], fields: dict[str, Any]) -> _Body:
    """A request, refused here where the server would refuse its form.

    Raises:
        InputError: a field that the request does not have, or a value that it cannot take.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        said = [_fault(kind, entry["type"], entry["loc"], entry["msg"]) for entry in error.errors()]
        raise InputError("; ".join(said)) from None


def _fault(kind: type[BaseModel], fault: str, where: tuple[int | str, ...], message: str) -> str:
    name = ".".join(map(str, where))
    if fault == "extra_forbidden":
        fields = ", ".join(kind.model_fields)
        return f"{name} is nothing that a server can be asked for here; there are {fields}"
    return f"{name}: {message[:1].lower()}{message[1:]}"
