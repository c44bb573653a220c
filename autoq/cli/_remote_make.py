"""Work that a server is asked for: started, waited for, and printed as the commands print it here."""

from __future__ import annotations

from typing import Any

import typer

from autoq.cli._failures import INTERRUPTED
from autoq.cli._output import check_writable
from autoq.cli._progress import make_progress
from autoq.cli._remote_look import budgets, named_study
from autoq.cli._servers import Asked
from autoq.client import Client, JobHandle
from autoq.errors import InputError


def finished(handle: JobHandle, asked: Asked) -> dict[str, Any]:
    """The job's result, when it has one; progress is shown meanwhile.

    Raises:
        typer.Exit: the job is not waited for, or somebody interrupts; it goes on.
        AutoqError: it failed or was cancelled.
    """
    if asked.detach:
        typer.echo(handle.id)
        raise typer.Exit
    typer.echo(f"job {handle.id} on the server", err=True)
    try:
        return handle.result(make_progress(quiet=asked.values.get("quiet", False)))
    except KeyboardInterrupt:
        command = f"autoq --server {asked.server.url}"
        typer.echo(
            f"no longer waited for; the job goes on: `{command} jobs` shows it, `{command} cancel "
            f"{handle.id}` ends it",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None


def ask_search(client: Client, asked: Asked) -> None:
    """`autoq search`."""
    from autoq.cli._search import check_budgets, print_found

    values = asked.values
    limits = ("bits", "max_gb", "max_active_bits", "max_latency_ms", "max_kl")
    check_budgets(*(values[name] for name in limits))
    check_writable(values["report"])
    handle = client.search(str(values["model"]), **_search_fields(values))
    finished(handle, asked)
    study = handle.study
    if study is None:
        raise InputError(f"job {handle.id} ended without naming its study; its log says why")
    if values["report"] is not None:
        client.report(study, values["report"])
    print_found(
        client.summary(study),
        str(client.url),
        values["report"],
        as_json=values["as_json"],
        quiet=values["quiet"],
    )


_RENAMED = {
    "bits": "effective_bits",
    "latency_batch": "latency_tokens",
    "calib": "calibration_data",
    "calib_sequences": "calibration_sequences",
    "rule": "rules",
}
_AS_THEY_ARE = (
    *("max_gb", "max_active_bits", "max_latency_ms", "max_kl", "gpu", "kv_bits", "kv_scope"),
    *("container", "target", "include", "exclude", "name", "sequence_length", "batch_size"),
    *("held_out_sequences", "dtype", "device", "max_memory", "calibration", "estimator"),
    *("confidence", "seed", "overwrite", "compare_uniform", "refine"),
)


def _search_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a search request; what was left out, the server's defaults decide."""
    from autoq.cli._search import listed_names

    fields = {field: values[option] for option, field in _RENAMED.items()}
    fields |= {name: values[name] for name in _AS_THEY_ARE}
    for name in ("formats", "kv_formats"):
        fields[name] = listed_names(values[name])
    fields["measure"] = not values["no_measure"]
    fields["export"] = None if values["export"] is None else str(values["export"])
    return {name: value for name, value in fields.items() if value is not None}


def ask_refine(client: Client, asked: Asked) -> None:
    """`autoq refine`."""
    from autoq.cli._refine import chosen_objective, print_refined

    values = asked.values
    study = named_study(client, values["study"])
    objective = chosen_objective(values["metric"], values["objective"])
    handle = client.refine(study, values["trials"], objective=objective, **budgets(values))
    print_refined(finished(handle, asked)["refinement"], as_json=values["as_json"])


def ask_export(client: Client, asked: Asked) -> None:
    """`autoq export`."""
    from autoq.cli._make import print_written, study_and_output

    values = asked.values
    name, output = study_and_output(values["places"])
    fields = {"container": values["container"], "overwrite": values["overwrite"]}
    fields |= {"tp_size": values["tp"], "pp_size": values["pp"], **budgets(values)}
    handle = client.export(named_study(client, name), output, **fields)
    print_written(finished(handle, asked)["export"], as_json=values["as_json"])


def ask_eval(client: Client, asked: Asked) -> None:
    """`autoq eval` of a study."""
    from autoq.cli._make import print_measured

    values = asked.values
    study = named_study(client, values["target"])
    bits = values["bits"]
    plan = (
        client.plan(study) if bits is None else client.plan(study, effective_bits=bits, keep=True)
    )
    if plan.id is None:
        raise InputError(f"the server keeps no plan of {study} to measure; give --bits")
    finished(client.measure(study, plan.id), asked)
    summary = client.summary(study, plan.id)
    measured = next(row for row in summary["measurements"] if row["label"] == plan.label)
    found = {
        "target": study,
        "plan": plan.label,
        "reference": summary["model"],
        "data": "the study's held-out data",
        "tokens": measured["tokens"],
        "metrics": measured["metrics"],
        "noise_floor": summary["noise_floor"],
    }
    print_measured(found, as_json=values["as_json"])


def ask_verify(client: Client, asked: Asked) -> None:
    """`autoq verify` of a checkpoint that the server has."""
    from autoq.cli._verify import end_with, report_of

    values = asked.values
    handle = client.verify(str(values["checkpoint"]), values["target"])
    end_with(report_of(finished(handle, asked)), as_json=values["as_json"])
