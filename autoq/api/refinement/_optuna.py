"""What refinement says to and of Optuna without loading it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from autoq.errors import InputError

SAMPLERS = ("tpe", "gp", "nsga2")

SAMPLER_STATE = "sampler_state"
"""User attribute of a trial: what its sampler wants to find again, as JSON."""


def check_sampler(name: str) -> str:
    """The name.

    Raises:
        InputError: there is no such sampler.
    """
    if name not in SAMPLERS:
        raise InputError(f"no sampler named {name!r}; known: {', '.join(SAMPLERS)}")
    return name


@contextmanager
def few_words() -> Iterator[None]:
    """Without Optuna's lines for every study and trial, and without its warnings."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
