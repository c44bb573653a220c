"""`autoq compress`: a model larger than memory, in one format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import Json, Overwrite, Quiet, TrustRemoteCode
from autoq.cli._output import print_json, quiet_libraries, results_kept_clean
from autoq.cli._progress import make_progress
from autoq.cli._search import checkpoint_line


@reports_failures
def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="The model's folder.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    fmt: Annotated[
        str,
        typer.Option("--format", "-f", help="Of every layer that can take it: `autoq formats`."),
    ],
    container: Annotated[
        str, typer.Option(help="modelopt or compressed-tensors.")
    ] = "compressed-tensors",
    kv_format: Annotated[
        str | None,
        typer.Option(
            metavar="fp8|int8|nvfp4",
            help="Of the key/value cache; left alone if left out. With no data fp8 alone, with "
            "scales of 1.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Quantise the head or routers, too.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave these layers as they are.")
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="best|scales|max|NAME[+NAME..]",
            help="From weights alone best and mse choose block scales by squared error, max and rtn "
            "by largest magnitude; with data as for `search`.",
        ),
    ] = "best",
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration data, as for `search`; if left out, formats with a stored input scale "
            "are calibrated on the bundled text, and others follow from the weights alone."
        ),
    ] = None,
    calib_sequences: Annotated[int, typer.Option(help="Sequences to calibrate on.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the choice of sequences.")] = 0,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantise a model to one format, a matrix or a block in memory at a time."""
    from autoq.api import compress as compress_model

    quiet_libraries()
    with results_kept_clean():
        written = compress_model(
            model,
            destination,
            fmt=fmt,
            container=container,
            kv_format=kv_format,
            include=include or (),
            exclude=exclude or (),
            calibration=calibration,
            calibration_data=calib,
            calibration_sequences=calib_sequences,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=make_progress(quiet=quiet),
        )
    if as_json:
        print_json(written)
        return
    typer.echo(checkpoint_line(written))
    typer.echo(
        f"{written['effective_bits']:.3f} bits per weight; "
        f"{written['verification']['quantized_matrices']} matrices quantised"
        + ("" if written["kv_format"] == "none" else f"; KV cache in {written['kv_format']}")
    )
    for group, reason in list(written["left"].items())[:3]:
        typer.echo(f"left as it is: {group}: {reason}", err=True)
    if len(written["left"]) > 3:
        typer.echo(f"and {len(written['left']) - 3} more left as they are", err=True)
