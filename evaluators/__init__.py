"""Turning a quantised model into named numbers."""

from autoq.evaluators.fidelity import Estimate, Fidelity, measure_fidelity

__all__ = ["Estimate", "Fidelity", "measure_fidelity"]
