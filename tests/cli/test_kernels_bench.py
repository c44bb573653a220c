"""The kernel benchmark: what it measures, what it writes, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from autoq.cli import app
from autoq.errors import InputError
from autoq.kernels import benchmark, fp8, int4, nvfp4
from autoq.kernels._benchmark import elementwise, goals, naive, products, timing
from autoq.kernels._benchmark.case import Case, Goal, Prepared
from autoq.kernels._benchmark.timing import Plan, take_turns
from autoq.kernels._torch import building, compiled

CPU = torch.device("cpu")
TINY = benchmark.Sizes(tensors=[(16, 256)], products=[(3, 128, 256)])
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QUICK = Plan(repetitions=3, fewest=3, seconds=10.0, warm_up=1)


class StepTimer:
    """Every repetition takes a second more than the last."""

    def __init__(self) -> None:
        self.now = 0.0

    def seconds(self, work) -> float:
        work()
        self.now += 1.0
        return self.now


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """No second is spent on sizes, repetitions or compiling."""
    monkeypatch.setattr(benchmark, "CPU_SIZES", TINY)
    monkeypatch.setattr(benchmark, "CPU_PLAN", QUICK)
    monkeypatch.setattr(building, "_compiled", lambda call, sample: call.program.stages)
    monkeypatch.setattr(building, "_gain", lambda *_: 2.0)
    monkeypatch.delenv(compiled.POLICY_VARIABLE, raising=False)
    compiled.forget()
    yield
    compiled.forget()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        return CliRunner().invoke(app, ["kernels", "bench", "--device", "cpu", *arguments])

    return run


def case_of(work, **options) -> Case:
    return Case(
        "some.operation",
        "plain",
        {"rows": 4},
        torch.bfloat16,
        prepare=lambda device: Prepared(work, {"copy": lambda: None}, logical_bytes=8 * 10**9),
        **options,
    )


def measured(case: Case) -> list[benchmark.Row]:
    return [row for rows in benchmark.run([case], CPU, QUICK) for row in rows]


def test_the_command_measures_every_operation_and_writes_a_document(bench):
    result = bench("--json", "out.json")
    assert result.exit_code == 0, result.output
    document = json.loads(Path("out.json").read_text())
    assert document["benchmark"] == "autoq kernels"
    assert document["format"] == benchmark.FORMAT
    check_machine(document["machine"])
    rows = document["rows"]
    families = {row["operation"].partition(".")[0] for row in rows}
    assert families == {"fp8", "nvfp4", "int4", "w4a8", "int8", "mxfp8", "mxfp4"}
    for name in ("quantize", "dequantize", "fake_quantize", "linear"):
        assert {row["operation"] for row in rows} >= {f"{family}.{name}" for family in families}
    for row in rows:
        check_row(row)
    assert "measurements" in result.stdout.splitlines()[-1]
    assert "measuring: " in result.stderr


def check_machine(machine) -> None:
    assert machine["device"] == "cpu"
    assert machine["hardware"]
    assert machine["threads"] == 1
    assert machine["driver"] is None
    assert machine["torch"] == torch.__version__
    assert len(machine["date"]) == len("2026-01-31")


def check_row(row) -> None:
    if row["implementation"] == "compiled":
        # A tiny tensor fills no piece: said, and not passed off as compiled.
        assert row["milliseconds"] is None
        assert row["failure"].startswith("EagerBodyError: tensors this small")
        return
    assert row["failure"] is None, row
    assert row["implementation"] == "torch"
    assert row["dtype"] == "bfloat16"
    assert row["milliseconds"] > 0 and row["first_call_milliseconds"] > 0
    assert row["repetitions"] == QUICK.repetitions
    assert row["gigabytes_per_second"] > 0
    is_product = set(row["shape"]) == {"m", "n", "k"}
    assert (row["teraflops"] is not None) is is_product
    assert set(row["baselines"]) >= ({"bf16"} if is_product else {"copy", "clone"})
    for baseline in row["baselines"].values():
        assert baseline["failure"] is None
        ratio = baseline["milliseconds"] / row["milliseconds"]
        assert baseline["ratio"] == pytest.approx(ratio)


def test_only_operations_that_begin_so(bench):
    result = bench("--operation", "int4.de", "--json", "out.json", "--quiet")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("out.json").read_text())["rows"]
    assert {row["operation"] for row in rows} == {"int4.dequantize"}
    assert result.stdout == "1 measurements, 0 not possible here; no goals for this hardware\n"


def test_an_operation_that_is_not_there_is_refused_with_what_is(bench):
    result = bench("--operation", "fp9")
    assert result.exit_code == 2
    assert "no operation begins with 'fp9'; known: fp8.quantize" in result.stderr


@pytest.mark.parametrize("device", ["tpu", "cuda", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(device, bench):
    if device == "cuda" and torch.cuda.is_available():
        device = "mps"
    result = bench("--device", device)
    assert result.exit_code == 2
    assert "cpu" in result.stderr


def test_threads_are_those_asked_for_and_then_those_before(bench):
    before = torch.get_num_threads()
    bench("--operation", "int4.quantize", "--threads", "2", "--json", "out.json")
    assert json.loads(Path("out.json").read_text())["machine"]["threads"] == 2
    assert torch.get_num_threads() == before


def test_an_interrupt_keeps_what_was_measured(bench, monkeypatch):
    real = benchmark.run

    def interrupted(cases, device):
        yield next(real(cases, device))
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "run", interrupted)
    result = bench("--json", "out.json")
    assert result.exit_code == 130
    assert len(json.loads(Path("out.json").read_text())["rows"]) == 1
    assert "interrupted" in result.stderr


def test_figures_come_from_medians_taken_by_turns(monkeypatch):
    monkeypatch.setattr(benchmark, "timer_for", lambda device: StepTimer())
    (row,) = measured(case_of(lambda: None))
    # Seconds 1, 3, 5 are ours and 2, 4, 6 the copy's.
    assert row.milliseconds == 3000.0
    assert row.gigabytes_per_second == pytest.approx(8 / 3)
    assert row.baselines["copy"].milliseconds == 4000.0
    assert row.baselines["copy"].ratio == pytest.approx(4 / 3)


def test_repetitions_end_with_the_time_for_them_but_not_before_the_fewest():
    plan = Plan(repetitions=100, fewest=4, seconds=0.0, warm_up=2)
    calls = []
    seconds = take_turns(StepTimer(), {"work": lambda: calls.append(1)}, plan)
    assert len(seconds["work"]) == 4
    assert len(calls) == 4 + 2
    plan = Plan(repetitions=100, fewest=1, seconds=5.5, warm_up=0)
    assert len(take_turns(StepTimer(), {"work": lambda: None}, plan)["work"]) == 3  # 1 + 2 + 3


def test_what_comes_before_a_repetition_is_not_timed():
    happened = []
    plan = Plan(repetitions=2, fewest=2, seconds=1.0, warm_up=1)
    before = lambda: happened.append("before")
    take_turns(StepTimer(), {"work": lambda: happened.append("work")}, plan, before)
    assert happened == ["work", "before", "work", "before", "work"]


def test_large_results_lie_in_new_memory():
    timing.give_back_memory()  # at least it does no harm where there is no glibc
    on_cpu, on_gpu = (torch.device(name) for name in ("cpu", "meta"))
    copies = elementwise.copies(2**10, on_cpu), elementwise.copies(2**10, on_gpu)
    assert [sorted(each) for each in copies] == [["clone", "copy"], ["copy"]]
    case = next(iter(elementwise.cases(16, 128)))
    assert case.prepare(on_cpu).before is timing.give_back_memory


@pytest.mark.parametrize(
    "value, reached", [(0.79, "missed"), (0.8, "good"), (0.9, "excellent"), (None, None)]
)
def test_goals_are_reached_by_their_figure(value, reached):
    assert Goal("H200", "copy", 0.8, 0.9).reached(value) == reached


def test_time_is_the_threads_own_where_there_is_one(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", iter([10.0, 12.5]).__next__)
    monkeypatch.setattr(timing.time, "thread_time", iter([1.0, 1.25]).__next__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert timing.HostTimer().seconds(lambda: None) == 0.25
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert timing.HostTimer().seconds(lambda: None) == 2.5


def test_time_on_a_gpu_lies_between_events_after_a_flush(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 64)
    timer = timing.GpuTimer(CPU)
    monkeypatch.setattr(
        timer, "_flush", type("Buffer", (), {"zero_": lambda self: happened.append("flush")})()
    )
    assert timer.seconds(lambda: happened.append("work")) == 0.25
    assert happened == ["flush", "event", "work", "event", "wait"]


def test_goals_hold_on_their_hardware_only(monkeypatch):
    monkeypatch.setattr(benchmark, "timer_for", lambda device: StepTimer())
    on_cpu, on_gpu = Goal("cpu", "copy", 1.0), Goal("H200", "copy", 1.0)
    case = case_of(lambda: None, goals=(on_cpu, on_gpu))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (outcome,) = measured(case)[0].outcomes
    assert outcome.goal is on_cpu
    assert outcome.value == pytest.approx(4 / 3)
    assert outcome.reached == "good"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert measured(case)[0].outcomes == []
    cuda = torch.device("cuda")
    monkeypatch.setattr(benchmark, "machine", lambda device: {"hardware": "NVIDIA H200"})
    assert [goal for goal in case.goals if benchmark.goal_filter(cuda)(goal)] == [on_gpu]
    monkeypatch.setattr(benchmark, "machine", lambda device: {"hardware": "NVIDIA H100"})
    assert [goal for goal in case.goals if benchmark.goal_filter(cuda)(goal)] == []


def test_goals_of_products_are_for_the_shapes_that_they_name():
    (goal,) = goals.of_product("fp8.matmul", "row", 8192, 8192, 8192)
    assert (goal.figure, goal.good, goal.excellent) == ("teraflops", 1200.0, 1350.0)
    assert goals.of_product("fp8.matmul", "row", 8192, 28672, 8192) == ()
    assert goals.of_product("w4a8.linear", "input by row", 64, 8192, 8192)[0].good == 1.4
    assert goals.of_product("w4a8.linear", "input by row", 8192, 8192, 8192) == ()
    names = {(product.operation, product.variant) for product in products.PRODUCTS}
    assert ("nvfp4.linear", "input as it is") in names
    assert goals.of_product("nvfp4.linear", "input as it is", 16, 8192, 8192)[0].excellent == 3.0


def test_what_fails_costs_only_itself(monkeypatch):
    def fails():
        raise RuntimeError("not on\nthis device")

    (row,) = measured(case_of(fails))
    assert row.failure == "RuntimeError: not on this device"
    assert row.milliseconds is None
    assert row.baselines["copy"].milliseconds is not None
    assert row.baselines["copy"].ratio is None

    def cannot_prepare(device):
        raise torch.OutOfMemoryError("too large")

    case = Case("some.operation", "plain", {"rows": 4}, torch.bfloat16, prepare=cannot_prepare)
    (row,) = measured(case)
    assert row.failure == "OutOfMemoryError: too large"
    assert row.shape == {"rows": 4}


def test_the_compiled_body_is_measured_beside_the_eager_one():
    case = next(case for case in elementwise.cases(1024, 512) if case.compiles)
    eager, fused = measured(case)
    assert (eager.implementation, fused.implementation) == ("torch", "compiled")
    assert fused.failure is None
    assert fused.milliseconds > 0
    assert compiled.states()[0].elements_compiled == 512 * 1024 * (1 + QUICK.repetitions + 1)


def test_a_compiled_body_that_was_refused_is_not_measured(monkeypatch):
    monkeypatch.setattr(building, "_gain", lambda *_: 0.5)
    case = next(case for case in elementwise.cases(1024, 512) if case.compiles)
    eager, fused = measured(case)
    assert eager.milliseconds > 0
    assert fused.milliseconds is None
    assert "2.00 times as long as the eager body" in fused.failure


def test_copies_move_as_many_bytes_as_the_operation(monkeypatch):
    prepared = {
        (case.operation, case.variant): case.prepare(CPU) for case in elementwise.cases(256, 512)
    }
    count = 256 * 512
    assert prepared["fp8.fake_quantize", "row"].logical_bytes == 4 * count
    assert prepared["fp8.quantize", "row"].logical_bytes == 3 * count + 4 * 256
    assert prepared["nvfp4.dequantize", "global scale given"].logical_bytes == (
        2 * count + count // 2 + count // 16 + 4
    )
    source = prepared["fp8.fake_quantize", "row"].baselines["clone"]()
    assert source.nbytes == 2 * count  # read once, written once


def test_naive_code_gives_the_kernels_numbers(assert_same_values):
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, :32] = torch.linspace(-6, 6, 32).bfloat16()
    scale = torch.tensor(0.01)
    codes = naive.fp8_quantize(x, scale)
    assert_same_values(naive.fp8_dequantize(codes, scale, x.dtype), fp8.fake_quantize(x, scale))
    for scale in (torch.tensor(0.002), torch.tensor(1 / 448)):
        values = naive.nvfp4_dequantize(*naive.nvfp4_quantize(x, scale), scale, x.dtype)
        assert_same_values(values, nvfp4.fake_quantize(x, scale))
        assert torch.equal(naive.nvfp4_quantize(x, scale)[0], nvfp4.quantize(x, scale).codes)
    scales = int4.group_scale(x)
    values = naive.int4_dequantize(naive.int4_quantize(x, scales), scales, x.dtype)
    assert_same_values(values, int4.fake_quantize(x, scales))


@pytest.fixture
def assert_same_values():
    def check(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    return check


def test_the_product_beside_which_gpus_are_measured_is_the_same_product():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator).bfloat16() for rows in (16, 32))
    ours = fp8.matmul(fp8.quantize(x), fp8.quantize(weight), out_dtype=torch.bfloat16)
    # Both round one float32 sum to bfloat16; a sum in another order moves it by an ulp at most.
    torch.testing.assert_close(products.scaled_mm(x, weight)(), ours, rtol=2**-7, atol=2**-7)


def test_committed_results_have_the_format_of_today_and_name_no_place():
    files = sorted(RESULTS.glob("kernels-*.json"))
    assert files
    for file in files:
        text = file.read_text()
        document = json.loads(text)
        assert document["benchmark"] == "autoq kernels"
        assert document["format"] == benchmark.FORMAT
        assert set(document["machine"]) == set(benchmark.machine(CPU))
        assert "/" not in document["machine"]["hardware"]
        assert "/home" not in text and "/root" not in text and "/tmp" not in text


def test_an_unknown_prefix_is_an_input_error():
    with pytest.raises(InputError, match="no operation begins with 'x'"):
        benchmark.cases(TINY, "x")
