"""Commands that read a study: `show`, `frontier`, `report`, `list`, `formats`."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoq.cli._budgets import MaxActiveBits, MaxGb
from autoq.cli._failures import reports_failures
from autoq.cli._options import (
    DEFAULT_STORE,
    Bits,
    Json,
    Store,
    StudyName,
    opened_study,
    store_is_missing,
)
from autoq.cli._output import (
    check_writable,
    print_columns,
    print_json,
    quiet_libraries,
    results_kept_clean,
    write_text,
)
from autoq.cli._search import checkpoint_line, print_study, write_report
from autoq.errors import InputError, without_password

if TYPE_CHECKING:
    from autoq.report import ReportData
    from autoq.search import Plan


_LISTED = 50
_MOST_LISTED = 10_000  # larger lists of ids are too long for a statement


@reports_failures
def show(
    study: StudyName = None,
    bits: Bits = None,
    max_gb: MaxGb = None,
    max_active_bits: MaxActiveBits = None,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Show a study's plan: what it takes, predicted and measured loss, every group's format."""
    quiet_libraries()
    with results_kept_clean():
        found = opened_study(study, store)
        summary = found.summary(bits, max_gb=max_gb, max_active_bits=max_active_bits)
    print_shown(summary, as_json=as_json)


def print_shown(summary: dict[str, Any], *, as_json: bool) -> None:
    """What `autoq show` prints of a plan."""
    if as_json:
        print_json(summary)
        return
    print_study(summary)
    if summary["export"]:
        typer.echo(checkpoint_line(summary["export"]))


@reports_failures
def frontier(
    study: StudyName = None,
    points: Annotated[int, typer.Option(min=2, help="Evenly spaced budgets to solve.")] = 24,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a PNG there.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page there.")] = None,
    max_gb: MaxGb = None,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Show the best plan for every budget: loss against bits, as table and picture."""
    check_writable(png)
    check_writable(html)
    quiet_libraries()
    with results_kept_clean():
        from autoq.report import report_data

        found = opened_study(study, store)
        plans = found.frontier(points, max_gb=max_gb)
        data = report_data(found.summary(), plans)
        draw_frontier(data, plans, png, html)
    if as_json:
        pictures = {"png": png and str(png), "html": html and str(html)}
        plain_plans = [_plain_plan(plan) for plan in plans]
        print_json({"study": found.name, "unit": data.unit, "plans": plain_plans, **pictures})
        return
    print_plans(data, plans, png, html)


def draw_frontier(
    data: ReportData, plans: Sequence[Plan], png: Path | None, html: Path | None
) -> None:
    """Write the pictures that are asked for.

    Raises:
        OSError: a file cannot be written.
    """
    from autoq.report import frontier_png, render_frontier_html

    if png is not None:
        frontier_png(data, png)
    if html is not None:
        write_text(html, render_frontier_html(data, plans))


def print_plans(
    data: ReportData, plans: Sequence[Plan], png: Path | None, html: Path | None
) -> None:
    """The table of a frontier, and where its pictures are."""
    from autoq.cli._tables import make_console, print_frontier

    print_frontier(make_console(), data, plans)
    for path in filter(None, (png, html)):
        typer.echo(f"picture: {path}")


def _plain_plan(plan: Plan) -> Mapping[str, Any]:
    return {
        "budget": plan.budget_bits,
        "effective_bits": plan.effective_bits,
        "peer_effective_bits": plan.peer_effective_bits,
        "stored_bits_per_weight": plan.stored_bits_per_weight,
        "stored_bytes": plan.stored_bytes,
        "predicted_loss": plan.predicted_loss,
        "predicted_loss_interval": plan.predicted_loss_interval,
        "bound": plan.bound,
        "gap": plan.gap,
        "takes": plan.takes,
        "assignment": plan.assignment,
    }


@reports_failures
def report(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.html", help="The file to write.")
    ],
    study: StudyName = None,
    bits: Bits = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Write a study's report: one HTML file that needs nothing else."""
    check_writable(output)
    quiet_libraries()
    with results_kept_clean():
        found = opened_study(study, store)
        write_report(found, found.summary(bits), output)
    typer.echo(f"report: {output}")


@reports_failures
def list_command(
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=_MOST_LISTED,
            show_default=f"{_LISTED}, all with --json",
            help="Only so many, those worked on last.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All studies.")] = False,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """List the studies of a store."""
    newest = listed_at_most(limit, everything, as_json=as_json)
    quiet_libraries()
    studies: list[dict[str, Any]] = []
    count = 0
    if not store_is_missing(store):
        gc.disable()  # nothing that a list makes is garbage, and looking for some is a sixth of it
        with results_kept_clean():
            # Not through autoq.api: that loads torch, which takes longer than any list.
            from autoq.studies import StudyStore
            from autoq.studies.listing import list_entries

            with StudyStore.open(store) as opened:
                count = opened.count_studies()
                studies = list_entries(opened, newest)
    if as_json:
        print_json({"store": without_password(store), "studies": studies})
        return
    print_studies(studies, count, without_password(store))


def listed_at_most(limit: int | None, everything: bool, *, as_json: bool) -> int | None:
    """How many studies `autoq list` asks for; None for all.

    Raises:
        InputError: --all and --limit are both given.
    """
    if everything and limit is not None:
        raise InputError(f"--all and --limit {limit} exclude each other; give one")
    return None if everything or (as_json and limit is None) else limit or _LISTED


def print_studies(studies: list[dict[str, Any]], count: int, place: str) -> None:
    """The table of studies, and how many of them are left out.

    Args:
        count: of all studies of the place.
        place: the store or the server.
    """
    if not studies:
        typer.echo(f"no studies in {place}")
        return
    _print_studies(studies)
    if len(studies) < count:
        typer.echo(
            f"{len(studies)} of {count} studies, those worked on last; --all lists all, "
            "--limit N the last N"
        )


def _print_studies(studies: list[dict[str, Any]]) -> None:
    rows = [
        (
            study["name"],
            study["status"],
            ", ".join([*(f"{bits:g}" for bits in study["budgets"]), *study["other_budgets"]]),
            str(study["exports"]),
            study["updated"][:16].replace("T", " "),
            study["model"],
        )
        for study in studies
    ]
    columns = ("study", "status", "budgets", "exports", "updated (UTC)", "model")
    print_columns(columns, rows)


@reports_failures
def formats(as_json: Json = False) -> None:
    """List the number formats: bits, blocks, and where their exports load."""
    from autoq.formats import ALGORITHMS, FORMATS
    from autoq.formats.kv_cache import KV_CACHE_FORMATS

    entries = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "effective_bits": entry.nominal_bits,
            "peer_bits": entry.peer_bits,
            "block_size": entry.weight_block_size,
            "calibration": entry.calibration.value,
            "portable": entry.portable,
            "loads_in": entry.loads_in,
        }
        for entry in FORMATS.values()
    ]
    caches = [
        {
            "name": entry.name,
            "summary": entry.summary,
            "bits": entry.bits,
            "block_size": entry.block_size,
        }
        for entry in KV_CACHE_FORMATS.values()
    ]
    if as_json:
        print_json(
            {
                "formats": entries,
                "kv_cache_formats": caches,
                "calibrations": dict(ALGORITHMS),
            }
        )
        return
    print_formats(entries)
    _print_caches(caches)
    _print_calibrations(ALGORITHMS)


def print_formats(entries: Sequence[Mapping[str, Any]]) -> None:
    """The table of number formats."""
    from autoq.cli._tables import make_console, plain_table

    rows = [
        (
            entry["name"],
            f"{entry['effective_bits']:g}",
            f"{entry['peer_bits']:g}",
            str(entry["block_size"] or "-"),
            "yes" if entry["portable"] else "when named",
            f"{entry['summary']}; calibrated by {entry['calibration']}; loads in {entry['loads_in']}"
            if entry["name"] != "none"
            else entry["summary"],
        )
        for entry in entries
    ]
    columns = ("format", "bits", "ModelOpt counts", "block", "by default", "what it is")
    make_console().print(plain_table(*columns, rows=rows))


def _print_caches(caches: list[dict[str, Any]]) -> None:
    from autoq.cli._tables import make_console, plain_table

    rows = [
        (entry["name"], f"{entry['bits']:g}", str(entry["block_size"] or "-"), entry["summary"])
        for entry in caches
    ]
    make_console().print(plain_table("KV cache", "bits", "block", "what it is", rows=rows))


def _print_calibrations(algorithms: Mapping[str, str]) -> None:
    from autoq.cli._tables import make_console, plain_table

    console = make_console()
    console.print(plain_table("calibration", "what it does", rows=list(algorithms.items())))
    console.print(
        "`autoq search --calibration` takes them joined by '+', as in percentile:99.9+awq+gptq, and "
        "each format does what it can; or best, scales or max, which are the formats' own.",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
