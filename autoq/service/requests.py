"""What can be refused of a request at once, and is not left to fail in a job minutes later.

Nothing is loaded for it: names are looked up and paths are resolved. A job resolves them again.
"""

from __future__ import annotations

import difflib

from autoq.api.budgets import Budgets
from autoq.api.config import (
    ScoringConfig,
    parse_calibration,
    parse_container,
    refuse_idle_calibration,
)
from autoq.errors import InputError, UnknownNameError
from autoq.evaluators.objective import ALIASES, parse_objective
from autoq.formats import FORMATS, FormatName, parse_target, portable_formats
from autoq.formats.kv_cache import KV_CACHE_FORMATS
from autoq.search.estimator_names import DEFAULT_ESTIMATOR, ESTIMATOR_NAMES
from autoq.search.rules import parse_rule
from autoq.service.guard.roots import Roots
from autoq.wire import ExportRequest, PlanRequest, RefineRequest, SearchRequest, VerifyRequest

_NOT_SEARCHED = frozenset({"onnx", "tensorrt-llm", "transformers-fp8"})
"""Containers that `autoq export` alone writes."""

_LONGEST_SEQUENCE = 131_072


def check_search(request: SearchRequest, roots: Roots) -> None:
    """
    Raises:
        InputError: a name or a path of the request is not known here, or what it asks for is
            contradictory.
    """
    roots.model(request.model)
    roots.data(request.calibration_data)
    if request.export is not None:
        roots.new_export(request.export)
    if request.target is not None:
        parse_target(request.target)
    if request.container is not None:
        parse_container(request.container)
    for rule in request.rules:
        parse_rule(rule)
    for name in request.kv_formats or ():
        KV_CACHE_FORMATS[name]
    _check_limits(request)
    _check_scoring(request)


def check_export(request: ExportRequest, roots: Roots) -> None:
    """
    Raises:
        InputError: checkpoints cannot be written there or so, or a plan and budgets are given.
    """
    roots.new_export(request.output)
    if request.container is not None and request.container not in _NOT_SEARCHED:
        parse_container(request.container)
    _check_limits(request)
    if request.plan is not None and _limits(request):
        raise InputError(
            "an export is of a stored plan or of the plan for budgets, and both are given; leave "
            "one of them out"
        )


def check_refine(request: RefineRequest) -> None:
    """
    Raises:
        InputError: a limit is on a GPU that is not known, or the objective is none.
    """
    _check_limits(request)
    check_objective(request.objective)


def check_objective(text: str | None) -> None:
    """
    Raises:
        InputError: it is no objective, or has names of evaluation tasks. Those can be files that
            run code, and data that is fetched.
    """
    known = frozenset(ALIASES.values())
    tasks = sorted(parse_objective(text).metrics - known) if text else []
    if tasks:
        raise InputError(
            f"an objective through the service is made of {', '.join(sorted(ALIASES))}, got "
            f"{tasks[0]!r}; evaluation tasks are for the command line, autoq refine --objective"
        )


def check_verify(request: VerifyRequest, roots: Roots) -> None:
    """
    Raises:
        InputError: there is no such checkpoint or target.
    """
    roots.checkpoint(request.checkpoint)
    if request.target is not None:
        parse_target(request.target)


def check_plan(request: PlanRequest) -> None:
    """
    Raises:
        InputError: a limit is on a GPU that is not known, or a rule is none.
    """
    _check_limits(request)
    for rule in request.rules or ():
        parse_rule(rule)


_Limited = SearchRequest | ExportRequest | RefineRequest | PlanRequest


def _check_limits(request: _Limited) -> None:
    limits = _limits(request)
    Budgets(
        effective_bits=limits.get("effective_bits"),
        max_gb=limits.get("max_gb"),
        max_active_bits=limits.get("max_active_bits"),
        max_latency_ms=limits.get("max_latency_ms"),
        max_kl=limits.get("max_kl"),
        gpu=request.gpu,
    )


def _limits(request: _Limited) -> dict[str, float]:
    names = ("effective_bits", "max_gb", "max_active_bits", "max_latency_ms", "max_kl")
    values = {name: getattr(request, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _check_scoring(request: SearchRequest) -> None:
    formats = None if request.formats is None else tuple(map(FormatName, request.formats))
    for name in formats or ():
        FORMATS[name]
    _check_estimator(request.estimator)
    calibration = parse_calibration(request.calibration)
    ScoringConfig(
        formats=portable_formats() if formats is None else formats,
        calibration_sequences=request.calibration_sequences,
        sequence_length=request.sequence_length,
        batch_size=request.batch_size,
        estimator=request.estimator or DEFAULT_ESTIMATOR,
        confidence=request.confidence,
        dtype=request.dtype,
    )
    if formats is not None:
        refuse_idle_calibration(calibration, formats)
    if request.sequence_length > _LONGEST_SEQUENCE:
        raise InputError(
            f"sequence_length must be at most {_LONGEST_SEQUENCE}, got {request.sequence_length}"
        )


def _check_estimator(name: str | None) -> None:
    """The registry itself needs torch; names that a server's plug-ins add are not known here."""
    if name is None or name in ESTIMATOR_NAMES:
        return
    known = sorted(ESTIMATOR_NAMES)
    close = ", ".join(difflib.get_close_matches(name, known, cutoff=0.5))
    hint = f" (did you mean {close}?)" if close else ""
    raise UnknownNameError(f"no estimator named {name!r}{hint}; known: {', '.join(known)}")
