"""The compiled CPU path: its programs against the eager bodies, when it compiles, and for real."""

import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels import dispatch
from autoq.kernels._mx import E2M1, E4M3, ScaleRule
from autoq.kernels._scaling import Scaling
from autoq.kernels._torch import building, compiled, fp8, fused, int4, int8, mx, nvfp4, w4a8
from autoq.kernels._torch.building import awkward_like
from autoq.kernels._torch.chunks import map_rows
from autoq.kernels._torch.programs import PIECE_ELEMENTS, Offer, Program
from autoq.kernels.dispatch import Choice, Implementation

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None

Operation = Callable[[Tensor], Tensor]


def _int4_scale(x: Tensor, group: int = 128) -> Tensor:
    return int4.group_scale(x, group, torch.bfloat16)


OPERATIONS: dict[str, Operation] = {
    "fp8_tensor": lambda x: fp8.fake_quantize(x, torch.tensor(0.013), Scaling.TENSOR),
    "fp8_row": lambda x: fp8.fake_quantize(x, None, Scaling.ROW),
    "fp8_row_given": lambda x: fp8.fake_quantize(x, fp8.scales(x, Scaling.ROW), Scaling.ROW),
    "fp8_1x128": lambda x: fp8.fake_quantize(x, None, Scaling.BLOCK_1X128),
    "fp8_128x128": lambda x: fp8.fake_quantize(x, None, Scaling.BLOCK_128X128),
    "nvfp4": lambda x: nvfp4.fake_quantize(x, torch.tensor(0.0017)),
    "int4": lambda x: int4.fake_quantize(x, _int4_scale(x)),
    "int4_groups_of_32": lambda x: int4.fake_quantize(x, _int4_scale(x, 32)),
    "int8": lambda x: int8.fake_quantize(x, None),
    "int8_given": lambda x: int8.fake_quantize(x, torch.full((len(x), 1), 0.013)),
    "mxfp8": lambda x: mx.fake_quantize(x, E4M3, ScaleRule.OCP),
    "mxfp8_up": lambda x: mx.fake_quantize(x, E4M3, ScaleRule.UP),
    "mxfp4": lambda x: mx.fake_quantize(x, E2M1, ScaleRule.OCP),
    "mxfp4_up": lambda x: mx.fake_quantize(x, E2M1, ScaleRule.UP),
    "w4a8": lambda x: w4a8.fake_quantize(x, _int4_scale(x), torch.tensor(0.0021)),
}


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    monkeypatch.delenv(compiled.POLICY_VARIABLE, raising=False)
    compiled.forget()
    yield
    compiled.forget()


@pytest.fixture
def compiler(monkeypatch):
    """Stages run as they are instead of compiled, so that a test takes no seconds."""
    built = []

    def stages_as_they_are(call, sample):
        built.append(call.program.name)
        return call.program.stages

    monkeypatch.setattr(building, "_compiled", stages_as_they_are)
    monkeypatch.setattr(building, "_gain", lambda *_: 2.0)
    return built


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setenv(compiled.POLICY_VARIABLE, "always")


def weight(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[0, :4] = torch.tensor([0.0, -0.0, 1e-6, -1e-6])
    return values


def eager(operation: Operation, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setenv(compiled.POLICY_VARIABLE, "never")
        return operation(x)


def same_but_for_the_kind_of_nan(actual: Tensor, expected: Tensor, assert_same_bits) -> None:
    assert_same_bits(actual.nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))
    assert torch.equal(actual.isnan(), expected.isnan())


# 640 columns: rows of 128 in parts, and no whole number of rows in a piece.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_programs_give_the_bits_of_the_eager_bodies(
    name, dtype, compiler, always, monkeypatch, assert_same_bits
):
    x, operation = weight(1000, 640, dtype), OPERATIONS[name]
    assert_same_bits(operation(x), eager(operation, x, monkeypatch))
    assert [state.compiled for state in compiled.states()] == [True], compiled.states()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["fp8_tensor", "fp8_row", "nvfp4", "int8", "int8_given", "mxfp8", "mxfp4", "mxfp4_up"]
)
def test_programs_give_the_bits_of_the_eager_bodies_for_every_pattern(
    name, dtype, compiler, always, monkeypatch, assert_same_bits
):
    x, operation = awkward_like(torch.empty(512, 1024, dtype=dtype)), OPERATIONS[name]
    expected = eager(operation, x, monkeypatch)
    same_but_for_the_kind_of_nan(operation(x), expected, assert_same_bits)
    assert [state.compiled for state in compiled.states()] == [True], compiled.states()


def test_awkward_numbers_are_all_patterns_of_16_bits():
    for dtype in (torch.bfloat16, torch.float16):
        patterns = awkward_like(torch.empty(PIECE_ELEMENTS, dtype=dtype)).view(torch.int16)
        assert len(patterns.unique()) == 2**16
    floats = awkward_like(torch.empty(PIECE_ELEMENTS))
    assert floats.isnan().any() and floats.isinf().any() and (floats == 0).any()
    tiny = torch.finfo(torch.float32).tiny
    assert ((floats != 0) & (floats.abs() < tiny)).any()


def test_power_of_two_below_is_exact():
    normal = torch.arange(0x00800000, 0x43E00001, 509, dtype=torch.int32).view(torch.float32)
    exponents = (normal.view(torch.int32) & 0x7F800000).view(torch.float32)
    assert torch.equal(fused._power_of_two_below(normal)[1:], exponents[1:])


@pytest.mark.parametrize("rows, columns", [(1, 2**18 + 1), (3, 2**18 - 1), (2**15, 17)])
def test_a_tensor_of_any_width_under_one_scale(
    rows, columns, compiler, always, monkeypatch, assert_same_bits
):
    x, operation = weight(rows, columns), OPERATIONS["fp8_tensor"]
    assert_same_bits(operation(x), eager(operation, x, monkeypatch))
    assert compiled.states()[0].compiled


def test_what_is_small_scattered_or_narrow_is_not_offered(compiler, always):
    OPERATIONS["fp8_tensor"](weight(511, 512))
    OPERATIONS["fp8_tensor"](weight(1024, 1024).T)
    OPERATIONS["fp8_row"](weight(2**15, 24))
    assert compiled.states() == []
    assert compiler == []


def test_nothing_is_compiled_before_it_pays(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "ELEMENTS_BEFORE_FIRST", 5 * 2**19)
    monkeypatch.setattr(compiled, "ELEMENTS_BEFORE_EACH", 2 * 2**19)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = weight(1024, 512)  # 2**19 elements
    for _ in range(4):
        OPERATIONS["fp8_tensor"](x)
    assert compiler == []
    assert "too few" in compiled.states()[0].reason
    OPERATIONS["int4"](x)  # five in all, but one of its own
    assert compiler == []
    OPERATIONS["fp8_tensor"](x)
    assert compiler == ["fp8 under one scale"]
    OPERATIONS["int4"](x)
    assert compiler == ["fp8 under one scale", "int4"]
    OPERATIONS["int4"](x)
    assert len(compiler) == 2, "once is enough"


def test_more_threads_wait_longer(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "ELEMENTS_BEFORE_FIRST", 2**19)
    monkeypatch.setattr(compiled, "ELEMENTS_BEFORE_EACH", 2**19)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    OPERATIONS["fp8_tensor"](weight(1024, 512))
    assert compiler == []
    OPERATIONS["fp8_tensor"](weight(1024, 512))
    assert compiler == ["fp8 under one scale"]


def test_never_compiles_nothing_and_uses_nothing(compiler, always, monkeypatch):
    OPERATIONS["fp8_tensor"](weight(1024, 512))
    monkeypatch.setattr(compiled, "run_stages", lambda *_: pytest.fail("compiled code was run"))
    monkeypatch.setenv(compiled.POLICY_VARIABLE, "never")
    OPERATIONS["fp8_tensor"](weight(1024, 512))
    OPERATIONS["int4"](weight(1024, 512))
    assert compiler == ["fp8 under one scale"]


def test_a_policy_for_a_while_goes_before_the_environment(compiler, always):
    with compiled.asking_for(compiled.Policy.NEVER):
        OPERATIONS["fp8_tensor"](weight(1024, 512))
    assert compiler == []
    OPERATIONS["fp8_tensor"](weight(1024, 512))
    assert compiler == ["fp8 under one scale"]


def test_another_policy_is_refused(monkeypatch):
    monkeypatch.setenv(compiled.POLICY_VARIABLE, "sometimes")
    with pytest.raises(InputError, match="must be auto, always or never, got 'sometimes'; change"):
        OPERATIONS["fp8_tensor"](weight(1024, 512))


def copying(out_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An operation whose eager body copies, and whose program does what `out_of` does."""

    def stage(x: Tensor, out: Tensor) -> None:
        out.copy_(out_of(x))

    offer = Offer(Program("copy", (stage,), width=128), lambda _: ())

    def body(source: Tensor, values: Tensor, scratch: Tensor, rows: slice) -> None:
        values.copy_(source)

    return lambda x: map_rows(x, x.shape[-1], body, offer)


def one_off(x: Tensor) -> Tensor:
    out = x.clone()
    out[-1, -1] += 1
    return out


@pytest.mark.parametrize(
    "wrong",
    [
        one_off,
        lambda x: torch.where(x == 0, 0.0, x),
        lambda x: x.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf),
        lambda x: x.clamp(-448, 448),
        lambda x: torch.where(x.abs() < torch.finfo(x.dtype).tiny, 0.0, x),
    ],
    ids=["one_element", "sign_of_zero", "nan", "infinity", "subnormal"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_code_with_other_bits_is_refused(wrong, dtype, compiler, always, assert_same_bits):
    x = torch.ones(1024, 512, dtype=dtype)
    assert_same_bits(copying(wrong)(x), x)
    (state,) = compiled.states()
    assert not state.compiled
    assert state.reason == "compiled code gives other bits than the eager body here"


def test_dispatch_says_what_was_chosen_and_why(compiler, always, monkeypatch):
    OPERATIONS["fp8_tensor"](weight(1024, 512))
    monkeypatch.setattr(building, "_gain", lambda *_: 0.9)
    OPERATIONS["nvfp4"](weight(1024, 512))
    assert dispatch.compiled_choices() == {
        "fp8 under one scale, rows of 128, bfloat16": Choice(
            Implementation.COMPILED, "compiled, 2.0 times as fast as the eager body here"
        ),
        "nvfp4, rows of 32, bfloat16": Choice(
            Implementation.TORCH, "compiled code took 1.11 times as long as the eager body here"
        ),
    }


def test_slower_code_is_refused(compiler, always, monkeypatch):
    monkeypatch.setattr(building, "_gain", lambda *_: 0.5)
    copying(torch.clone)(weight(1024, 512))
    (state,) = compiled.states()
    assert not state.compiled
    assert "2.00 times as long" in state.reason


def test_gain_is_the_ratio_of_the_times(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(building.time, "perf_counter", lambda: float(next(ticks)))
    offer = Offer(fused.FP8_TENSOR, lambda _: (torch.tensor(1.0),))
    x = weight(512, 512)
    slow = [lambda *_: next(ticks)]
    assert building._gain(tuple(slow), offer.call(x), x, torch.clone) == pytest.approx(1 / 2)


@pytest.mark.filterwarnings("error")
def test_a_failing_compiler_leaves_the_eager_body_and_its_reason(
    always, monkeypatch, capfd, assert_same_bits
):
    def fails(call, sample):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(building, "_compiled", fails)
    x = weight(1024, 512)
    operation = copying(torch.clone)
    for _ in range(2):
        assert_same_bits(operation(x), x)
    (state,) = compiled.states()
    assert state.reason == "it could not be compiled here: RuntimeError: no compiler was found"
    assert capfd.readouterr() == ("", "")


def test_other_threads_go_on_while_one_compiles(always, monkeypatch, assert_same_bits):
    compiling, may_end = threading.Event(), threading.Event()

    def waits(call, sample):
        compiling.set()
        assert may_end.wait(60)
        return call.program.stages

    monkeypatch.setattr(building, "_compiled", waits)
    monkeypatch.setattr(building, "_gain", lambda *_: 2.0)
    x = weight(1024, 512)
    operation = copying(torch.clone)
    results = []
    thread = threading.Thread(target=lambda: results.append(operation(x)))
    thread.start()
    assert compiling.wait(60)
    assert_same_bits(operation(x), x)  # would never end if it waited
    assert not compiled.states()[0].compiled
    may_end.set()
    thread.join(60)
    assert_same_bits(results[0], x)
    assert compiled.states()[0].compiled


REALLY = """
import multiprocessing, os, sys, threading, warnings
warnings.simplefilter("error")
import torch
from autoq.kernels import fp8, nvfp4, int4, int8, mxfp4, mxfp8, w4a8
from autoq.kernels._torch import compiled
from autoq.kernels._torch.building import awkward_like

def work():
    torch.manual_seed(0)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(600, 1152, dtype=dtype)
        for tensor in (x, awkward_like(x)):
            results += [
                fp8.fake_quantize(tensor, torch.tensor(0.01)),
                fp8.fake_quantize(tensor, scaling=fp8.Scaling.ROW),
                nvfp4.fake_quantize(tensor, torch.tensor(0.002)),
                int8.fake_quantize(tensor),
                mxfp8.fake_quantize(tensor),
                mxfp4.fake_quantize(tensor),
            ]
        scale = int4.group_scale(x, 128)
        results += [int4.fake_quantize(x, scale), w4a8.fake_quantize(x, scale, torch.tensor(0.002))]
    return results

def bits(tensor):
    integer = torch.int16 if tensor.element_size() == 2 else torch.int32
    return tensor.masked_fill(tensor.isnan(), 0.0).view(integer)

def equal(some, others):
    return all(torch.equal(bits(a), bits(b)) and torch.equal(a.isnan(), b.isnan())
               for a, b in zip(some, others, strict=True))

def in_child(_):
    return equal(work(), expected)

os.environ["AUTOQ_CPU_COMPILE"] = "never"
expected = work()
os.environ["AUTOQ_CPU_COMPILE"] = "always"
assert equal(work(), expected)
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
    assert equal(work(), expected)
torch.set_num_threads(2)
assert equal(work(), expected)
torch.set_num_threads(1)
before = len(compiled.states())
assert not multiprocessing.active_children()
assert all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate())
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(in_child, range(4)) == [True] * 4
assert len(compiled.states()) == before
for state in compiled.states():
    print(int(state.compiled), state.name, state.dtype, state.reason, sep="; ")
"""


def really(tmp_path, **environment: str) -> subprocess.CompletedProcess:
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", REALLY],
        env={**os.environ, **settings},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_really_compiled_code_gives_the_same_bits_and_disturbs_nothing(tmp_path):
    result = really(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == 16
    # Slower code is an honest outcome on a machine that does other things meanwhile; failing to
    # compile, or other bits, is not.
    for line in lines:
        assert "as fast as" in line or "as long as" in line, line


@pytest.mark.slow
def test_without_a_compiler_the_eager_body_goes_on_silently(tmp_path):
    result = really(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == 16
    for line in lines:
        assert line.startswith("0") and "could not be compiled here" in line, line
