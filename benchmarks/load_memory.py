"""Memory and time of loading a checkpoint: packed, as a simulation, and its unquantised original.

    OMP_NUM_THREADS=1 python benchmarks/load_memory.py [--hidden 1024] [--layers 12]

Makes a random Llama and exports it to both containers, formats in turn and one group of four left
as it is. Each way of loading runs in a process of its own (Linux only: the peak is the kernel's,
reset after the imports).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoq.export import export_checkpoint, load_checkpoint_for_evaluation, load_packed
from autoq.formats import NONE, FormatName
from autoq.kernels import int4
from autoq.layers import Container, LayerCalibration
from autoq.models import DecisionGroup, ModelMap, discover, load_model
from autoq.models.weights import slot_weight

FORMATS = tuple(FormatName(name) for name in ("nvfp4", "w4a8_awq", "fp8", "none"))
MIB = 2**20


def main() -> None:
    """Make the checkpoints and print a line for each way to load them."""
    arguments = parse_arguments()
    if arguments.load:
        measure(arguments.load, Path(arguments.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        original = make_model(Path(folder) / "original", arguments.hidden, arguments.layers)
        run("dense", original)
        for container in Container:
            checkpoint = make_checkpoint(original, Path(folder) / container.value, container)
            run("packed", checkpoint)
            run("simulated", checkpoint)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--load", choices=["dense", "packed", "simulated"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_model(folder: Path, hidden: int, layers: int) -> Path:
    """A random bfloat16 Llama, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=8192,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    return folder


def make_checkpoint(original: Path, folder: Path, container: Container) -> Path:
    """The model exported with the largest magnitudes as calibration."""
    model = load_model(original)
    model_map = discover(model)
    formats, calibration = {}, {}
    for number, group in enumerate(model_map.groups):
        fmt = FORMATS[number % len(FORMATS)]
        formats.update(dict.fromkeys(group.slots, fmt))
        if fmt != NONE:
            entry = LayerCalibration(weight_amax=amax(model, model_map, group, fmt), input_amax=4.0)
            calibration.update({(slot, fmt): entry for slot in group.slots})
    export_checkpoint(
        model,
        model_map,
        formats,
        calibration,
        source=original,
        destination=folder,
        container=container,
        scale_dtype=torch.bfloat16,
    )
    return folder


def amax(model: Any, model_map: ModelMap, group: DecisionGroup, fmt: FormatName) -> float:
    """The largest magnitude of what a group's codes stand for."""
    weights = [slot_weight(model, model_map.slots[slot]) for slot in group.slots]
    if fmt == "w4a8_awq":
        weights = [rounded(weight) for weight in weights]
    return max(weight.abs().max().item() for weight in weights)


def rounded(weight: Tensor) -> Tensor:
    """An INT4 weight's values."""
    return int4.dequantize(int4.quantize(weight, storage_dtype=torch.bfloat16))


def run(way: str, folder: Path) -> None:
    """Load in a process of its own."""
    command = [sys.executable, __file__, "--load", way, "--folder", str(folder)]
    subprocess.run(command, check=True)


def measure(way: str, folder: Path) -> None:
    """Load once and print what it took."""
    import transformers.models.llama.modeling_llama
    import transformers.quantizers.auto  # noqa: F401  (imports must not count)

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, start = status_mib("VmRSS"), time.perf_counter()
    model = load(way, folder)
    seconds = time.perf_counter() - start
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:  # pages of a mapped file count once they are read
        tensor.detach().flatten().view(torch.uint8).max()
    peak = status_mib("VmHWM") - before
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB
    print(
        f"{folder.name} {way}: {held:.1f} MiB of weights, {peak:.1f} MiB at the peak, {seconds:.2f} s"
    )


def load(way: str, folder: Path) -> Any:
    """The model, in one of three ways."""
    if way == "packed":
        return load_packed(folder)
    if way == "simulated":
        return load_checkpoint_for_evaluation(folder)[0]
    return load_model(folder)


def status_mib(name: str) -> float:
    """A line of this process's status in the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


if __name__ == "__main__":
    main()
