"""`autoq store`: what an operator does to a whole study store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from autoq.cli._failures import UNVERIFIED, reports_failures
from autoq.cli._options import DEFAULT_STORE, Json, Store, StudyName, check_store
from autoq.cli._output import check_writable, print_json, quiet_libraries
from autoq.errors import without_password

store_app = typer.Typer(
    help="Check, compact, upgrade a study store; carry a study from one to another.",
    no_args_is_help=True,
)


@store_app.command("check")
@reports_failures
def check(store: Store = DEFAULT_STORE, as_json: Json = False) -> None:
    """Look for damage: the file, the schema, references, and the hash of every array.

    Changes nothing. Ends with exit code 4 where there is a fault; each is named with its study and
    stage.
    """
    quiet_libraries()
    check_store(store)
    from autoq.studies import maintenance

    faults = maintenance.check(store)
    if as_json:
        print_json({"store": without_password(store), "faults": [asdict(f) for f in faults]})
    else:
        for fault in faults:
            typer.echo(_fault_line(fault))
        count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}" if faults else "no fault"
        typer.echo(f"{without_password(store)}: {count}")
    if faults:
        raise typer.Exit(UNVERIFIED)


def _fault_line(fault: object) -> str:
    study, stage = getattr(fault, "study", None), getattr(fault, "stage", None)
    place = "store" if study is None else f"study {study}"
    return f"{place}{f', stage {stage}' if stage else ''}: {getattr(fault, 'what', '')}"


@store_app.command("vacuum")
@reports_failures
def vacuum(store: Store = DEFAULT_STORE, as_json: Json = False) -> None:
    """Remove arrays and rows that nothing refers to, and give their room back.

    Searches may run meanwhile; they wait while a SQLite file is written anew, which takes its size
    once more on the disk.
    """
    quiet_libraries()
    check_store(store)
    from autoq.studies import maintenance

    done = maintenance.vacuum(store)
    if as_json:
        print_json({"store": without_password(store), **asdict(done)})
        return
    typer.echo(
        f"removed {done.unused_blobs} unused arrays ({_mib(done.unused_bytes)}) and "
        f"{done.orphaned_rows} orphaned rows"
    )
    if done.bytes_before is not None and done.bytes_after is not None:
        typer.echo(
            f"{without_password(store)}: {_mib(done.bytes_before)} before, "
            f"{_mib(done.bytes_after)} now"
        )


@store_app.command("upgrade")
@reports_failures
def upgrade(
    store: Store = DEFAULT_STORE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which migrations would run.")
    ] = False,
    backup: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the copy of a SQLite store goes; beside it, named by its revision, if "
            "left out.",
        ),
    ] = None,
    no_backup: Annotated[
        bool, typer.Option("--no-backup", help="Upgrade a SQLite store without a copy of it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring the store's schema to this version of autoq, after a copy of a SQLite store.

    Every other command does the same when it opens a store, without a copy. Back a PostgreSQL
    database up with pg_dump first. The upgrade is one transaction: it happens whole or not at all.
    """
    quiet_libraries()
    check_store(store)
    from autoq.studies import maintenance

    missing = maintenance.missing_revisions(store)
    copy = None
    if missing and not dry_run:
        copy = None if no_backup else _copy_of(store, backup, missing[0][0])
        maintenance.upgrade(store, copy)
    if as_json:
        steps = [{"revision": revision, "what": what} for revision, what in missing]
        plain = {"migrations": steps, "done": bool(missing) and not dry_run}
        print_json(
            {
                "store": without_password(store),
                **plain,
                "backup": None if copy is None else str(copy),
            }
        )
        return
    if not missing:
        typer.echo(
            f"{without_password(store)} has the newest schema, {maintenance.SCHEMA_REVISION}"
        )
        return
    for revision, what in missing:
        typer.echo(f"{'would run' if dry_run else 'ran'} {revision}: {what.splitlines()[0]}")
    if copy is not None:
        typer.echo(f"copy of the store as it was: {copy}")
    elif dry_run:
        typer.echo(
            "nothing was changed; a SQLite store is copied first, of a PostgreSQL one make a dump"
        )


def _copy_of(store: str, wanted: Path | None, next_revision: str) -> Path | None:
    """Where the copy goes; None for a store that is no file."""
    from autoq.studies.maintenance import file_of

    file = file_of(store)
    if file is None:
        return None
    return wanted or file.with_name(f"{file.name}.before-{next_revision}")


@store_app.command("export")
@reports_failures
def export(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="To write.")],
    study: StudyName = None,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Write a study to one file, for another store on another machine.

    All rows and arrays, with their hashes; the same study gives the same bytes. Trials of
    refinements stay behind, the plans and measurements that they led to do not.
    """
    quiet_libraries()
    check_store(store)
    check_writable(output)
    from autoq.studies import StudyStore

    with StudyStore.open(store) as opened:
        found = opened.find(study) if study is not None else opened.newest()
        size = opened.export(found.id, output)
    if as_json:
        print_json({"study": found.name, "file": str(output), "bytes": size})
        return
    typer.echo(f"study {found.name}: {output} ({_mib(size)})")


@store_app.command("import")
@reports_failures
def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `store export` wrote.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Another name than the study has in the file.")
    ] = None,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Put a study from a file into the store, whole or not at all.

    The file is checked first: its parts, their sizes, and the hash of each; nothing in it is run.
    """
    quiet_libraries()
    from autoq.studies import StudyStore

    with StudyStore.open(store) as opened:
        imported = opened.import_file(file, name)
    if as_json:
        print_json({"study": imported, "store": without_password(store)})
        return
    typer.echo(f"study {imported} is in {without_password(store)}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f} MiB"
