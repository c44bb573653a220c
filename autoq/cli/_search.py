"""`autoq search`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoq.cli._budgets import (
    Gpu,
    LatencyBatch,
    LatencyTable,
    MaxActiveBits,
    MaxGb,
    MaxKl,
    MaxLatency,
)
from autoq.cli._failures import reports_failures
from autoq.cli._options import DEFAULT_STORE, Json, Overwrite, Quiet, Store, TrustRemoteCode
from autoq.cli._output import (
    check_writable,
    print_json,
    quiet_libraries,
    results_kept_clean,
    write_text,
)
from autoq.cli._preflight import print_estimate, say_first
from autoq.cli._progress import make_progress
from autoq.cli._refine import MinTask, ObjectiveText, Ray, Workers
from autoq.errors import InputError, without_password

if TYPE_CHECKING:
    from autoq.api import Study


@reports_failures
def search(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="Folder with a Hugging Face model.")
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            "-b",
            help="Budget: mean effective bits per searched weight. At least one of --bits and the "
            "--max options is needed.",
        ),
    ] = None,
    max_gb: MaxGb = None,
    max_active_bits: MaxActiveBits = None,
    max_latency_ms: MaxLatency = None,
    max_kl: MaxKl = None,
    gpu: Gpu = None,
    latency_table: LatencyTable = None,
    latency_batch: LatencyBatch = 1,
    formats: Annotated[
        str | None,
        typer.Option(
            help="Formats to choose from, separated by commas; those that every engine loads if "
            "left out. `autoq formats` lists them."
        ),
    ] = None,
    kv_formats: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT,...",
            help="Formats of the key/value cache to choose from: fp8, int8, nvfp4, none; the cache is "
            "left alone if left out.",
        ),
    ] = None,
    kv_bits: Annotated[
        float | None,
        typer.Option(help="Budget of the cache: mean bits per cached element; 8 if left out."),
    ] = None,
    kv_scope: Annotated[
        str | None,
        typer.Option(
            metavar="model|layer",
            help="One format of the cache for all layers, as checkpoints state it, or one each, to "
            "measure only; model if left out.",
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration data: text, JSONL, parquet, .npy or .pt file, or a `datasets` name; "
            "the bundled text if left out."
        ),
    ] = None,
    store: Store = DEFAULT_STORE,
    export: Annotated[
        Path | None, typer.Option(help="Folder to write the checkpoint to; none if left out.")
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to aim at: modelopt or compressed-tensors; what suits the target best, or "
            "holds the formats, if left out."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE:HARDWARE",
            help="Where it is to run, as vllm:h200: only formats that run there are offered, all "
            "of them if --formats is left out. `autoq targets` lists them.",
        ),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=FORMAT", help="Groups that match may take only this; repeatable."
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Layers to search though left out by default; repeatable."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Layers to leave alone; repeatable.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the study; made from the model if left out.")
    ] = None,
    calib_sequences: Annotated[
        int, typer.Option(help="Sequences to calibrate and score on.")
    ] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4,
    held_out_sequences: Annotated[
        int, typer.Option(help="Sequences to measure on, never calibrated on.")
    ] = 32,
    dtype: Annotated[
        str, typer.Option(help="Of the model while searched: auto, float32, bfloat16, float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Bound on memory, for example 4GB: the model is never held, its blocks are read "
            "from the folder one by one. The scores are the same.",
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="best|scales|max|NAME+NAME",
            help="best: scales by the error they leave, 4-bit codes with error feedback (GPTQ); "
            "scales: nearest codes, none stored; max: scales from largest magnitudes. Or algorithms "
            "joined by '+', of which each format takes what it can: rtn, percentile:P, mse, "
            "awq_lite, awq, smoothquant[:ALPHA], gptq[:damping=D,order=power|given]; "
            "`autoq formats` says what each does.",
        ),
    ] = "best",
    estimator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How to score: fisher_projection (the default), token_projection, "
            "sequence_projection, diagonal, factored, quantized_point, forward_only.",
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(help="Draws of labels per sequence; as the estimator likes if left out."),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="Score only until the plan is this sure, for example 0.95; all sequences if left "
            "out."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    overwrite: Overwrite = False,
    no_measure: Annotated[
        bool, typer.Option("--no-measure", help="Do not measure the plan on held-out data.")
    ] = False,
    compare_uniform: Annotated[
        bool,
        typer.Option("--compare-uniform", help="Measure every format applied to all layers, too."),
    ] = False,
    refine: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Measure so many plans to improve on the predicted best one."
        ),
    ] = 0,
    objective: ObjectiveText = None,
    min_task: MinTask = None,
    workers: Workers = 1,
    devices: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Score on so many GPUs of this machine (with --ray: of the cluster) at once, or in "
            "so many processes where it has none; the scores are the same.",
        ),
    ] = None,
    ray: Ray = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write the report there.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Wait this long for another process on the same study."
        ),
    ] = 0.0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Search nothing: estimate time, memory and disk, with what --devices, --ray, --refine, "
            "--workers and --kv-formats add, and say what would fit; exit code 5 if it does not.",
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search a model: decide each layer's format within a budget, measure, export.

    A search that was interrupted continues when the same command is run again.
    """
    check_budgets(bits, max_gb, max_active_bits, max_latency_ms, max_kl)
    check_writable(report)
    quiet_libraries()
    refining = _refine_options(refine, objective, min_task)
    estimated: dict[str, Any] = {
        "model": str(model),
        "formats": listed_names(formats),
        "container": container,
        "target": target,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "calibration": calibration,
        "calibration_data": calib,
        "calibration_sequences": calib_sequences,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "held_out_sequences": held_out_sequences,
        "measure": not no_measure,
        "dtype": dtype,
        "device": device,
        "max_memory": max_memory,
        "kv_formats": listed_names(kv_formats),
        "kv_bits": kv_bits,
        "kv_scope": kv_scope,
        "refine": refine,
        "refine_options": refining,
        "workers": workers,
        "devices": devices,
        "ray": ray,
        "seed": seed,
        "store": store,
        "export": export,
        "trust_remote_code": trust_remote_code,
    }
    if dry_run:
        print_estimate(estimated, as_json=as_json)
        return
    with results_kept_clean():
        from autoq.api import search as run_search
        from autoq.api.distribution.ranks import launch_of, serve_rank

        launch = launch_of()
        if launch is not None and launch.rank > 0:
            serve_rank(launch, device=device)
            return

        if not quiet:
            say_first(estimated)
        study = run_search(
            str(model),
            effective_bits=bits,
            max_gb=max_gb,
            max_active_bits=max_active_bits,
            max_latency_ms=max_latency_ms,
            max_kl=max_kl,
            gpu=gpu,
            latency_table=None if latency_table is None else str(latency_table),
            latency_tokens=latency_batch,
            formats=listed_names(formats),
            kv_formats=listed_names(kv_formats),
            kv_bits=kv_bits,
            kv_scope=kv_scope,
            rules=tuple(rule or ()),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            calibration_data=calib,
            calibration_sequences=calib_sequences,
            sequence_length=sequence_length,
            batch_size=batch_size,
            held_out_sequences=held_out_sequences,
            container=container,
            target=target,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            calibration=calibration,
            estimator=estimator,
            draws=draws,
            confidence=confidence,
            seed=seed,
            store=store,
            name=name,
            export=None if export is None else str(export),
            overwrite=overwrite,
            measure=not no_measure,
            refine=refine,
            refine_options=refining,
            workers=workers,
            devices=devices,
            ray=ray,
            ranks=launch is not None,
            compare_uniform=compare_uniform,
            trust_remote_code=trust_remote_code,
            wait_seconds=wait,
            progress=make_progress(quiet=quiet),
        )
        summary = study.summary()
        if report is not None:
            write_report(study, summary, report)
    print_found(summary, without_password(store), report, as_json=as_json, quiet=quiet)


def write_report(study: Study, summary: dict[str, Any], path: Path) -> None:
    """Write the study's HTML report.

    Raises:
        OSError: the file cannot be written.
    """
    from autoq.report import render_html, report_data

    write_text(path, render_html(report_data(summary, study.frontier())))


def _refine_options(
    trials: int, objective: str | None, min_task: list[str] | None
) -> dict[str, Any]:
    """What trials minimise and keep.

    Raises:
        InputError: it is said, and no trial is asked for.
    """
    if not trials and (objective is not None or min_task):
        raise InputError(
            "--objective and --min-task are for measured trials, and there are none; add --refine "
            "N, for example --refine 100"
        )
    return {"objective": objective or "kl", "constraints": tuple(min_task or ())}


def check_budgets(*limits: float | None) -> None:
    """Refuse a search without a budget.

    Raises:
        InputError: all limits are None.
    """
    if all(limit is None for limit in limits):
        raise InputError(
            "a search needs a budget; give --bits, --max-gb, --max-active-bits, --max-latency-ms "
            "or --max-kl, for example --bits 5"
        )


def listed_names(text: str | None) -> Sequence[str] | None:
    """The names in a comma-separated list, or None where none is given."""
    if text is None:
        return None
    return [name for part in text.split(",") if (name := part.strip())]


def print_found(
    summary: dict[str, Any], place: str, report: Path | None, *, as_json: bool, quiet: bool
) -> None:
    """What a search prints in the end.

    Args:
        place: the store or the server that has the study.
    """
    if as_json:
        print_json({**summary, "report": None if report is None else str(report)})
        return
    if not quiet:
        print_study(summary)
    for line in _last_lines(summary, place, report):
        typer.echo(line)


def print_study(summary: dict[str, Any]) -> None:
    """The tables of one plan of a study."""
    from autoq.cli._tables import make_console, print_summary
    from autoq.report import report_data

    print_summary(make_console(), report_data(summary, []))


def _last_lines(summary: dict[str, Any], place: str, report: Path | None) -> list[str]:
    lines = [f"study: {summary['study']} in {place}"]
    if summary["export"]:
        lines.append(checkpoint_line(summary["export"]))
    if report is not None:
        lines.append(f"report: {report}")
    return lines


def checkpoint_line(export: dict[str, Any]) -> str:
    """Where a checkpoint is, in which container, and how large."""
    from autoq.report.numbers import bytes_text

    size = bytes_text(export["stored_bytes"])
    return f"checkpoint: {export['path']} ({export['container']}, {size}, read back and verified)"
