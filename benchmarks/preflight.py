"""What `autoq search --dry-run` estimates beside what the search then takes: time, memory, disk.

    OMP_NUM_THREADS=1 python benchmarks/preflight.py [--cases bundled,wide-devices,...] [--json FILE]

Each estimate and each search runs in a process of its own (Linux only: the peak is the kernel's).
The bundled model, a random Llama with wide layers and a large vocabulary, and a random mixture of
experts. Searches measure and export. Further cases score in two processes (`devices`), on actors of a
Ray cluster of this machine (`ray`), score the key/value cache (`cache`), and measure trials in two
processes (`refine`). Memory of all processes is looked at ten times a second: what each has for itself,
and once what they share. On a busy machine times differ by what else runs; the estimate measures its
rates a moment before, and the search is not over for a while.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from autoq.bundled import model_path

SIZES: dict[str, dict[str, Any]] = {
    "bundled": {"calibration_sequences": 32, "sequence_length": 256, "held_out_sequences": 8},
    "wide": {"calibration_sequences": 8, "sequence_length": 128, "held_out_sequences": 4},
    "mixture": {"calibration_sequences": 8, "sequence_length": 128, "held_out_sequences": 4},
}
ADDED: dict[str, dict[str, Any]] = {
    "": {},
    "devices": {"devices": 2},
    "ray": {"ray": "auto", "devices": 2},
    "cache": {"kv_formats": ["fp8", "nvfp4"]},
    "refine": {"refine": 30, "workers": 2},
}
CASES = [*SIZES, *(f"{model}-{added}" for model in ("bundled", "wide") for added in ADDED if added)]
LOOK_SECONDS = 0.1
VOCABULARY = 32_000


def main() -> None:
    """Print a table for every model."""
    arguments = parse_arguments()
    if arguments.run:
        print(json.dumps(RUNS[arguments.run](json.loads(arguments.options))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases.split(","):
            options = options_of(name, Path(folder) / name)
            found[name] = {kind: in_a_process(kind, options) for kind in RUNS}
            print_table(name, found[name])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    return parser.parse_args()


def options_of(name: str, place: Path) -> dict[str, Any]:
    """Arguments of `preflight`, and of `search`."""
    place.mkdir()
    model, _, added = name.partition("-")
    return {
        "model": str(model_path() if model == "bundled" else random_model(model, place / "model")),
        "store": f"sqlite:///{place / 'store.db'}",
        "export": str(place / "checkpoint"),
        **SIZES[model],
        **ADDED[added],
    }


def random_model(name: str, folder: Path) -> Path:
    """A bfloat16 model of random weights with the bundled tokenizer."""
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    shape = {"vocab_size": VOCABULARY, "num_attention_heads": 8, "num_key_value_heads": 8}
    torch.manual_seed(0)
    if name == "wide":
        model: Any = LlamaForCausalLM(
            LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, **shape)
        )
    else:
        sizes = {"num_local_experts": 8, "num_experts_per_tok": 2}
        model = MixtralForCausalLM(
            MixtralConfig(
                hidden_size=512, intermediate_size=1024, num_hidden_layers=3, **shape, **sizes
            )
        )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return folder


def in_a_process(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a run in a fresh process found, and what it and its children had of memory."""
    command = [sys.executable, __file__, "--run", kind, "--options", json.dumps(options)]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = psutil.Popen(command, stdout=said, stderr=errors, text=True)
        seen = {"all_bytes": 0, "worker_bytes": 0}
        while process.poll() is None:
            own, *others = [memory_of(each) for each in family(process)]
            private = sum(resident - shared for resident, shared in (own, *others))
            together = private + max(shared for _, shared in (own, *others))
            seen["all_bytes"] = max(seen["all_bytes"], together)
            seen["worker_bytes"] = max(seen["worker_bytes"], *(size for size, _ in others), 0)
            time.sleep(LOOK_SECONDS)
        errors.seek(0)
        if process.returncode:
            sys.exit(errors.read())
        said.seek(0)
        result: dict[str, Any] = json.loads(said.read().splitlines()[-1])
    return {**seen, **result}


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process, and all that it started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """Resident bytes, and those of them that others may have, too."""
    try:
        found = process.memory_info()
        return found.rss, found.shared
    except psutil.Error:
        return 0, 0


def estimate(options: dict[str, Any]) -> dict[str, Any]:
    """What preflight says."""
    from autoq.api.preflight import preflight

    return preflight(**options).to_json()


def search(options: dict[str, Any]) -> dict[str, Any]:
    """What the search takes."""
    import autoq
    from autoq.memory import peak_rss_bytes

    trials, workers = options.pop("refine", 0), options.pop("workers", 1)
    study = autoq.search(**options, effective_bits=5.0)
    stages = {stage.name: stage.seconds for stage in study.store.stages(study.id)}
    seconds = {name: stages[stored] for name, stored in STAGES.items() if stored in stages}
    if trials:
        started = time.perf_counter()
        held_out = options["held_out_sequences"]
        study.refine(trials=trials, workers=workers, held_out_sequences=held_out)
        seconds["refining"] = time.perf_counter() - started
    study.store.close()
    place = Path(options["store"].removeprefix("sqlite:///")).parent
    stored = sum(file.stat().st_size for file in place.rglob("store.db*") if file.is_file())
    checkpoint = sum(file.stat().st_size for file in Path(options["export"]).rglob("*"))
    outputs = sum(file.stat().st_size for file in (place / "store.db.outputs").rglob("*.safe*"))
    return {
        "peak_bytes": peak_rss_bytes(),
        "seconds": seconds,
        "store_bytes": stored,
        "checkpoint_bytes": checkpoint,
        "outputs_bytes": outputs,
    }


STAGES = {
    "calibrating": "calibration",
    "scoring": "sensitivity",
    "scoring cache": "kv_cache",
    "measuring": "measure",
    "exporting": "export",
}
RUNS = {"estimate": estimate, "search": search}


def print_table(name: str, found: dict[str, Any]) -> None:
    """Estimate, measured, and their ratio."""
    guess, taken = found["estimate"], found["search"]
    print(f"\n{name:<24}{'estimated':>12}{'measured':>12}{'ratio':>8}")
    rows = [("peak memory, MB", guess["peak_bytes"] / 1e6, taken["peak_bytes"] / 1e6)]
    if guess["workers"]:
        worker = max(team["memory_bytes"] for team in guess["workers"])
        rows.append(("largest worker, MB", worker / 1e6, taken["worker_bytes"] / 1e6))
        whole = guess["machine_peak_bytes"]
        rows.append(("all processes, MB", whole / 1e6, taken["all_bytes"] / 1e6))
    rows += [
        (f"{stage}, s", guess["seconds"][stage], seconds)
        for stage, seconds in taken["seconds"].items()
    ]
    for what in ("store", "checkpoint", "outputs"):
        key = f"{what}_bytes"
        if taken[key]:
            rows.append((f"{what}, MB", guess[key] / 1e6, taken[key] / 1e6))
    for label, guessed, measured in rows:
        print(f"{label:<24}{guessed:12.2f}{measured:12.2f}{guessed / measured:8.2f}")


if __name__ == "__main__":
    main()
