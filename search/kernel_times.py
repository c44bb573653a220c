"""Latency from measured kernels: the tables that `autoq kernels bench --json` writes."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from autoq.errors import InputError
from autoq.formats import NONE, FormatName, QuantFormat

_BENCHMARK, _FORMAT = "autoq kernels", 1

_OPERATIONS: Mapping[tuple[str, str], FormatName] = {
    ("fp8.linear", "input scale given"): FormatName("fp8"),
    ("nvfp4.linear", "input quantised"): FormatName("nvfp4"),
    ("w4a8.linear", "input scale given"): FormatName("w4a8_awq"),
    ("int4.linear", "input as it is"): FormatName("int4_awq"),
    ("int8.linear", "input by row"): FormatName("int8_sq"),
    ("int8.linear", "input as it is"): FormatName("int8_wo"),
    ("nvfp4.linear", "input as it is"): FormatName("nvfp4_wo"),
    ("fp8.linear", "input by row"): FormatName("fp8_pc_pt"),
    ("fp8.linear", "128x128"): FormatName("fp8_block"),
    ("mxfp8.linear", "input quantised"): FormatName("mxfp8"),
    ("mxfp4.linear", "input in mxfp4"): FormatName("mxfp4"),
}
"""Operation and variant -> the format whose layers run it."""

UNMEASURED: Mapping[FormatName, str] = {
    FormatName(
        "nvfp4_svdquant"
    ): "no kernel has its branch of low rank, which is computed beside it",
    FormatName("int4_dq"): "its scales are decoded before the product of int4_awq's kernels",
}
"""Formats whose layers no one operation runs, and why."""

_UNQUANTISED = "bf16"
"""The baseline of every product: torch's own in bfloat16."""

_Shape: TypeAlias = tuple[int, int]
"""(out_features, in_features)."""

_Curve: TypeAlias = list[tuple[int, float]]
"""(tokens, seconds), fewest tokens first."""


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Measured times of matrix products, and how they are carried over to others.

    Between two measured numbers of tokens the logarithm of the time is linear in that of the
    tokens; below the fewest the time stays, as weights have to be read for one token, too; above
    the most it grows in proportion. A shape that was not measured takes the time of the nearest
    one, in proportion to their weights.
    """

    name: str  # of the table's content
    hardware: str
    curves: Mapping[FormatName, Mapping[_Shape, _Curve]]

    def seconds(
        self, fmt: QuantFormat, *, tokens: float, out_features: int, in_features: int
    ) -> float:
        """See `autoq.search.latency.LatencyModel`."""
        curves = self.curves.get(fmt.name)
        if not curves:
            if fmt.name in UNMEASURED:
                raise InputError(
                    f"no latency table has times of {fmt.name}: {UNMEASURED[fmt.name]}; leave it "
                    "out, or predict from a GPU's datasheet with --gpu"
                )
            known = ", ".join(sorted(self.curves)) or "nothing"
            raise InputError(
                f"the latency table has no times of {fmt.name} (it has {known}); measure it on "
                "that hardware with `autoq kernels bench --json FILE`, or leave the format out"
            )
        shape = nearest_shape((out_features, in_features), curves)
        scale = (out_features * in_features) / (shape[0] * shape[1])
        return scale * _between(curves[shape], tokens)

    def unmeasured(self, shapes: Iterable[_Shape]) -> list[_Shape]:
        """Those of the shapes whose times have to be carried over from others."""
        measured = {shape for curves in self.curves.values() for shape in curves}
        return sorted(shape for shape in shapes if shape not in measured)


def read_kernel_times(path: Path) -> KernelTimes:
    """The table in a file that `autoq kernels bench --json` wrote.

    Of several implementations of an operation the fastest counts.

    Raises:
        InputError: the file cannot be read, is of another kind, or holds no times of products.
    """
    try:
        content = path.read_bytes()
        document = json.loads(content)
    except (OSError, ValueError) as error:
        raise InputError(
            f"a latency table is JSON, and {path} cannot be read as that: {error}; write one with "
            "`autoq kernels bench --json FILE`"
        ) from error
    kind = (document.get("benchmark"), document.get("format")) if _is_object(document) else None
    if kind != (_BENCHMARK, _FORMAT):
        raise InputError(
            f"a latency table is what `autoq kernels bench --json FILE` of this version writes, "
            f"and {path} is not; measure again"
        )
    curves = _curves(document.get("rows") or [])
    if not curves:
        raise InputError(
            f"a latency table holds times of matrix products, and {path} has none; measure them "
            "with `autoq kernels bench --json FILE`, without --operation"
        )
    hardware = str((document.get("machine") or {}).get("hardware") or "unknown hardware")
    return KernelTimes(f"table {hashlib.sha256(content).hexdigest()[:12]}", hardware, curves)


def nearest_shape(wanted: _Shape, known: Iterable[_Shape]) -> _Shape:
    """The shape whose sides differ least in ratio."""
    return min(
        sorted(known),
        key=lambda shape: sum(abs(math.log(a / b)) for a, b in zip(shape, wanted, strict=True)),
    )


def _curves(rows: Iterable[Mapping[str, Any]]) -> dict[FormatName, dict[_Shape, _Curve]]:
    ours: dict[tuple[FormatName, _Shape, int], list[float]] = {}
    unquantised: dict[tuple[FormatName, _Shape, int], list[float]] = {}
    for row in rows:
        sides = row.get("shape") or {}
        if set(sides) != {"m", "n", "k"}:
            continue
        shape, tokens = (int(sides["n"]), int(sides["k"])), int(sides["m"])
        fmt = _OPERATIONS.get((str(row.get("operation")), str(row.get("variant"))))
        if fmt is not None and row.get("milliseconds"):
            ours.setdefault((fmt, shape, tokens), []).append(row["milliseconds"] / 1e3)
        baseline = ((row.get("baselines") or {}).get(_UNQUANTISED) or {}).get("milliseconds")
        if baseline:
            unquantised.setdefault((NONE, shape, tokens), []).append(baseline / 1e3)
    # The baseline was measured beside every product: its middle is nearest to what it takes.
    times = {key: min(found) for key, found in ours.items()}
    times |= {key: statistics.median(found) for key, found in unquantised.items()}
    curves: dict[FormatName, dict[_Shape, _Curve]] = {}
    for (fmt, shape, tokens), seconds in sorted(times.items()):
        curves.setdefault(fmt, {}).setdefault(shape, []).append((tokens, seconds))
    return curves


def _between(curve: _Curve, tokens: float) -> float:
    counts = [count for count, _ in curve]
    after = bisect_left(counts, tokens)
    if after == 0:
        return curve[0][1]
    if after == len(curve):
        return curve[-1][1] * tokens / counts[-1]
    (low, below), (high, above) = curve[after - 1], curve[after]
    part = math.log(tokens / low) / math.log(high / low)
    return float(below * (above / below) ** part)


def _is_object(document: object) -> bool:
    return isinstance(document, dict)
