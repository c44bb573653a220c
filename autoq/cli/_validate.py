"""`autoq validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import (
    DEFAULT_STORE,
    Json,
    Quiet,
    Store,
    StudyName,
    TrustRemoteCode,
    opened_study,
)
from autoq.cli._output import (
    check_writable,
    print_json,
    quiet_libraries,
    results_kept_clean,
    write_text,
)
from autoq.cli._progress import make_progress

if TYPE_CHECKING:
    from autoq.report import ValidationData


@reports_failures
def validate(
    study: StudyName = None,
    random: Annotated[int, typer.Option(help="Plans of random formats, small to large.")] = 40,
    near: Annotated[
        int, typer.Option(help="Best plans for many budgets, and neighbours of the study's plan.")
    ] = 40,
    sequences: Annotated[int, typer.Option(min=1, help="Held-out sequences to measure on.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the plans.")] = 0,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a PNG there.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page there.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check the predicted losses: measure random and near-optimal plans on held-out text.

    What was measured is stored at once: an interrupted validation continues when the same command
    is run again, and `show` gives predictions that are corrected by it from then on.
    """
    check_writable(png)
    check_writable(html)
    quiet_libraries()
    with results_kept_clean():
        from autoq.report import render_validation_html, validation_data, validation_png

        found = opened_study(study, store, trust_remote_code=trust_remote_code)
        payload = found.validate(
            random=random,
            near=near,
            sequences=sequences,
            seed=seed,
            progress=make_progress(quiet=quiet),
        )
        data = validation_data(payload)
        assert data is not None  # it was made just now
        if png is not None:
            validation_png(found.name, data, png)
        if html is not None:
            write_text(html, render_validation_html(found.name, data))
    if as_json:
        pictures = {"png": png and str(png), "html": html and str(html)}
        print_json({"study": found.name, **payload, **pictures})
        return
    _print(found.name, data, quiet=quiet)
    for path in filter(None, (png, html)):
        typer.echo(f"picture: {path}")


def _print(study: str, data: ValidationData, *, quiet: bool) -> None:
    from autoq.cli._tables import make_console, print_validation
    from autoq.report import validation_text

    if quiet:
        typer.echo(f"validation: {validation_text(data)}")
    else:
        print_validation(make_console(), study, data)
