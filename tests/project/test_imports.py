"""Importing autoq is cheap and touches no accelerator."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "compressed_tensors",
    "datasets",
    "lm_eval",
    "matplotlib",
    "optuna",
    "pandas",
    "transformers",
    "triton",
}

REPORT = """
import json, sys
torch = sys.modules.get("torch")
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "cuda_initialised": torch is not None and torch.cuda.is_initialized(),
}))
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
import autoq

# Programs, migrations (run by Alembic itself), Triton kernels (imported at their first launch), the
# models that lm-eval calls and the sampler that Optuna asks may import what they are about.
LEFT_OUT = ("__main__", "migrations", "_jit", "_launch", "_compile_cases", "harness_model", "lm_eval",
            "refinement._sampler")

def visit(package):
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if any(word in found.name for word in LEFT_OUT):
            continue
        module = importlib.import_module(found.name)
        if found.ispkg:
            visit(module)

visit(autoq)
import autoq.kernels
visit(autoq.kernels)
"""


@pytest.fixture(
    scope="module",
    params=["import autoq", IMPORT_EVERYTHING],
    ids=["the_package", "every_module"],
)
def interpreter_state(request: pytest.FixtureRequest) -> dict[str, object]:
    """What a fresh interpreter holds after the import."""
    finished = subprocess.run(
        [sys.executable, "-c", request.param + REPORT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    state = json.loads(finished.stdout.splitlines()[-1])
    assert isinstance(state, dict)
    return state


def test_import_leaves_heavy_packages_alone(interpreter_state: dict[str, list[str]]) -> None:
    loaded = sorted(HEAVY & set(interpreter_state["modules"]))
    assert not loaded, f"import these inside the functions that need them: {loaded}"


def test_import_starts_no_accelerator(interpreter_state: dict[str, object]) -> None:
    assert interpreter_state["cuda_initialised"] is False


def test_public_names_exist_and_are_listed() -> None:
    import autoq

    missing = [name for name in autoq.__all__ if not hasattr(autoq, name)]
    assert not missing
    assert {"auto_quantize", "search"} <= set(autoq.__all__)
    assert set(autoq.__all__) <= set(dir(autoq))
