"""Sensitivity, costs, the optimisation problem and its solutions."""

from autoq.search._types import CostTable, Plan, SensitivityTable
from autoq.search.costs import (
    build_cost_table,
    effective_bits,
    peer_effective_bits,
    refusals,
    stored_bits_per_weight,
    stored_bytes,
)
from autoq.search.frontier import frontier
from autoq.search.rules import Rule, apply_rules, parse_rule
from autoq.search.solver import plan_from_assignment, reachable_bits, solve, uniform_plan

__all__ = [
    "CostTable",
    "Plan",
    "Rule",
    "SensitivityTable",
    "apply_rules",
    "build_cost_table",
    "effective_bits",
    "frontier",
    "parse_rule",
    "peer_effective_bits",
    "plan_from_assignment",
    "reachable_bits",
    "refusals",
    "solve",
    "stored_bits_per_weight",
    "stored_bytes",
    "uniform_plan",
]
