"""The command that runs a checkpoint: `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autoq.cli._failures import reports_failures
from autoq.cli._options import Json, TrustRemoteCode
from autoq.cli._output import print_json, quiet_libraries, results_kept_clean


@reports_failures
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="An exported folder, or a model's.")
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to go on from, or to answer.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only the text: no line on speed and memory.")
    ] = False,
) -> None:
    """Run a checkpoint in the formats it is stored in: continue a prompt, likeliest token first."""
    quiet_libraries()
    with results_kept_clean():
        from autoq.api import generate as run

        found = run(
            checkpoint,
            prompt,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=None if dtype == "auto" else dtype,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json(found)
        return
    typer.echo(found["text"])
    if not quiet:
        typer.echo(_figures(found), err=True)


def _figures(found: dict[str, Any]) -> str:
    from autoq.report.numbers import bytes_text

    seconds, tokens = found["seconds"], found["new_tokens"]
    return (
        f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} per second); "
        f"the model takes {bytes_text(found['weight_bytes'])} on {found['device']}"
    )
