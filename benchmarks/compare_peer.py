"""autoq beside NVIDIA ModelOpt's AutoQuantize: time, memory, and loss at equal bits.

Both search the same model folder on the same token sequences, each in a process of its own and by
turns. Loss is measured on held-out tokens with both assignments under one quantiser. The peer runs
as shipped, and once more with its loss scaled up, which is its best case: its solver stops at
absolute tolerances that ordinary scores fall below.

    python benchmarks/compare_peer.py --peer-python PEER_VENV/bin/python --model MODEL_DIR
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent / "peer"
AS_SHIPPED, SCALED = "as_shipped", "scaled_loss"
LOSS_SCALES = {AS_SHIPPED: 1.0, SCALED: 1e4}
SEED = 0


@dataclass(frozen=True, slots=True)
class Runner:
    """Starts one tool's search in a process of its own."""

    arguments: argparse.Namespace
    folder: Path

    def peer(self, label: str) -> dict[str, Any]:
        """One search by the peer; its plans stay in `<label>.json`."""
        return self._run(
            [self.arguments.peer_python, SCRIPTS / "run_modelopt.py"],
            ["--tokens", self.folder / "calibration.npy", "--loss-scale", LOSS_SCALES[label]],
            label,
        )

    def autoq(self, *, compare: bool) -> dict[str, Any]:
        """One search by autoq; `compare` measures both tools' plans afterwards."""
        options: list[Any] = ["--sequences", self.arguments.sequences]
        options += ["--sequence-length", self.arguments.sequence_length]
        if self.arguments.tokens:
            options += ["--calibration-data", self.arguments.tokens]
        if compare:
            options += ["--held-out", self.folder / "held_out.npy"]
            options += ["--peer-plans", *(self.folder / f"{label}.json" for label in LOSS_SCALES)]
        return self._run([sys.executable, SCRIPTS / "run_autoq.py"], options, "autoq")

    def _run(self, program: list[Any], options: list[Any], label: str) -> dict[str, Any]:
        out = self.folder / f"{label}.json"
        common = ["--model", self.arguments.model, "--out", out, "--dtype", self.arguments.dtype]
        common += ["--formats", self.arguments.formats, "--bits", self.arguments.bits]
        common += ["--batch", self.arguments.batch, "--threads", self.arguments.threads]
        command = [str(part) for part in [*program, *common, *options]]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.arguments.threads)}
        finished = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if finished.returncode:
            sys.exit(f"{label} failed:\n{finished.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        _note(f"{label}: {_search_seconds(result):.1f} s search")
        return result


def main() -> None:
    """Run both tools by turns, and print the tables."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(arguments, folder)
        runner = Runner(arguments, folder)
        scaled = runner.peer(SCALED)
        peer, own = [], []
        for repeat in range(arguments.repeats):
            peer.append(runner.peer(AS_SHIPPED))
            own.append(runner.autoq(compare=repeat == 0))
    print(_cost_table(peer, own))
    print(_loss_table(own[0]["comparison"]))
    print(_versions_line(scaled, own[0]))
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"peer": peer, "peer_scaled": scaled, "autoq": own}, indent=1)
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", required=True, help="interpreter that has ModelOpt 0.47")
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--tokens", help=".npy of token ids; the bundled text if left out")
    parser.add_argument("--formats", default="nvfp4,fp8,w4a8_awq")
    parser.add_argument("--bits", default="4.8,5.5,6.5", help="budgets, as the peer counts bits")
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate and score on")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--held-out-sequences", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="of the model in both tools")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    return parser.parse_args()


def write_tokens(arguments: argparse.Namespace, folder: Path) -> None:
    """The sequences that autoq chooses, for the peer to use the same."""
    import numpy as np

    from autoq.data import Split, load_token_sequences
    from autoq.models.loading import load_tokenizer

    tokenizer = None if arguments.tokens else load_tokenizer(Path(arguments.model))
    configuration = json.loads((Path(arguments.model) / "config.json").read_text())
    vocabulary_size = configuration["vocab_size"]
    counts: dict[Split, int] = {
        "calibration": arguments.sequences,
        "held_out": arguments.held_out_sequences,
    }
    for split, sequences in counts.items():
        data = load_token_sequences(
            arguments.tokens,
            tokenizer=tokenizer,
            sequence_length=arguments.sequence_length,
            sequences=sequences,
            vocab_size=vocabulary_size,
            split=split,
            seed=SEED,
        )
        np.save(folder / f"{split}.npy", data.ids)


def _search_seconds(result: dict[str, Any]) -> float:
    """Calibration, scoring and solving, without imports and loading."""
    return float(sum(result["stage_seconds"].values()))


def _cost_table(peer: list[dict[str, Any]], own: list[dict[str, Any]]) -> str:
    measures = {
        "calibration, s": lambda r: r["stage_seconds"]["calibration"],
        "scoring, s": lambda r: r["stage_seconds"]["scoring"],
        "solving, s": lambda r: r["stage_seconds"]["solving"],
        "calibration + scoring + solving, s": _search_seconds,
        "whole call, s": lambda r: r["search_seconds"],
        "whole call, CPU s": lambda r: r["search_cpu_seconds"],
        "whole process, s": lambda r: r["process_seconds"],
        "peak resident memory, MB": lambda r: r["peak_rss_bytes"] / 1e6,
        "the same above the imports, MB": lambda r: (
            (r["peak_rss_bytes"] - r["imports_rss_bytes"]) / 1e6
        ),
    }
    lines = [f"| Median of {len(own)} | ModelOpt | autoq | ratio |", "|---|---:|---:|---:|"]
    for name, measure in measures.items():
        theirs, ours = (statistics.median(map(measure, runs)) for runs in (peer, own))
        lines.append(f"| {name} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} |")
    return "\n".join(lines) + "\n"


def _loss_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| Peer's solver | Budget | Bits, ModelOpt | Bits, autoq | KL, ModelOpt | KL, autoq | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        theirs, ours = row["peer"], row["autoq"]
        ratio = ours["kl_divergence"] / theirs["kl_divergence"]
        lines.append(
            f"| {row['label'].replace('_', ' ')} | {row['budget_bits']:g} "
            f"| {theirs['effective_bits']:.4f} | {ours['effective_bits']:.4f} "
            f"| {_with_interval(theirs)} | {_with_interval(ours)} | {ratio:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _with_interval(measured: dict[str, Any]) -> str:
    low, high = measured["kl_interval"]
    return f"{measured['kl_divergence']:.3e} ({low:.2e} to {high:.2e})"


def _versions_line(peer: dict[str, Any], own: dict[str, Any]) -> str:
    return "; ".join(
        f"{tool}: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        for tool, run in {"peer's environment": peer, "autoq's": own}.items()
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
