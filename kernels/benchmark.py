"""How fast the kernels are here, beside what else could be called, in one run.

Every figure is the median of repetitions that all contenders take by turns; on a CPU with one
thread it is processor time, so that other work on the machine hardly counts. Element-wise
operations are compared with a copy that reads and writes as many bytes, matrix products with
torch's own. A ratio is the baseline's time over ours: above 1 ours is faster. Goals are evaluated
on the hardware that they are for, and nothing is said about any other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from autoq.errors import InputError
from autoq.kernels import dispatch
from autoq.kernels._benchmark import elementwise, products
from autoq.kernels._benchmark.case import Case, Goal, Prepared, Work
from autoq.kernels._benchmark.machine import machine
from autoq.kernels._benchmark.timing import Plan, Timer, take_turns, timer_for
from autoq.kernels._torch import compiled
from autoq.kernels._torch.compiled import Policy, State
from autoq.kernels.dispatch import Implementation

FORMAT = 1
"""Of the JSON document; a change that readers notice counts it up."""

_LONGEST_REASON = 300

GoalFilter = Callable[[Goal], bool]


class EagerBodyError(Exception):
    """What should have been measured compiled was not."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What shapes to measure."""

    tensors: Sequence[tuple[int, int]]
    """(rows, columns) of element-wise operations."""
    products: Sequence[tuple[int, int, int]]
    """(m, n, k) of an input [m, k] and a weight [n, k]."""


CPU_SIZES = Sizes(tensors=[(4096, 4096)], products=[(1, 1024, 1024), (64, 1024, 1024)])
"""Small enough for two minutes on one thread."""

_LLAMA_70B = [(8192, 8192), (28672, 8192), (8192, 28672), (10240, 8192)]
GPU_SIZES = Sizes(
    tensors=[(8192, 8192), (28672, 8192)],
    products=[(m, n, k) for n, k in _LLAMA_70B for m in (1, 16, 64, 8192)],
)
"""The weights of a model with 70 billion, in decoding and in prefill."""

CPU_PLAN = Plan(repetitions=15, fewest=3, seconds=0.5, warm_up=1)
GPU_PLAN = Plan(repetitions=25, fewest=20, seconds=2.0, warm_up=5)


@dataclass(frozen=True, slots=True)
class Baseline:
    """Something to compare with, measured in the same turns."""

    milliseconds: float | None
    ratio: float | None
    """Its time over ours."""
    failure: str | None = None
    """Why it could not be measured."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal, and whether it was reached."""

    goal: Goal
    value: float | None
    reached: str | None
    """excellent, good or missed; None where the figure was not measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """One operation at one shape in one implementation."""

    operation: str
    variant: str
    shape: Mapping[str, int]
    dtype: str
    implementation: str
    repetitions: int
    milliseconds: float | None
    first_call_milliseconds: float | None
    """With whatever had to be compiled, or was found compiled by an earlier process."""
    gigabytes_per_second: float | None
    teraflops: float | None
    baselines: Mapping[str, Baseline]
    outcomes: Sequence[Outcome]
    failure: str | None = None
    """Why ours could not be measured."""


def cases(sizes: Sizes, prefix: str = "") -> list[Case]:
    """What to measure.

    Raises:
        InputError: no operation begins with `prefix`.
    """
    every = [case for size in sizes.tensors for case in elementwise.cases(*size)]
    every += [case for size in sizes.products for case in products.cases(*size)]
    chosen = [case for case in every if case.operation.startswith(prefix)]
    if not chosen:
        known = ", ".join(dict.fromkeys(case.operation for case in every))
        raise InputError(f"no operation begins with {prefix!r}; known: {known}")
    return chosen


def run(
    cases: Sequence[Case], device: torch.device, plan: Plan | None = None
) -> Iterator[list[Row]]:
    """Measure, and yield the rows of each case as soon as there are any.

    Args:
        cases: from `cases`.
        device: a CPU, with as many threads as torch has now, or a GPU.
        plan: how often to repeat.

    Raises:
        InputError: the device is not there.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no GPU here; take --device cpu")
    timer = timer_for(device)
    plan = plan or (GPU_PLAN if device.type == "cuda" else CPU_PLAN)
    goals_of = goal_filter(device)
    for case in cases:
        yield _measure(case, device, timer, plan, goals_of)


def document(rows: Sequence[Row], device: torch.device) -> dict[str, object]:
    """The measurement as JSON holds it."""
    return {
        "benchmark": "autoq kernels",
        "format": FORMAT,
        "machine": machine(device),
        "rows": [asdict(row) for row in rows],
    }


def goal_filter(device: torch.device) -> GoalFilter:
    """Which goals are for this hardware."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return lambda goal: goal.hardware == "cpu" and threads == 1
    name = str(machine(device)["hardware"])
    return lambda goal: goal.hardware in name


@dataclass(slots=True)
class _Timed:
    """One contender."""

    work: Work
    first_call_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def _measure(
    case: Case, device: torch.device, timer: Timer, plan: Plan, goals_of: GoalFilter
) -> list[Row]:
    try:
        prepared = case.prepare(device)
    except Exception as error:  # noqa: BLE001  (one case must not cost the others)
        return [_row_of_failure(case, device, reason_of(error))]
    ours = _implementations(case, device, prepared.ours)
    timed = {name: _Timed(work) for name, work in {**ours, **prepared.baselines}.items()}
    for name, contender in timed.items():
        _call_once(name, contender, device)
    able = {name: each.work for name, each in timed.items() if each.failure is None}
    for name, seconds in take_turns(timer, able, plan, prepared.before).items():
        timed[name].seconds = seconds
    baselines = {name: timed[name] for name in prepared.baselines}
    return [_row(case, name, timed[name], baselines, prepared, goals_of) for name in ours]


def _implementations(case: Case, device: torch.device, work: Work) -> dict[str, Work]:
    """Ours, by implementation: on CPUs the eager body, and the compiled one where there is one."""
    if device.type != "cpu":
        return {dispatch.choose(device).implementation.value: work}
    ours: dict[str, Work] = {Implementation.TORCH.value: partial(_under, Policy.NEVER, work)}
    if case.compiles:
        ours[Implementation.COMPILED.value] = partial(_under, Policy.ALWAYS, work)
    return ours


def _under(policy: Policy, work: Work) -> object:
    with compiled.asking_for(policy):
        return work()


def _require_compiled(before: Sequence[State]) -> None:
    """Refuse what the eager body made.

    Raises:
        EagerBodyError: no compiled code was run since `before`.
    """
    known = {(state.name, state.dtype): state for state in before}
    changed = [s for s in compiled.states() if s != known.get((s.name, s.dtype))]
    if not any(_ran(state, known.get((state.name, state.dtype))) for state in changed):
        why = "; ".join(state.reason for state in changed)
        raise EagerBodyError(why or "tensors this small or narrow take the eager body")


def _ran(state: State, before: State | None) -> bool:
    return state.elements_compiled > (before.elements_compiled if before else 0)


def _call_once(name: str, contender: _Timed, device: torch.device) -> None:
    """The first call: its time, and whether there is anything to measure."""
    before = compiled.states()
    started = time.perf_counter()
    try:
        contender.work()
        if name == Implementation.COMPILED:
            _require_compiled(before)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  (one contender must not cost the others)
        contender.failure = reason_of(error)
    contender.first_call_seconds = time.perf_counter() - started


def reason_of(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_LONGEST_REASON]


def _row(
    case: Case,
    implementation: str,
    ours: _Timed,
    baselines: Mapping[str, _Timed],
    prepared: Prepared,
    goals_of: GoalFilter,
) -> Row:
    seconds = ours.median
    gigabytes_per_second = teraflops = None
    if seconds is not None:
        gigabytes_per_second = prepared.logical_bytes / seconds / 1e9
        teraflops = prepared.operations / seconds / 1e12 if prepared.operations else None
    beside = {name: _baseline(each, seconds) for name, each in baselines.items()}
    figures = {name: each.ratio for name, each in beside.items()}
    figures |= {"gigabytes_per_second": gigabytes_per_second, "teraflops": teraflops}
    outcomes = [
        Outcome(goal, figures.get(goal.figure), goal.reached(figures.get(goal.figure)))
        for goal in case.goals
        if goals_of(goal)
    ]
    return Row(
        operation=case.operation,
        variant=case.variant,
        shape=case.shape,
        dtype=str(case.dtype).removeprefix("torch."),
        implementation=implementation,
        repetitions=len(ours.seconds),
        milliseconds=_milliseconds(seconds),
        first_call_milliseconds=_milliseconds(ours.first_call_seconds),
        gigabytes_per_second=gigabytes_per_second,
        teraflops=teraflops,
        baselines=beside,
        outcomes=outcomes,
        failure=ours.failure,
    )


def _baseline(baseline: _Timed, ours_seconds: float | None) -> Baseline:
    seconds = baseline.median
    ratio = None if seconds is None or not ours_seconds else seconds / ours_seconds
    return Baseline(_milliseconds(seconds), ratio, baseline.failure)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000.0 * seconds


def _row_of_failure(case: Case, device: torch.device, reason: str) -> Row:
    """Of a case whose operands could not be made."""
    prepared = Prepared(lambda: None, {}, logical_bytes=0)
    ours = _Timed(prepared.ours, failure=reason)
    name = next(iter(_implementations(case, device, prepared.ours)))
    return _row(case, name, ours, {}, prepared, lambda goal: False)
