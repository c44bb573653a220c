"""`autoq refine`."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import typer

from autoq.cli._budgets import MaxActiveBits, MaxGb
from autoq.cli._failures import reports_failures
from autoq.cli._options import (
    DEFAULT_STORE,
    Bits,
    Json,
    Quiet,
    Store,
    StudyName,
    TrustRemoteCode,
    opened_study,
)
from autoq.cli._output import print_json, quiet_libraries, results_kept_clean
from autoq.cli._progress import make_progress
from autoq.errors import InputError

ObjectiveText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="EXPRESSION",
        help="What trials minimise: arithmetic over metrics, as 'kl + 0.1*ppl'; kl if left out.",
    ),
]
MinTask: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC>=NUMBER",
        help="What plans must keep: a task or a metric and a bound, with an x for times the "
        "original's, as 'arc_easy>=0.99x'; repeatable.",
    ),
]
Workers: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Processes that measure trials at the same time.")
]
Ray: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="auto|ADDRESS",
        help="Work on a Ray cluster: the one that this machine belongs to, or else one of this machine "
        "alone (auto), or the one at an address.",
    ),
]
SamplerName: TypeAlias = Annotated[
    str,
    typer.Option(metavar="tpe|gp|nsga2", help="Optuna's sampler of score multipliers."),
]


@reports_failures
def refine(
    study: StudyName = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Plans to measure, the start and earlier runs included.")
    ] = 100,
    metric: Annotated[
        str | None, typer.Option(help="What trials minimise, where it is one metric: kl.")
    ] = None,
    objective: ObjectiveText = None,
    min_task: MinTask = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="bits",
            help="Look for the whole front of the objective against effective bits instead of one "
            "plan.",
        ),
    ] = None,
    workers: Workers = 1,
    ray: Ray = None,
    sampler: SamplerName = "tpe",
    bits: Bits = None,
    max_gb: MaxGb = None,
    max_active_bits: MaxActiveBits = None,
    sequences: Annotated[
        int, typer.Option(help="Calibration sequences that trials are measured on.")
    ] = 32,
    fresh_sequences: Annotated[
        int, typer.Option(help="Sequences that chose nothing, to confirm the best trials on.")
    ] = 64,
    held_out_sequences: Annotated[int, typer.Option(help="Held-out sequences to report on.")] = 32,
    cache_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory for what trials have in common, in each process; a quarter of what is "
            "free if left out."
        ),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the original's outputs, which workers and later runs share; beside an "
            "SQLite store if left out.",
        ),
    ] = None,
    no_prune: Annotated[
        bool, typer.Option("--no-prune", help="Measure hopeless trials to their end, too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the trials.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Improve a plan by measuring others round it on the real quantised model.

    Trials are stored as they go: run the same command again, or on other machines with the same
    store, and it goes on. What wins on fresh text becomes the plan that `show` and `export` take.
    """
    chosen = chosen_objective(metric, objective)
    quiet_libraries()
    with results_kept_clean():
        found = opened_study(study, store, trust_remote_code=trust_remote_code)
        result = found.refine(
            bits,
            max_gb=max_gb,
            max_active_bits=max_active_bits,
            workers=workers,
            ray=ray,
            annotate=True,
            progress=make_progress(quiet=quiet),
            trials=trials,
            objective=chosen,
            constraints=tuple(min_task or ()),
            against=against,
            sampler=sampler,
            sequences=sequences,
            fresh_sequences=fresh_sequences,
            held_out_sequences=held_out_sequences,
            cache_gb=cache_gb,
            outputs=outputs,
            prune=not no_prune,
            seed=seed,
        ).as_plain()
    print_refined(result, as_json=as_json)


def print_refined(result: dict[str, Any], *, as_json: bool) -> None:
    """What a refinement came to."""
    if as_json:
        print_json(result)
        return
    for line in _lines(result):
        typer.echo(line)


def chosen_objective(metric: str | None, objective: str | None) -> str:
    """The expression to minimise.

    Raises:
        InputError: both are given.
    """
    if metric is not None and objective is not None:
        raise InputError("give --metric or --objective, not both; --objective may name one metric")
    return metric or objective or "kl"


def _lines(result: dict[str, Any]) -> list[str]:
    if "front" in result:
        return _front_lines(result)
    held_out = result["held_out"]
    lines = [f"{result['study']}: {result['trials']} trials round {result['start']['label']}"]
    start = _interval(held_out["start"])
    if "change" in held_out:
        change = held_out["change"]
        lines += [
            _outcome(result, held_out["refined_is"]),
            f"  KL divergence of the start: {start}",
            f"  KL divergence, refined:     {_interval(held_out['refined'])}",
            f"  difference: {_interval(change)}, {_share(change, held_out['start'])}",
        ]
    else:
        lines += [
            f"kept {result['start']['label']}: {result['reason']}",
            f"  KL divergence on held-out text: {start}",
        ]
    if result.get("remark"):
        lines.append(f"  note: {result['remark']}")
    return lines


def _outcome(result: dict[str, Any], verdict: str) -> str:
    label = result["plan"]["label"]
    if result["improved"]:
        beside = {"tie": "ties with the start"}.get(verdict, f"is {verdict}")
        if result["objective"] in ("kl", "kl_divergence"):
            return f"refined: {label} {beside} on held-out text"
        return (
            f"refined: {label}, chosen by {result['objective']}, {beside} by KL divergence on "
            "held-out text"
        )
    return f"kept {label}, which an earlier refinement found: {result['reason']}"


def _front_lines(result: dict[str, Any]) -> list[str]:
    from autoq.report.numbers import bits_text

    rows = [
        f"  {bits_text(row['effective_bits']):>8}  {_interval(row['held_out'])}"
        for row in result["front"]
    ]
    return [
        f"{result['study']}: {result['trials']} trials for {result['objective']} against bits",
        "  effective bits, KL divergence on held-out text:",
        *rows,
    ]


def _interval(entry: dict[str, Any]) -> str:
    from autoq.report.numbers import loss_text

    value = loss_text(entry["value"])
    if entry["low"] is None:
        return value
    return f"{value} (95 %: {loss_text(entry['low'])} to {loss_text(entry['high'])})"


def _share(change: dict[str, Any], start: dict[str, Any]) -> str:
    return f"{100 * change['value'] / start['value']:+.1f} %"
