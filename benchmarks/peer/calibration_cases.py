"""What `calibration_algorithms.py` compares, and how, for both tools alike.

Imports nothing of either tool: both environments have torch alone in common.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from divergence import Forward, Reference, logits_of, token_batches
from torch import Tensor

REPETITIONS = 3


@dataclass(frozen=True)
class Case:
    """One algorithm in one format."""

    name: str
    fmt: str  # autoq's
    calibration: str | None  # autoq's
    container: str = "modelopt"
    peer_config: str | None = None
    peer_algorithm: Mapping[str, Any] | str | None = None
    peer_inputs: Mapping[str, Any] = field(default_factory=dict)  # of the input quantisers
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.fmt}"


INT4, INT8 = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_SMOOTHQUANT_CFG"
PER_TOKEN = {"num_bits": 8, "axis": None, "type": "dynamic", "block_sizes": {-1: None}}

CASES = (
    Case("max", "fp8", "rtn", peer_config="FP8_DEFAULT_CFG", peer_algorithm="max"),
    Case("percentile:99.9", "fp8", "percentile:99.9"),
    Case("max", "nvfp4", "rtn", peer_config="NVFP4_DEFAULT_CFG", peer_algorithm="max"),
    Case(
        "awq_lite", "nvfp4", "awq_lite", peer_config="NVFP4_AWQ_LITE_CFG", peer_algorithm="awq_lite"
    ),
    Case("mse+gptq", "nvfp4", "mse+gptq"),
    Case("awq+gptq", "nvfp4", "awq+gptq", note="autoq's default"),
    Case("max", "int4_awq", "rtn", peer_config=INT4, peer_algorithm="max"),
    Case("mse", "int4_awq", "mse", peer_config=INT4, peer_algorithm="mse"),
    Case("awq_lite", "int4_awq", "awq_lite", peer_config=INT4, peer_algorithm="awq_lite"),
    Case("awq", "int4_awq", "awq", peer_config=INT4, peer_algorithm="awq_full"),
    Case("gptq", "int4_awq", "gptq", peer_config=INT4, peer_algorithm="gptq"),
    Case("awq+gptq", "int4_awq", "awq+gptq", note="autoq's default"),
    Case(
        "max",
        "int8_sq",
        "rtn",
        "compressed-tensors",
        peer_config=INT8,
        peer_algorithm="max",
        peer_inputs=PER_TOKEN,
    ),
    Case(
        "smoothquant:0.5",
        "int8_sq",
        "smoothquant:0.5",
        "compressed-tensors",
        peer_config=INT8,
        peer_algorithm={"method": "smoothquant", "alpha": 0.5},
        peer_inputs=PER_TOKEN,
    ),
    Case(
        "smoothquant",
        "int8_sq",
        "smoothquant",
        "compressed-tensors",
        peer_config=INT8,
        peer_algorithm="smoothquant",
        peer_inputs=PER_TOKEN,
        note="autoq searches alpha by layer, ModelOpt takes 1",
    ),
    Case("svdquant+gptq", "nvfp4_svdquant", "awq+gptq", note="autoq's default"),
    Case(
        "svdquant",
        "nvfp4_svdquant",
        "rtn",
        peer_config="NVFP4_SVDQUANT_DEFAULT_CFG",
        peer_algorithm={"method": "svdquant", "lowrank": 32},
        note="autoq's branch takes two bits per weight at most, here rank 16 or less; ModelOpt's 32",
    ),
)


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The command line of either tool's run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of ids to calibrate on")
    parser.add_argument("--held-out", type=Path, required=True, help=".npy of ids to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--only", nargs="*", help="names of algorithms; all if left out")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    return parser.parse_args()


class Rows:
    """Results by case in a JSON file, which is written after each, so that a run can be continued."""

    def __init__(self, path: Path, versions: Mapping[str, str]) -> None:
        self._path = path
        known = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
        self._rows: dict[str, Any] = known["rows"]
        self._versions = dict(versions)

    def missing(self, only: list[str] | None) -> Iterator[Case]:
        """Cases that are asked for and not there yet."""
        for case in CASES:
            if str(case) not in self._rows and (not only or case.name in only):
                yield case

    def add(self, case: Case, row: dict[str, Any]) -> None:
        self._rows[str(case)] = row
        self._path.write_text(
            json.dumps({"versions": self._versions, "rows": self._rows}, indent=1)
        )


class Layers:
    """Inputs and outputs of a model's matrices on some tokens, to compare quantised layers with."""

    def __init__(self, model: torch.nn.Module, names: list[str], ids: Tensor) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(self._keeper(name)) for name in names
        ]
        with torch.no_grad():
            logits_of(model)(ids)
        for hook in hooks:
            hook.remove()

    def errors(self, model: torch.nn.Module) -> dict[str, float]:
        """Layer -> squared error of its outputs over their squares, on the original's inputs."""
        found = {}
        with torch.no_grad():
            for name, expected in self._outputs.items():
                error = model.get_submodule(name)(self._inputs[name]) - expected
                found[name] = float(
                    error.double().square().sum() / expected.double().square().sum()
                )
        return found

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[name], self._outputs[name] = inputs[0].detach(), output.detach()

        return keep


class Measurer:
    """Times calibrations, and measures what they make of a model."""

    def __init__(self, model: torch.nn.Module, arguments: argparse.Namespace) -> None:
        batches = token_batches(arguments.held_out, arguments.batch)
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name
        ]
        self.repetitions: int = arguments.repetitions
        self._reference = Reference(logits_of(model), batches)
        self._layers = Layers(model, names, torch.cat(batches[:2]))

    def seconds(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Processor time, the median of all runs, and what the last one gave."""
        seconds = []
        for _ in range(self.repetitions):
            found = None
            gc.collect()
            started = time.process_time()
            found = work()
            seconds.append(time.process_time() - started)
        return statistics.median(seconds), found

    def quality(self, model: torch.nn.Module, forward: Forward) -> dict[str, Any]:
        """Error of each layer's outputs, and divergence from the original by sequence."""
        return {
            "layer_errors": self._layers.errors(model),
            "kl_per_sequence": self._reference.divergences(forward),
        }


def peak_bytes(prepare: Callable[[], Callable[[], Any]]) -> int:
    """The most memory that is resident while something runs above what was before, in a fresh process.

    It is forked from this one, so nothing should have been run here but the model loaded: what the
    allocator has kept of earlier work would be used again and not be seen.

    Args:
        prepare: gives the work; its own memory does not count.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            work = prepare()
            before = _reset_peak()
            work()
            os.write(writer, str(_status("VmHWM") - before).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError("the run that measures memory failed; its error is above")
    return int(found)


def _reset_peak() -> int:
    """Let the high-water mark begin anew; returns the bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status; this benchmark needs Linux")
