"""What vLLM's and SGLang's own code makes of checkpoints that autoq wrote: asked on a CPU.

Runs in an environment of its own, which has the engine's wheel unpacked, its requirements of Python
and a torch without CUDA; it imports nothing of autoq:

    python -m tests.export.engine_cases CASES
    ENGINE_VENV/bin/python tests/export/make_engine_golden.py vllm CASES WHEEL_FOLDER \\
        tests/export/engine_golden/vllm.json

and so with `sglang`, whose folder has the wheel of sglang-kernel beside it. For compute capability
10.0 and 10.3 it imports CUTLASS's Python library, which needs no CUDA to be imported: the wheels of
nvidia-cutlass-dsl-libs-core and -base, unpacked where Python finds `cutlass`.

Each engine reads the configuration, builds its own model class for a GPU that is described to it,
chooses methods and kernels for every layer, and loads the tensors through its own loaders; the kernels
themselves are declared, and never run. `engine_shims/` says what is put in the place of a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CAPABILITIES = (75, 80, 86, 89, 90, 100, 103, 120)
FEW = (90, 100)
"""For families that differ from the first in names and not in kernels, and for caches."""

LEFT_OUT = {"sglang": ("gemma3_vision",)}
"""Families whose unquantised checkpoints the engine refuses: it wants other names of tensors."""

OF_THE_ENVIRONMENT = ("No CTK flavor installed", "Torch not compiled with CUDA enabled")
"""What stops a build for want of a library that needs CUDA, and is no answer.

The second stops vLLM where FlashInfer's attention is to keep a key/value cache in NVFP4.
"""

SHIMS = Path(__file__).resolve().parent / "engine_shims"


def main() -> None:
    """Ask in a process for each compute capability; modules of engines remember the GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=("vllm", "sglang"))
    parser.add_argument("cases", type=Path)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--capability", type=int)
    arguments = parser.parse_args()
    if arguments.capability is not None:
        answers = _ask(arguments)
        arguments.destination.write_text(json.dumps(answers))
        return
    found: dict[int, Any] = {}
    for capability in CAPABILITIES:
        part = arguments.destination.with_suffix(f".{capability}")
        command = [sys.executable, *sys.argv[:-1], str(part), "--capability", str(capability)]
        subprocess.run(command, check=True)
        found[capability] = json.loads(part.read_text())
        part.unlink()
    asked = _asked(arguments.engine, arguments.cases)
    arguments.destination.write_text(_merged(found, asked))


def _ask(arguments: argparse.Namespace) -> dict[str, Any]:
    sys.path.insert(0, str(SHIMS))
    shim = importlib.import_module(f"{arguments.engine}_shim")
    engine = shim.Engine(arguments.capability, arguments.wheel)
    answers = {}
    for case in _asked(arguments.engine, arguments.cases):
        if _is_asked(case, arguments.capability):
            answers[case] = engine.answer(arguments.cases / case)
    return {"versions": engine.versions(), "answers": answers}


def _is_asked(case: str, capability: int) -> bool:
    return capability in FEW or (case.startswith("llama/") and "cache" not in case)


def _asked(engine: str, cases: Path) -> dict[str, str]:
    """The digests of the cases that the engine is asked about."""
    digests = json.loads((cases / "cases.json").read_text())
    left_out = LEFT_OUT.get(engine, ())
    return {case: found for case, found in digests.items() if case.split("/")[0] not in left_out}


def _merged(found: dict[int, Any], digests: dict[str, str]) -> str:
    """One line for each different answer; its capabilities beside it."""
    lines = []
    for case, digest in digests.items():
        distinct: dict[str, list[int]] = {}
        for capability, asked in found.items():
            text = json.dumps(asked["answers"].get(case), sort_keys=True)
            if case in asked["answers"] and not any(w in text for w in OF_THE_ENVIRONMENT):
                distinct.setdefault(text, []).append(capability)
        answers = (f",\n   [{on}, {text}]" for text, on in distinct.items())
        lines.append(f'  {json.dumps(case)}: ["{digest}"{"".join(answers)}]')
    versions = json.dumps(next(iter(found.values()))["versions"], sort_keys=True)
    body = ",\n".join(lines)
    return f'{{"versions": {versions},\n "answers": {{\n{body}\n}}}}\n'


if __name__ == "__main__":
    main()
