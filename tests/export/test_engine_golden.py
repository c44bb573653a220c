"""What `autoq verify` says of each layer, beside what the engine's own code made of it on a CPU.

`engine_golden/` holds the answers; `make_engine_golden.py` asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from autoq.export._aliases import experts_parent
from autoq.export._layouts import LAYOUTS
from autoq.export._types import Spelling
from autoq.export.checkup import LayerReport, Outcome, check_checkpoint
from autoq.formats import ENGINES, FORMATS, Target, parse_target, support
from autoq.layers import Container
from tests.export.engine_cases import (
    KEYS,
    SOURCE,
    VALUES,
    Case,
    cases,
    damage_of,
    digest,
    write_case,
)

GOLDEN = Path(__file__).resolve().parent / "engine_golden"
ASKED = tuple(sorted(path.stem for path in GOLDEN.glob("*.json")))
VERSIONS = {"vllm": "vLLM 0.33", "sglang": "SGLang 0.5.23"}
"""What the records of support say they hold for, and the answers must be of."""

UNQUANTIZED = "unquantised"
WIDENING = ("Marlin", "Humming", "W8A16", "W4A16")
"""In the names of kernels and schemes that leave inputs as they are."""

REFUSING = {
    "vllm": {"CutlassInt8ScaledMMLinearKernel": 100},
    "sglang": {"CompressedTensorsW8A8Int8": 100},
}
"""Kernels and schemes that are chosen and refuse when called, from a compute capability on.

vLLM's library says "Int8 not supported on SM100. Use FP8 quantization instead, or run on older arch";
sglang-kernel's says "No implemented int8_scaled_mm for current compute capability"; that it says so
from 10.0 on was read in its source.
"""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
INSIDE = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("lm_head", "language_model.lm_head"),
)
"""How engines name what is inside a model with a vision part."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine made of a checkpoint on some hardware."""

    capabilities: tuple[int, ...]
    modules: Mapping[str, str]
    refused: tuple[str, str] | None  # at which stage, and the words
    without_values: tuple[str, ...]
    cache: tuple[str, ...]  # what layers keep keys and values in, and under which scales

    @property
    def refusal(self) -> str | None:
        """Without the list of what there is, which comes in any order."""
        return None if self.refused is None else self.refused[1].partition(" The available ")[0]

    def method(self, module: str) -> str | None:
        """What the engine gave to a module, or to the matrix that it fuses the module into."""
        parent = experts_parent(module)
        if parent is not None:
            return self.modules.get(f"{parent}.routed_experts", self.modules.get(parent))
        head, dot, leaf = module.rpartition(".")
        fused = next((whole for whole, parts in FUSED.items() if leaf in parts), leaf)
        for name in (module, f"{head}{dot}{fused}"):
            for outside, inside in (("", ""), *INSIDE):
                found = self.modules.get(f"{inside}{name.removeprefix(outside)}")
                if found is not None and name.startswith(outside):
                    return found
        return None


@cache
def golden(engine: str) -> Any:
    return json.loads((GOLDEN / f"{engine}.json").read_text())


def answers(engine: str, case: str) -> Iterator[Answer]:
    for capabilities, found in golden(engine)["answers"][case][1:]:
        refused = tuple(found["refused"]) if "refused" in found else None
        modules, without = found.get("modules", {}), tuple(found.get("without values", ()))
        cache = tuple(found.get("cache", ()))
        yield Answer(tuple(capabilities), modules, refused, without, cache)


def is_unquantized(method: str) -> bool:
    return method.startswith("Unquantized")


def expected(method: str, stored: str) -> str:
    """The word that `autoq verify` has for a method and kernel of the engine's."""
    if is_unquantized(method):
        return UNQUANTIZED
    if "Emulation" in method:
        return "emulated"
    leaves_inputs = stored in ("int4_awq", "int8_wo", "nvfp4_wo")
    is_widened = any(word in method for word in WIDENING)
    return "weight-only" if is_widened and not leaves_inputs else "native"


def loads(target: Target, case: Case, answer: Answer, layers: tuple[LayerReport, ...]) -> bool:
    """Whether the engine takes the checkpoint, and takes what is quantised for what it is.

    What it refuses of the model before it was quantised, too, is none of the checkpoint's faults.
    """
    if answer.refused is not None:
        source = [
            answer.refusal for answer in answers(target.engine.name, f"{case.family}/{SOURCE}")
        ]
        if answer.refusal not in source:
            return False
    if any(".attn." not in name and "weight_scale" in name for name in answer.without_values):
        return False  # it skips scales under names that it does not know, and says nothing
    chosen = " ".join(answer.modules.values())
    if any(kernel in chosen for kernel in _refusing(target)):
        return False
    return not any(
        layer.stored != UNQUANTIZED and is_unquantized(answer.method(layer.name) or "")
        for layer in layers
    )


def _refusing(target: Target) -> list[str]:
    known = REFUSING[target.engine.name]
    return [name for name, first in known.items() if (target.hardware.capability or 0) >= first]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Path]:
    folder = tmp_path_factory.mktemp("cases")
    asked = dict.fromkeys(case for engine in ASKED for case in asked_cases(engine))
    return {case: write_case(case, folder / str(case)) for case in asked}


def asked_cases(engine: str) -> list[Case]:
    return [case for case in cases() if str(case) in golden(engine)["answers"]]


@pytest.mark.parametrize("engine", ASKED)
def test_answers_are_of_the_version_that_the_tables_name(engine: str) -> None:
    title = VERSIONS[engine]
    assert ENGINES[engine].title == title
    assert golden(engine)["versions"][engine].startswith(title.rpartition(" ")[2])


@pytest.mark.parametrize("engine", ASKED)
@pytest.mark.parametrize(("container", "fmt"), sorted(LAYOUTS))
def test_every_format_that_is_said_to_run_was_asked_about(
    engine: str, container: Container, fmt: str
) -> None:
    kinds = {
        case.kind
        for case in asked_cases(engine)
        if (case.container, case.format) == (container, fmt) and case.spelling is Spelling.OWN
    }
    targets = [
        parse_target(f"{engine}:sm_{capability}") for capability in (75, 80, 89, 90, 100, 103, 120)
    ]
    is_run = any(support(target, container, FORMATS[fmt].name).verdict.runs for target in targets)
    assert not is_run or kinds >= {"uniform", "mixed"}


@pytest.mark.parametrize("engine", ASKED)
def test_the_engine_was_asked_about_these_checkpoints(
    engine: str, written: dict[Case, Path]
) -> None:
    now = {str(case): digest(written[case]) for case in asked_cases(engine)}
    then = {name: found[0] for name, found in golden(engine)["answers"].items() if name in now}
    assert now == then


@pytest.mark.parametrize(
    ("engine", "case"),
    [(engine, case) for engine in ASKED for case in asked_cases(engine)],
    ids=str,
)
def test_verify_says_what_the_engine_does(
    engine: str, case: Case, written: dict[Case, Path]
) -> None:
    for answer in answers(engine, str(case)):
        for capability in answer.capabilities:
            target = parse_target(f"{engine}:sm_{capability}")
            report = check_checkpoint(written[case], target)
            cache = None if report.cache is None else report.cache.outcomes[str(target)]
            if report.faults:
                assert damage_of(case) is not None
            elif cache is None or cache.does != "refuses":
                _compare(case, target, answer, report.layers)
            if cache is not None:
                has_scales = case.spelling is Spelling.OWN
                _compare_caches(cache, answer, has_scales=has_scales)
            _compare_methods(target, answer, report.layers)


def _compare(case: Case, target: Target, answer: Answer, layers: tuple[LayerReport, ...]) -> None:
    ours = {layer.name: layer.outcomes[str(target)] for layer in layers}
    is_taken = loads(target, case, answer, layers)
    said = {f"{outcome.does}: {outcome.reason}" for outcome in ours.values()}
    assert all(outcome.runs for outcome in ours.values()) == is_taken, (
        target,
        said,
        answer.refused,
    )
    for layer in layers:
        method = answer.method(layer.name)
        if method is None:
            assert answer.refused or layer.stored == UNQUANTIZED, (target, layer.name)
        elif is_taken:
            assert ours[layer.name].does == expected(method, layer.stored), (target, layer, method)
    if is_taken:
        allowed = "input_scale" if case.format == "nvfp4_wo" else "none"  # dropped after loading
        lacking = [name for name in answer.without_values if ".attn." not in name]
        assert all(name.endswith(allowed) for name in lacking), lacking


def _compare_caches(ours: Outcome, answer: Answer, *, has_scales: bool) -> None:
    """That it is kept, as what, and under which scales; half of the largest key is 448 / 2."""
    if not answer.cache:
        assert answer.refused is not None
        assert not ours.runs
        return
    [found] = answer.cache
    kept, _, scales = found.partition(" under ")
    assert ours.runs == kept.startswith(("fp8", "float8")), (ours, found)
    assert scales in ("none", "1, 1", f"{KEYS / 448:g}, {VALUES / 448:g}")
    if ours.runs and has_scales:
        assert ("under a scale of 1" in ours.reason) == (scales == "1, 1"), (ours, found)


def _compare_methods(target: Target, answer: Answer, layers: tuple[LayerReport, ...]) -> None:
    """Of what is quantised and built unquantised nobody may say that it runs, faults or not."""
    for layer in layers:
        method = answer.method(layer.name)
        if layer.stored != UNQUANTIZED and method is not None and is_unquantized(method):
            assert not layer.outcomes[str(target)].runs, (target, layer, method)
