"""Sensitivity, costs, the optimisation problem and its solutions."""

import importlib
import sys
import types
from typing import Any

from autoq.search._types import (
    Budget,
    CostTable,
    Least,
    Plan,
    Resource,
    SensitivityTable,
)
from autoq.search.costs import (
    build_cost_table,
    effective_bits,
    peer_effective_bits,
    refusals,
    stored_bits_per_weight,
    stored_bytes,
)
from autoq.search.diverse import diverse_plans
from autoq.search.frontier import frontier
from autoq.search.interactions import Interactions, improve, quadratic_loss
from autoq.search.planner import Planner
from autoq.search.rules import Rule, apply_rules, parse_rule
from autoq.search.solver import (
    check_budget,
    plan_from_assignment,
    reachable_bits,
    smallest,
    solve,
    uniform_plan,
)

__all__ = [
    "Budget",
    "CostTable",
    "Interactions",
    "Least",
    "Plan",
    "Planner",
    "Resource",
    "Rule",
    "SensitivityTable",
    "apply_rules",
    "build_cost_table",
    "check_budget",
    "diverse_plans",
    "effective_bits",
    "frontier",
    "improve",
    "parse_rule",
    "peer_effective_bits",
    "plan_from_assignment",
    "quadratic_loss",
    "reachable_bits",
    "refusals",
    "smallest",
    "solve",
    "stored_bits_per_weight",
    "stored_bytes",
    "uniform_plan",
]


class _CallablePackage(types.ModuleType):
    """`autoq.search(...)` is the main job, and `autoq.search` this package: one name for both.

    Importing any module of the package puts it in the place of the function, so it answers calls.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("autoq.api").search(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
