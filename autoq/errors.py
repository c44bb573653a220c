"""The exception tree, drawn for whoever catches.

::

    AutoqError                     anything autoq refuses or fails at, with a one-line message
    ├── InputError                 what the user gave breaks a rule (exit code 2)
    │   ├── UnknownNameError       a name that no registry or store knows
    │   ├── ModelError             the model folder cannot be read or holds unusable weights
    │   ├── DataError              calibration or evaluation data cannot be used
    │   ├── BudgetInfeasibleError  no assignment of the allowed formats fits
    │   ├── ResourceInfeasibleError  the same for bytes, latency, or several budgets at once
    │   ├── QualityInfeasibleError  no plan loses as little as asked for
    │   └── ExportError            the container cannot express it, or the output cannot be written
    ├── EvaluationError            this model has no such number: fails one trial, not the others
    ├── StudyLockedError           another process works on the study
    ├── StoreError                 the study store cannot be opened, read or written
    └── VerificationError          what was written does not read back as what was searched

Messages say the rule, the value that broke it, and what to do.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_CEILING, Context

_PRINTED_DIGITS = 6


def rounded_up(value: float) -> str:
    """A number in six digits that is no less than the value: copied as a limit, it holds."""
    if not math.isfinite(value):
        return str(value)
    printed = Context(prec=_PRINTED_DIGITS, rounding=ROUND_CEILING).create_decimal_from_float(value)
    return f"{float(printed):.{_PRINTED_DIGITS}g}"


_PASSWORD = re.compile(r"(?<=://)([^:/?#]*):.*@|([?&](?:ssl)?password=)[^&]*", re.DOTALL)


def without_password(url: str) -> str:
    """A database's URL as messages and pages may show it; what is no URL stays as it is."""
    return _PASSWORD.sub(
        lambda match: f"{match[1]}:***@" if match[2] is None else f"{match[2]}***", url
    )


class AutoqError(Exception):
    """Base of everything autoq raises on purpose.

    `said` is the sentence of a server that raised it elsewhere, which may know more than the
    arguments here: where it is set, it is the message.
    """

    said: str | None = None

    def __str__(self) -> str:
        return super().__str__() if self.said is None else self.said


class InputError(AutoqError, ValueError):
    """What the user gave breaks a rule."""


class UnknownNameError(InputError, KeyError):
    """A name that no registry or store knows; the message lists near misses."""

    def __str__(self) -> str:
        # KeyError would show the message quoted.
        return self.said or (str(self.args[0]) if self.args else "")


class ModelError(InputError):
    """The model folder cannot be read, or holds weights that cannot be quantised."""


class DataError(InputError):
    """Calibration or evaluation data cannot be used."""


class BudgetInfeasibleError(InputError):
    """No assignment of the allowed formats fits the budget."""

    def __init__(self, budget_bits: float, floor_bits: float, ceiling_bits: float) -> None:
        super().__init__(budget_bits, floor_bits, ceiling_bits)
        self.budget_bits = budget_bits
        self.floor_bits = floor_bits
        self.ceiling_bits = ceiling_bits

    def __str__(self) -> str:
        return self.said or (
            f"a budget of {self.budget_bits:g} effective bits is outside what the allowed formats "
            f"reach: from {self.floor_bits:.4f} (every group in its smallest format) to "
            f"{self.ceiling_bits:.4f} (every group in its largest); choose a budget in that range, "
            "or change --formats or --rule"
        )


class ResourceInfeasibleError(InputError):
    """No plan takes as little of a resource as asked for, alone or within the other budgets.

    `limit` and `least` are in the resource's own unit; `within` holds the budgets that the least
    value depends on, as text, and is empty where the budget cannot be met on its own.
    """

    def __init__(
        self, resource: str, limit: float, least: float, texts: tuple[str, str], within: str = ""
    ) -> None:
        super().__init__(resource, limit, least, texts, within)
        self.resource = resource
        self.limit = limit
        self.least = least
        self.texts = texts  # limit and least value with their unit
        self.within = within

    def __str__(self) -> str:
        if self.said is not None:
            return self.said
        limit, least = self.texts
        if not self.within:
            return (
                f"a budget of {limit} is below the least that the allowed formats reach, {least}; "
                "raise it, or change --formats or --rule"
            )
        return (
            f"a budget of {limit} cannot be met together with {self.within}, though each can be "
            f"alone: the least within them is {least}; raise one of them, or change --formats or "
            "--rule"
        )


class QualityInfeasibleError(InputError):
    """No plan loses as little as asked for."""

    def __init__(
        self, loss_limit: float, best_loss: float, within: str = "", measured: bool = False
    ) -> None:
        super().__init__(loss_limit, best_loss, within, measured)
        self.measured = measured  # the real divergence of plans, not their predicted loss
        self.loss_limit = loss_limit
        self.best_loss = best_loss
        self.within = within  # the budgets that the best loss depends on, as text

    def __str__(self) -> str:
        if self.said is not None:
            return self.said
        where = f"within {self.within}" if self.within else "with the allowed formats"
        quality = "a measured KL divergence" if self.measured else "a predicted loss"
        return (
            f"{quality} of at most {self.loss_limit:g} cannot be reached {where}: the best "
            f"reachable is {rounded_up(self.best_loss)}; raise the limit or the budgets, or change "
            "--formats or --rule"
        )


class ExportError(InputError):
    """The container cannot express the plan, or the output cannot be written."""


class EvaluationError(AutoqError):
    """A model has no value of a metric, for example because its output is NaN."""


class StudyLockedError(AutoqError):
    """Another process works on the study."""


class StoreError(AutoqError):
    """The study store cannot be opened, read or written."""


class VerificationError(AutoqError):
    """What was written does not read back as what was searched."""
