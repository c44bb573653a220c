"""The modes of tests/kernels/triton, each in a process of its own, with every supported triton.

Processes, because the interpreter must be chosen before triton is imported, and because a kernel
that reads where it must not can end its process. GPUs are hidden from them: what runs on a GPU runs
in pytest's own process, under `-m gpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = "3.6.0", "3.9.0"  # the Makefile installs them beside the environment's own
LAST_LINES = 80
TIMEOUT_S = 2400


def _environment(triton: str, **settings: str) -> dict[str, str]:
    """The environment of a child that imports this version of triton."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "KERNEL_", "TRITON_"))
    }
    if triton != version("triton"):
        folder = Path(sys.prefix) / f"triton-{triton}"
        assert (folder / "triton").is_dir(), f"{folder} is not there; run `make venv`"
        kept["PYTHONPATH"] = str(folder)
    return {
        **kept,
        "KERNEL_TRITON": triton,
        "TRITON_CACHE_DIR": str(Path(sys.prefix) / "triton-cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **settings,
    }


def _child(*command: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and all output."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout


def _pytest(*arguments: str, environment: dict[str, str]) -> tuple[int, str]:
    # A kernel that writes where it must not fails tests before it ends the process: stop early.
    options = ("-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=10")
    return _child("-m", "pytest", *options, *arguments, environment=environment)


def _assert_passed(code: int, output: str) -> None:
    ended = f"ended by signal {-code}" if code < 0 else f"exit code {code}"
    assert code == 0, f"{ended}\n" + "\n".join(output.splitlines()[-LAST_LINES:])


def test_a_child_that_crashes_is_one_failure():
    environment = _environment(version("triton"))
    crash = (
        "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    with pytest.raises(AssertionError, match=r"ended by signal 11\s+last words"):
        _assert_passed(*_child("-c", crash, environment=environment))


def test_a_triton_that_is_not_there_fails_and_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(AssertionError, match=r"triton-3\.6\.0 is not there; run `make venv`"):
        _environment(OLDEST)


@pytest.mark.parametrize(
    "triton",
    [
        version("triton"),
        pytest.param(OLDEST, marks=pytest.mark.slow),
        pytest.param(NEWEST, marks=pytest.mark.slow),
    ],
)
def test_kernels_in_the_interpreter(triton):
    environment = _environment(triton, KERNEL_MODE="interpret")
    _assert_passed(*_pytest("tests/kernels/triton", "-m", "not slow", environment=environment))


@pytest.mark.parametrize(
    ("triton", "chosen"), [(NEWEST, "test"), (OLDEST, "compiles_as_it_must and sm_90")]
)
def test_one_launch_of_each_kernel_compiles(triton, chosen):
    environment = _environment(triton, KERNEL_MODE="compile")
    _assert_passed(
        *_pytest("tests/kernels/triton", "-m", "not slow", "-k", chosen, environment=environment)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("triton", "targets"), [(OLDEST, ["sm_89", "sm_90"]), (NEWEST, [])])
def test_every_launch_compiles(triton, targets, tmp_path):
    """With the newest triton for all targets; with the oldest for those that machines have it on."""
    program = "from autoq.cli import main; main()"
    found = tmp_path / "check.json"
    options = [option for target in targets for option in ("--target", target)]
    command = ("-c", program, "kernels", "check", "--quiet", "--json", str(found), *options)
    _assert_passed(*_child(*command, environment=_environment(triton)))
    assert json.loads(found.read_text())["triton"] == triton


@pytest.mark.slow
def test_nothing_is_fused_in_any_launch_that_promises_bits():
    environment = _environment(NEWEST, KERNEL_MODE="compile")
    _assert_passed(*_pytest("tests/kernels/triton", "-k", "fused", environment=environment))


@pytest.mark.parametrize("triton", [OLDEST, NEWEST])
def test_the_gate_is_shut_for_the_interpreter_as_it_comes(triton):
    environment = _environment(triton, KERNEL_MODE="interpret", KERNEL_REPAIRS="off")
    code, output = _pytest("tests/kernels/triton/test_platform.py", environment=environment)
    assert code == 1, output
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    for name in (
        "cast_to_e4m3",
        "cast_to_bfloat16",
        "every_e4m3_code",
        "bfloat16_arithmetic",
        "accumulates_in_float32[torch.bfloat16]",
        "dot_scaled_decodes_each_scale_by_its_type[nvfp4]",
    ):
        assert any(name in line for line in failed), f"{name} passed\n{output}"


def test_a_gpu_runs_the_numeric_tests():
    collected = {}
    for marker in ("gpu", "not gpu"):
        environment = _environment(version("triton"), KERNEL_MODE="gpu")
        _, collected[marker] = _pytest(
            "--collect-only", "-m", marker, "tests/kernels/triton", environment=environment
        )
    assert "test_platform.py::test_cast_to_e4m3" in collected["gpu"]
    assert "test_compile.py" not in collected["gpu"]
    assert "::test_" not in collected["not gpu"], collected["not gpu"]
