"""autoq beside NVIDIA ModelOpt's AutoQuantize: the loss of what they choose and of what they make.

    python benchmarks/quality.py --peer-python PEER_VENV/bin/python --mixture MODEL_DIR --cache DIR

Models: the bundled one, the same with activation outliers, and a mixture of experts
(`train_mixture.py`). Tables, KL divergence from the original on held-out tokens:

- **allocation**: both tools' assignments under one quantiser: autoq's with plain scales, and once more
  autoq's as it is by default (with error feedback), which is what autoq's scores are of. At equal
  bits autoq solves for the bits that the peer's assignment takes as stored; at equal budget both get
  the budget, of which the peer's solver may leave some unused. Where the peer overruns a budget,
  because it counts W4A8 as 4.0 instead of 4.25 bits, autoq gets what the peer took.
- **product**: each tool's own final model, quantised and calibrated by itself.

With `--refine TRIALS` the first table has further blocks: autoq's plans at the bits of the peer's
rescaled ones after refinement by so many measured trials, which see calibration tokens and fresh
tokens of the same text, and none of those that plans are judged on.

The peer runs as shipped with small batches, which are its best case, and with large ones; and with
its scores rescaled, which its solver needs. NVFP4 runs as NVFP4_DEFAULT_CFG and as
NVFP4_AWQ_LITE_CFG, and in the second table the better one counts. Every run leaves one JSON file in
the cache, and only missing ones are run: delete what is out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_peer import write_tokens
from quality_tables import (
    ALLOCATION_UNDER_OWN,
    Row,
    allocation_rows,
    markdown,
    plain,
    product_rows,
    refined_rows,
)

SCRIPTS = Path(__file__).resolve().parent / "peer"
SETS = (("nvfp4", "fp8"), ("nvfp4", "fp8", "w4a8_awq"))
BUDGETS = (4.3, 4.5, 5.0, 5.5, 6.0, 7.0)
PEER_VARIANTS: dict[str, list[str]] = {
    "max": [],
    "awq": ["--nvfp4-config", "NVFP4_AWQ_LITE_CFG"],
}
PLAIN_SCALES = "max"
"""autoq's calibration for the first table; the second has its default."""


def main() -> None:
    """Run what is missing, print both tables, write the JSON file."""
    arguments = _arguments()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    versions: dict[str, Any] = {}
    for name, folder in _models(arguments).items():
        tokens = _tokens(arguments, name, folder)
        for formats in SETS:
            case = Case(arguments, name, folder, formats, tokens)
            rows += case.rows()
            versions |= case.versions
    for table in ("allocation", ALLOCATION_UNDER_OWN, "product"):
        print(f"### {table}\n\n{markdown(rows, table)}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"versions": versions, "rows": plain(rows)}, indent=1) + "\n"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", required=True, help="interpreter that has ModelOpt 0.47")
    parser.add_argument("--mixture", type=Path, help="folder that train_mixture.py wrote")
    parser.add_argument("--cache", type=Path, required=True, help="folder for results of the runs")
    parser.add_argument("--models", nargs="*", default=[], help="further folders")
    parser.add_argument("--only", nargs="*", help="names of models; all if left out")
    parser.add_argument("--sequences", type=int, default=256, help="to calibrate and score on")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens")
    parser.add_argument("--held-out-sequences", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--estimator", help="of autoq's scores; its default if left out")
    parser.add_argument(
        "--refine", type=int, default=0, metavar="TRIALS", help="for each of autoq's plans"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the tables' figures")
    return parser.parse_args()


def _models(arguments: argparse.Namespace) -> dict[str, Path]:
    """Name -> folder; the variant with outliers is made where it is missing."""
    from autoq.bundled import model_path

    outliers = arguments.cache / "outliers"
    if not (outliers / "config.json").is_file():
        _run([sys.executable, "-m", "autoq.bundled.outliers", model_path(), outliers], "outliers")
    models = {"bundled": Path(model_path()), "outliers": outliers}
    if arguments.mixture:
        models["mixture"] = arguments.mixture
    models |= {Path(folder).name: Path(folder) for folder in arguments.models}
    return {name: path for name, path in models.items() if name in (arguments.only or models)}


def _tokens(arguments: argparse.Namespace, name: str, folder: Path) -> Path:
    """A folder with the sequences that autoq takes by itself, for both tools."""
    counts = f"{arguments.sequences}_{arguments.held_out_sequences}_{arguments.sequence_length}"
    target: Path = arguments.cache / f"tokens_{name}_{counts}"
    if not (target / "held_out.npy").is_file():
        target.mkdir(exist_ok=True)
        write_tokens(
            argparse.Namespace(**{**vars(arguments), "model": folder, "tokens": None}), target
        )
    return target


@dataclass(frozen=True, slots=True)
class Case:
    """One model with one set of formats."""

    arguments: argparse.Namespace
    model: str
    folder: Path
    formats: tuple[str, ...]
    tokens: Path

    def rows(self) -> list[Row]:
        """The rows of both tables; runs what the cache lacks."""
        peers = {
            self._label("peer", variant): self._peer(variant, options)
            for variant, options in PEER_VARIANTS.items()
        }
        label = " ".join(self.formats)
        plain_scales = self._autoq(PLAIN_SCALES, [self._label("peer", PLAIN_SCALES)])
        product = self._autoq("product", list(peers))
        return [
            *allocation_rows(self.model, label, plain_scales),
            *(self._refined_rows(label) if self.arguments.refine else ()),
            *allocation_rows(
                self.model, label, self._plain_peers(product), table=ALLOCATION_UNDER_OWN
            ),
            *product_rows(self.model, label, product, peers),
        ]

    def _plain_peers(self, product: dict[str, Any]) -> dict[str, Any]:
        """Of the peer's plans those that it made with plain scales, so that each counts once."""
        plain_peers = self._label("peer", PLAIN_SCALES)
        kept = [plan for plan in product["peer_plans"] if plan["source"] == plain_peers]
        return {**product, "peer_plans": kept}

    def _refined_rows(self, label: str) -> list[Row]:
        variant = f"refined_{self.arguments.refine}"
        found = self._autoq(variant, [self._label("peer", PLAIN_SCALES)])
        return refined_rows(self.model, label, found)

    @property
    def versions(self) -> dict[str, Any]:
        """Tool -> versions of what it ran with."""
        labels = {"modelopt": ("peer", "max"), "autoq": ("autoq", "product")}
        return {
            tool: json.loads(self._path(self._label(*label)).read_text())["versions"]
            for tool, label in labels.items()
        }

    def _label(self, tool: str, variant: str) -> str:
        return "__".join([tool, self.model, "_".join(self.formats), variant])

    def _path(self, label: str) -> Path:
        path: Path = self.arguments.cache / f"{label}.json"
        return path

    def _peer(self, variant: str, options: list[str]) -> dict[str, Any]:
        program = [self.arguments.peer_python, SCRIPTS / "quality_modelopt.py"]
        tokens = ["--tokens", self.tokens / "calibration.npy"]
        return self._cached(self._label("peer", variant), [*program, *tokens, *options])

    def _autoq(self, variant: str, peers: list[str]) -> dict[str, Any]:
        arguments = self.arguments
        program = [sys.executable, SCRIPTS / "quality_autoq.py"]
        program += ["--peer-plans", *map(self._path, peers)]
        program += ["--sequences", arguments.sequences]
        program += ["--sequence-length", arguments.sequence_length]
        if arguments.estimator:
            program += ["--estimator", arguments.estimator]
        if variant.startswith("refined"):
            program += ["--refine", arguments.refine]
        program.append("--peer-assignments")
        if variant != "product":
            program += ["--calibration", PLAIN_SCALES]
        return self._cached(self._label("autoq", variant), program)

    def _cached(self, label: str, program: list[Any]) -> dict[str, Any]:
        """The result of a program, run if it is not there yet."""
        path = self._path(label)
        if not path.is_file():
            partial = path.with_suffix(".part")
            options = ["--model", self.folder, "--formats", ",".join(self.formats)]
            options += ["--bits", ",".join(f"{bits:g}" for bits in self._budgets())]
            options += ["--held-out", self.tokens / "held_out.npy", "--out", partial]
            options += ["--batch", self.arguments.batch, "--threads", self.arguments.threads]
            _run([*program, *options], label, threads=self.arguments.threads)
            partial.rename(path)
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    def _budgets(self) -> Iterator[float]:
        """The budgets that the formats can meet; the others are named on standard error."""
        floor = _floor_bits(self.formats)
        for bits in BUDGETS:
            if bits >= floor:
                yield bits
            else:
                _note(f"{' '.join(self.formats)} cannot go below {floor:g} bits: {bits:g} left out")


def _floor_bits(formats: tuple[str, ...]) -> float:
    from autoq.formats import FORMATS

    weights = 1024 * 1024
    return min(FORMATS[name].storage_bits(1024, 1024).effective_bits / weights for name in formats)


def _run(command: list[Any], label: str, threads: int = 1) -> None:
    _note(f"running {label}")
    finished = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        sys.exit(f"{label} failed:\n{finished.stderr[-4000:]}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
