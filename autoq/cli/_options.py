"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from autoq.errors import InputError, without_password

if TYPE_CHECKING:
    from autoq.api import Study

DEFAULT_STORE = "sqlite:///autoq.db"
_SQLITE_FILE = "sqlite:///"

Store: TypeAlias = Annotated[
    str, typer.Option("--store", envvar="AUTOQ_STORE", help="URL of the study store.")
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON object to standard output, nothing else.")
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no tables, only the last lines.")
]
StudyName: TypeAlias = Annotated[
    str | None,
    typer.Argument(
        metavar="STUDY",
        show_default=False,
        help="Name, number or unique beginning of a name; the latest study if left out.",
    ),
]
Bits: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--bits",
        "-b",
        help="Budget in effective bits per weight; the last one asked for if left out.",
    ),
]
Overwrite: TypeAlias = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that the model folder brings."),
]


def store_is_missing(store: str) -> bool:
    """Whether the URL names an SQLite file that does not exist, which opening would create."""
    path = store.removeprefix(_SQLITE_FILE)
    is_file = store.startswith(_SQLITE_FILE) or "://" not in store
    return is_file and path not in ("", ":memory:") and not Path(path).exists()


def check_store(store: str) -> None:
    """Refuse to look for a study in a store that does not exist.

    Raises:
        InputError: it is an SQLite file that does not exist.
    """
    if store_is_missing(store):
        raise InputError(
            f"the study store {store} does not exist; name another with --store, or make it with "
            "`autoq search MODEL_DIR --bits B`"
        )


def opened_study(name: str | None, store: str, *, trust_remote_code: bool = False) -> Study:
    """The study called `name`, or the latest, which is then named on standard error.

    Raises:
        InputError: the store does not exist or has no such study.
    """
    from autoq.api import list_studies, open_study

    check_store(store)
    study = open_study(name, store, trust_remote_code=trust_remote_code)
    if name is None:
        count = len(list_studies(store))
        which = "the only one" if count == 1 else f"the latest of {count}"
        typer.echo(f"study {study.name} ({which} in {without_password(store)})", err=True)
    return study
