"""Commands that need the model: `export` and `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoq.cli._budgets import MaxActiveBits, MaxGb
from autoq.cli._failures import reports_failures
from autoq.cli._options import (
    DEFAULT_STORE,
    Bits,
    Json,
    Overwrite,
    Quiet,
    Store,
    TrustRemoteCode,
    check_store,
    opened_study,
)
from autoq.cli._output import print_json, quiet_libraries, results_kept_clean
from autoq.cli._progress import make_progress
from autoq.cli._search import checkpoint_line
from autoq.cli._task_results import end_after_failed_tasks, print_tasks
from autoq.errors import InputError


@reports_failures
def export(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[STUDY] OUT",
            help="The study (the latest if left out), and the folder to write.",
        ),
    ],
    bits: Bits = None,
    max_gb: MaxGb = None,
    max_active_bits: MaxActiveBits = None,
    container: Annotated[
        str | None,
        typer.Option(
            help="modelopt, compressed-tensors, transformers-fp8 for plans of fp8_block alone, onnx for "
            "a graph with Q/DQ nodes, or tensorrt-llm for its engine builder; what the study was "
            "searched for if left out."
        ),
    ] = None,
    tp: Annotated[
        int, typer.Option(min=1, help="Ranks that share every layer; tensorrt-llm only.")
    ] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Stages of layers; tensorrt-llm only.")] = 1,
    with_past: Annotated[
        bool,
        typer.Option(
            "--with-past",
            help="Keys and values of earlier tokens as inputs and outputs of the graph; onnx only.",
        ),
    ] = False,
    streamed: Annotated[
        bool,
        typer.Option(
            "--streamed",
            help="Read the weights from the model's folder a matrix at a time, for models that no "
            "memory holds; the same tensors, in files of 256 MiB.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the checkpoint of a study's plan, for any budget, with no new pass over the data."""
    name, destination = study_and_output(places)
    quiet_libraries()
    with results_kept_clean():
        study = opened_study(name, store, trust_remote_code=trust_remote_code)
        written = study.export(
            destination,
            effective_bits=bits,
            max_gb=max_gb,
            max_active_bits=max_active_bits,
            container=container,
            tp_size=tp,
            pp_size=pp,
            with_past=with_past,
            streamed=streamed,
            overwrite=overwrite,
            progress=make_progress(quiet=quiet),
        )
    print_written(written, as_json=as_json)


def print_written(written: dict[str, Any], *, as_json: bool) -> None:
    """What an export wrote."""
    if as_json:
        print_json(written)
    else:
        typer.echo(checkpoint_line(written))


def study_and_output(places: list[str]) -> tuple[str | None, str]:
    """The two arguments of `autoq export`.

    Raises:
        typer.BadParameter: there are more than two.
    """
    if len(places) > 2:
        raise typer.BadParameter(f"give [STUDY] OUT, got {len(places)} arguments")
    *names, destination = places
    return (names[0] if names else None), destination


@reports_failures
def evaluate(
    target: Annotated[
        str, typer.Argument(metavar="CHECKPOINT_OR_STUDY", help="An exported folder, or a study.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="The original model; a study knows its own."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(metavar="held_out|FILE", help="Text to measure on; never calibrated on."),
    ] = "held_out",
    bits: Bits = None,
    sequences: Annotated[int, typer.Option(min=1, help="How many sequences.")] = 32,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a sequence.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 4,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...",
            help="Tasks of lm-eval, autoq_choices, autoq_text, or YAML files; checkpoints need no "
            "--reference for them.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task; all if left out.")
    ] = None,
    task_batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Sequences of tasks at once.")
    ] = "auto",
    metrics: Annotated[
        str | None,
        typer.Option(metavar="METRIC,...", help="Further metrics, such as kl_p99."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the original's outputs for the next checkpoint."),
    ] = None,
    cache_gb: Annotated[float, typer.Option(help="Bound on that folder, in 10^9 bytes.")] = 4.0,
    trust_remote_code: TrustRemoteCode = False,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure against the original: KL divergence, top-1 agreement, perplexity, tasks."""
    _check_target(target, store)
    quiet_libraries()
    with results_kept_clean():
        from autoq.api import evaluate as measure

        found = measure(
            target,
            reference=None if reference is None else str(reference),
            data=None if data == "held_out" else data,
            store=store,
            effective_bits=bits,
            sequences=sequences,
            sequence_length=sequence_length,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            tasks=_listed(tasks),
            limit=limit,
            task_batch_size=task_batch_size,
            metrics=_listed(metrics),
            cache=cache,
            cache_gb=cache_gb,
            progress=make_progress(quiet=quiet),
        )
    print_measured(found, as_json=as_json)
    end_after_failed_tasks(found)


def print_measured(found: dict[str, Any], *, as_json: bool) -> None:
    """What was measured."""
    if as_json:
        print_json(found)
    else:
        _print_metrics(found)


def _listed(names: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (names or "").split(",") if name.strip())


def _check_target(target: str, store: str) -> None:
    path = Path(target)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(
            f"the folder {target} has no config.json; name a checkpoint's folder or a study"
        )
    if not path.is_dir():
        check_store(store)


def _print_metrics(found: dict[str, Any]) -> None:
    from autoq.report.numbers import metric_text, metric_value_text

    if "metrics" in found:
        typer.echo(f"{found['target']} against the original, on {found['data']}:")
        metrics = dict(found["metrics"])
        metrics.setdefault("noise_floor", found.get("noise_floor"))
        for name, measured in metrics.items():
            if measured is None:
                continue
            entry = measured if isinstance(measured, dict) else {"value": measured}
            line = f"  {metric_text(name)}: {metric_value_text(name, entry['value'])}"
            if entry.get("low") is not None:
                low, high = (metric_value_text(name, entry[end]) for end in ("low", "high"))
                line += f" (95 %: {low} to {high})"
            typer.echo(line)
        if found.get("kl_lower_bound"):
            kept = found["kl_lower_bound"]["kept_tokens"]
            typer.echo(
                f"  (KL divergence is a lower bound: the cache keeps {kept} tokens of each "
                "distribution; --cache-gb allows more)"
            )
    print_tasks(found)
