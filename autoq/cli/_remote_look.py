"""What a server knows of studies, formats and targets, printed as the commands print it here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import typer

from autoq.cli._look import (
    draw_frontier,
    listed_at_most,
    print_formats,
    print_plans,
    print_shown,
    print_studies,
)
from autoq.cli._output import check_writable, print_columns, print_json
from autoq.cli._servers import Asked
from autoq.client import Client
from autoq.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autoq.search import Plan
    from autoq.wire import StudyEntry

_PAGE = 500


def named_study(client: Client, name: str | None) -> str:
    """The full name of a study: that, the one that begins so, or the latest, which is then said.

    Raises:
        InputError: there is no study, or several begin so.
    """
    if name is None:
        page = client.study_page(limit=1)
        if not page.items:
            raise InputError(
                "the server has no studies yet; make one with `autoq --server URL search MODEL "
                "--bits B`"
            )
        found = page.items[0].name
        which = "the only one" if page.total == 1 else f"the latest of {page.total}"
        typer.echo(f"study {found} ({which} on the server)", err=True)
        return found
    try:
        return client.study(name).name
    except UnknownNameError as error:
        return _beginning(client, name, error)


def _beginning(client: Client, name: str, unknown: UnknownNameError) -> str:
    """The one study whose name begins so, of those that were worked on last."""
    found = client.studies(q=name, limit=_PAGE)
    alike = [entry.name for entry in found if entry.name.startswith(name)]
    if not alike:
        raise unknown
    if len(alike) > 1:
        raise UnknownNameError(
            f"several studies begin with {name!r}: {', '.join(alike[:5])}; give more of the name"
        )
    return alike[0]


def ask_list(client: Client, asked: Asked) -> None:
    """`autoq list`."""
    as_json = asked.values["as_json"]
    newest = listed_at_most(asked.values["limit"], asked.values["everything"], as_json=as_json)
    first = client.study_page(limit=min(newest or _PAGE, _PAGE))
    entries = list(first.items)
    if first.next_cursor is not None and (newest is None or len(entries) < newest):
        entries = list(client.studies(limit=newest))
    plain = [_plain_entry(entry) for entry in entries]
    place = str(client.url)
    if as_json:
        print_json({"server": place, "studies": plain})
    else:
        print_studies(plain, first.total, place)


def _plain_entry(entry: StudyEntry) -> dict[str, Any]:
    return {**entry.model_dump(mode="json"), "status": entry.status.value}


def ask_show(client: Client, asked: Asked) -> None:
    """`autoq show`; a plan for other budgets is stored, as it is here, so that it can be shown."""
    study = named_study(client, asked.values["study"])
    limits = budgets(asked.values)
    plan = client.plan(study, keep=True, **limits).id if limits else None
    print_shown(client.summary(study, plan), as_json=asked.values["as_json"])


def budgets(values: dict[str, Any]) -> dict[str, float]:
    """The budgets that are given, by the names that requests have for them."""
    limits = {
        "effective_bits": values["bits"],
        "max_gb": values["max_gb"],
        "max_active_bits": values["max_active_bits"],
    }
    return {name: limit for name, limit in limits.items() if limit is not None}


def ask_frontier(client: Client, asked: Asked) -> None:
    """`autoq frontier`; what assigns formats to groups is left out of JSON."""
    from autoq.report import report_data

    png, html = asked.values["png"], asked.values["html"]
    for path in (png, html):
        check_writable(path)
    study = named_study(client, asked.values["study"])
    found = client.frontier(study, asked.values["points"])
    plans = cast("Sequence[Plan]", found.points)  # what is printed of plans, points have
    data = report_data(client.summary(study), plans)
    draw_frontier(data, plans, png, html)
    if asked.values["as_json"]:
        points = [point.model_dump(mode="json") for point in found.points]
        pictures = {"png": png and str(png), "html": html and str(html)}
        print_json({"study": study, "unit": found.unit, "plans": points, **pictures})
        return
    print_plans(data, plans, png, html)


def ask_report(client: Client, asked: Asked) -> None:
    """`autoq report`."""
    output = asked.values["output"]
    check_writable(output)
    client.report(named_study(client, asked.values["study"]), output)
    typer.echo(f"report: {output}")


def ask_formats(client: Client, asked: Asked) -> None:
    """`autoq formats`, without the cache's formats and the calibrations."""
    entries = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "effective_bits": entry.effective_bits,
            "peer_bits": entry.peer_effective_bits,
            "block_size": entry.block_size,
            "calibration": entry.calibration,
            "portable": entry.offered_unasked,
            "loads_in": entry.loads_in,
        }
        for entry in client.formats()
    ]
    if asked.values["as_json"]:
        print_json({"formats": entries})
    else:
        print_formats(entries)


def ask_targets(client: Client, asked: Asked) -> None:
    """`autoq targets`: formats that run, without the reasons of those that do not."""
    wanted = asked.values["target"]
    entries = [entry for entry in client.targets() if wanted in (None, entry.target)]
    if not entries:
        raise UnknownNameError(
            f"the server knows no target {wanted!r}; `autoq --server URL targets` lists them"
        )
    if asked.values["as_json"]:
        print_json({"targets": [entry.model_dump(mode="json") for entry in entries]})
        return
    rows = [
        (entry.target, entry.engine, entry.hardware, ", ".join(entry.formats)) for entry in entries
    ]
    print_columns(("target", "engine", "hardware", "runs"), rows)
