"""Sensitivity, costs, the optimisation problem and its solutions."""

from autoq.search._types import CostTable, Plan, SensitivityTable

__all__ = ["CostTable", "Plan", "SensitivityTable"]
