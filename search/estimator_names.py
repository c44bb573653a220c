"""Names of the estimators, which configurations hold; the classes need torch, and names do not."""

DEFAULT_ESTIMATOR = "fisher_projection"
"""The winner of `benchmarks/estimators.py`; docs/method.md has the table."""

ESTIMATOR_NAMES = frozenset(
    {
        "diagonal",
        "factored",
        "fisher_projection",
        "forward_only",
        "quantized_point",
        "sequence_projection",
        "token_projection",
    }
)
"""Those of `autoq.search.estimators.ESTIMATORS` that autoq brings."""
