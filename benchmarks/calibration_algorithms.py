"""autoq's calibration algorithms beside ModelOpt's: error of layers, divergence, time and memory.

    OMP_NUM_THREADS=1 python benchmarks/calibration_algorithms.py --peer-python PEER_VENV/bin/python

Both tools calibrate the bundled model in float32 on the same tokens, each in one process of its own,
every algorithm in one format, and are measured on the same held-out tokens. The error of a layer is
the squared error of its outputs over their squares, on the original model's inputs; a row has the
mean over all layers, and in the column before it that of largest magnitudes in the same format by the
same tool. Time is processor time of everything from the model to the calibrated one, forward passes
included, the median of three runs; memory is the most that is resident above what was before, of one more
run in a process of its own, forked when nothing but the model had been loaded. The peer's export gives
layers that read one tensor one scale of their inputs, the mean of those that were searched, and takes
their weights' scales from largest magnitudes again; what AWQ is then has columns of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

SCRIPTS = Path(__file__).resolve().parent / "peer"
sys.path.insert(0, str(SCRIPTS))


def main() -> None:
    """Run both tools, print the table, write the JSON file."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.cache or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        _write_tokens(arguments, folder)
        own = _run(sys.executable, "calibration_autoq.py", arguments, folder)
        peer = None
        if arguments.peer_python:
            peer = _run(arguments.peer_python, "calibration_modelopt.py", arguments, folder)
    rows = list(_rows(own, peer))
    print(_markdown(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(_result(arguments, own, peer, rows), indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    from autoq.bundled import model_path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer-python", help="interpreter that has ModelOpt 0.47; none: autoq alone"
    )
    parser.add_argument("--model", default=str(model_path()))
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate on")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--held-out-sequences", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of algorithms; all if left out")
    parser.add_argument(
        "--cache", type=Path, help="folder where results are kept, case by case, and not run again"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the table's figures")
    return parser.parse_args()


def _write_tokens(arguments: argparse.Namespace, folder: Path) -> None:
    from compare_peer import write_tokens

    write_tokens(SimpleNamespace(tokens=None, **vars(arguments)), folder)


def _run(python: str, script: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / f"{script}.json"
    command = [python, SCRIPTS / script, "--model", arguments.model, "--out", out]
    command += ["--tokens", folder / "calibration.npy", "--held-out", folder / "held_out.npy"]
    command += ["--repetitions", str(arguments.repetitions)]
    if arguments.only:
        command += ["--only", *arguments.only]
    subprocess.run([str(part) for part in command], check=True)
    return json.loads(out.read_text())


def _rows(own: dict[str, Any], peer: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """One for every case that was run, in the order of the cases."""
    from calibration_cases import CASES

    for case in CASES:
        tools = {"autoq": own, "modelopt": peer or {"rows": {}}}
        found = {
            tool: _figures(result["rows"], case.name, case.fmt) for tool, result in tools.items()
        }
        if any(found.values()):
            yield {"algorithm": case.name, "format": case.fmt, "note": case.note, **found}


def _result(
    arguments: argparse.Namespace,
    own: dict[str, Any],
    peer: dict[str, Any] | None,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """What the JSON file holds: hardware and versions, settings, and the rows."""
    settings = ("sequences", "sequence_length", "held_out_sequences", "repetitions")
    return {
        "processor": _processor(),
        "versions": {"autoq": own["versions"], "modelopt": peer and peer["versions"]},
        "settings": {name: getattr(arguments, name) for name in settings},
        "rows": rows,
    }


def _figures(rows: dict[str, Any], name: str, fmt: str) -> dict[str, Any] | None:
    row = rows.get(f"{name} {fmt}")
    if row is None:
        return None
    before = rows.get(f"max {fmt}")
    return {
        "layer_error": fmean(row["layer_errors"].values()),
        "layer_error_before": before and fmean(before["layer_errors"].values()),
        "kl": fmean(row["kl_per_sequence"]),
        "kl_before": before and fmean(before["kl_per_sequence"]),
        "cpu_seconds": row["cpu_seconds"],
        "cpu_seconds_per_layer": row["cpu_seconds"] / len(row["layer_errors"]),
        "peak_bytes": row["peak_bytes"],
        "layer_errors": row["layer_errors"],
        "exported_layer_error": _exported(row, "layer_errors"),
        "exported_kl": _exported(row, "kl_per_sequence"),
    }


def _exported(row: dict[str, Any], key: str) -> float | None:
    """Of what the export makes of a calibration, where that is not the calibration itself."""
    if "exported" not in row:
        return None
    figures = row["exported"][key]
    return fmean(figures.values() if isinstance(figures, dict) else figures)


def _markdown(rows: list[dict[str, Any]]) -> str:
    """autoq / ModelOpt (ratio), a line for every case."""
    titles = ["Algorithm", "Format", "Layer error: max", "Layer error", "as exported"]
    titles += ["KL: max", "KL", "as exported", "CPU s", "MiB"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [
            _pair(row, "layer_error_before", 1e2, " %"),
            _pair(row, "layer_error", 1e2, " %"),
            _beside_exported(row, "layer_error", 1e2, " %"),
            _pair(row, "kl_before", 1e3, "e-3"),
            _pair(row, "kl", 1e3, "e-3"),
            _beside_exported(row, "kl", 1e3, "e-3"),
            _pair(row, "cpu_seconds", 1.0, ""),
            _pair(row, "peak_bytes", 2**-20, ""),
        ]
        lines.append(f"| {row['algorithm']} | `{row['format']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside_exported(row: dict[str, Any], key: str, factor: float, unit: str) -> str:
    """What autoq exports, which is what it searched, and what the peer does."""
    peer = row["modelopt"]
    if peer is None or peer[f"exported_{key}"] is None:
        return "-"
    exported = {"autoq": row["autoq"], "modelopt": {key: peer[f"exported_{key}"]}}
    return _pair(exported, key, factor, unit)


def _pair(row: dict[str, Any], key: str, factor: float, unit: str) -> str:
    values = [row[tool] and row[tool][key] for tool in ("autoq", "modelopt")]
    texts = ["-" if value is None else f"{value * factor:.3g}{unit}" for value in values]
    ratio = ""
    if None not in values and values[1]:
        ratio = f" ({values[0] / values[1]:.2f})"
    return f"{texts[0]} / {texts[1]}{ratio}"


def _processor() -> str:
    from autoq.kernels._benchmark.machine import cpu_name

    return cpu_name()


if __name__ == "__main__":
    main()
