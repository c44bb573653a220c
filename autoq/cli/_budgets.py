"""Options that limit what a plan takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

MaxGb: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-gb",
        metavar="GB",
        help="Budget: weights of the whole checkpoint, in 10^9 bytes, layers that are not searched "
        "included.",
    ),
]
MaxActiveBits: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-active-bits",
        metavar="BITS",
        help="Budget: mean bits per weight that a token touches; for mixtures of experts.",
    ),
]
MaxLatency: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-latency-ms",
        metavar="MS",
        help="Budget: predicted time of the searched layers' products in one step, on --gpu or by "
        "--latency-table.",
    ),
]
MaxKl: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="NATS",
        help="The smallest model whose KL divergence to the original is no more: measured on "
        "held-out data, predicted with --no-measure.",
    ),
]
Gpu: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Predict latency for this GPU, from its datasheet: h200, b200, ..."
    ),
]
LatencyTable: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Predict latency from measured kernels: what `autoq kernels bench --json` wrote.",
    ),
]
LatencyBatch: TypeAlias = Annotated[
    int,
    typer.Option(
        "--latency-batch",
        metavar="TOKENS",
        help="Tokens of one step: one per sequence in decoding, all in prefill.",
    ),
]
