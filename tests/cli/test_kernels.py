from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")

CHECK = ("kernels", "check")
SMALL = ("--operation", "int8.dequantize", "--target", "sm_90")


@pytest.fixture(autouse=True)
def shared_cache(monkeypatch):
    """What was compiled by an earlier run of the tests is not compiled again."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(Path(sys.prefix) / "triton-cache"))


def _checked(failures=(), kernels=True, **changes):
    from autoq.kernels.compile_check import CheckedLaunch, KernelFigures

    figures = KernelFigures(
        name="matmul_kernel",
        registers=168,
        spill_bytes=16,
        shared_memory_bytes=98304,
        instructions=("wgmma e4m3",),
    )
    return CheckedLaunch(
        **{
            "operation": "int8.dequantize",
            "variant": "bfloat16",
            "target": "sm_90",
            "kernels": (figures,) if kernels else (),
            "failures": failures,
            "seconds": 1.0,
            **changes,
        }
    )


@pytest.fixture
def compiler(monkeypatch):
    """Let the compiler find these results for whatever it is asked."""

    def finds(*results):
        def check_all(tasks):
            assert len(tasks) >= len(results)
            yield from results

        monkeypatch.setattr("autoq.kernels.check_processes.check_all", check_all)

    return finds


def test_check_compiles_and_shows_what_each_kernel_takes(run, tmp_path):
    result = run(*CHECK, *SMALL, "--json", "found.json")
    assert result.exit_code == 0, result.stderr
    assert "int8.dequantize" in result.stdout
    assert "dequantize_kernel" in result.stdout
    assert "compiling: 2 of 2" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("2 launches for 1 target with triton ")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {launch["target"] for launch in found["launches"]} == {"sm_90"}
    assert all(launch["kernels"][0]["registers"] > 0 for launch in found["launches"])
    assert found["triton"]


def test_check_says_what_failed_and_ends_with_4(run, compiler):
    compiler(
        _checked(),
        _checked(variant="float32", failures=("matmul_kernel spills 16 bytes, 0 are allowed",)),
    )
    result = run(*CHECK, *SMALL)
    assert result.exit_code == 4
    assert result.stdout.splitlines()[:6] == [
        "int8.dequantize",
        "    target  kernel         units               registers  spill bytes  shared bytes",
        "  bfloat16",
        "    sm_90   matmul_kernel  wgmma e4m3  ok            168           16         98304",
        "  float32",
        "    sm_90   matmul_kernel  wgmma e4m3  failed        168           16         98304",
    ]
    assert "failed: int8.dequantize (float32) for sm_90: matmul_kernel spills" in result.stderr
    assert "1 ok, 1 failed" in result.stdout


def test_check_shows_a_launch_that_did_not_compile(run, compiler):
    compiler(_checked(kernels=False, failures=("CompilationError: at 3:4",)))
    result = run(*CHECK, *SMALL)
    assert result.exit_code == 4
    assert "CompilationError: at 3:4" in result.stderr
    assert result.stdout.splitlines()[3].split() == ["sm_90", "-", "-", "failed", "-", "-", "-"]


def test_check_keeps_the_order_of_cases_and_targets(run, compiler):
    compiler(
        _checked(variant="float32", target="sm_90"),
        _checked(variant="bfloat16", target="sm_90"),
        _checked(variant="bfloat16", target="sm_80"),
    )
    result = run(*CHECK, "--operation", "int8.dequantize")
    places = [line.split()[0] for line in result.stdout.splitlines()[2:7]]
    assert places == ["bfloat16", "sm_80", "sm_90", "float32", "sm_90"]


def test_quiet_check_prints_only_the_last_line(run, compiler):
    compiler(_checked())
    result = run(*CHECK, *SMALL, "--quiet")
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "sm_91"), "no target named 'sm_91' (did you mean sm_90"),
        (("--operation", "fp7"), "no operation begins with 'fp7'; known: fp8."),
        (("--json", "."), "is a folder; name a file"),
        (("--json", "no/such/file"), "the folder no/such does not exist"),
    ],
    ids=["target", "operation", "json_folder", "json_parent"],
)
def test_check_refuses(arguments, message, run):
    result = run(*CHECK, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_check_without_triton_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run(*CHECK)
    assert result.exit_code == 2
    assert result.stderr == "error: triton is not installed; pip install 'autoq[triton]'\n"


def test_check_refuses_the_interpreter(run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run(*CHECK)
    assert result.exit_code == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_an_interrupted_check_says_what_is_kept(run, monkeypatch):
    def interrupted(tasks):
        raise KeyboardInterrupt

    monkeypatch.setattr("autoq.kernels.check_processes.check_all", interrupted)
    result = run(*CHECK, *SMALL)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("interrupted: what was compiled is kept")


def test_list_says_what_each_operation_takes_and_why(run):
    result = run("kernels", "list", "--device", "sm_90")
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "int8.quantize" in line)
    assert row.split() == ["int8.quantize", "triton", "kernels", "for", "sm_90"]
    row = next(line for line in result.stdout.splitlines() if "mxfp8.matmul" in line)
    assert row.split()[:4] == ["mxfp8.matmul", "16", "triton", "upcast:"]


def test_list_for_the_cpu(run):
    result = run("kernels", "list", "--device", "cpu", "--json")
    found = json.loads(result.stdout)
    assert found["device"] == "cpu"
    assert {row["implementation"] for row in found["operations"]} == {"torch"}


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("sm90", "no device or target named 'sm90'; known: cpu, cuda, sm_80"),
        ("cuda", "there is no GPU here; name a generation such as sm_90"),
    ],
)
def test_list_refuses(device, message, run, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run("kernels", "list", "--device", device)
    assert result.exit_code == 2
    assert message in result.stderr
