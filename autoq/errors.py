"""The exception tree, drawn for whoever catches.

::

    AutoqError                     anything autoq refuses or fails at, with a one-line message
    ├── InputError                 what the user gave breaks a rule (exit code 2)
    │   ├── UnknownNameError       a name that no registry or store knows
    │   ├── ModelError             the model folder cannot be read or holds unusable weights
    │   ├── DataError              calibration or evaluation data cannot be used
    │   ├── BudgetInfeasibleError  no assignment of the allowed formats fits
    │   └── ExportError            the container cannot express it, or the output cannot be written
    ├── StudyLockedError           another process works on the study
    ├── StoreError                 the study store cannot be opened, read or written
    └── VerificationError          what was written does not read back as what was searched

Messages say the rule, the value that broke it, and what to do.
"""

from __future__ import annotations


class AutoqError(Exception):
    """Base of everything autoq raises on purpose."""


class InputError(AutoqError, ValueError):
    """What the user gave breaks a rule."""


class UnknownNameError(InputError, KeyError):
    """A name that no registry or store knows; the message lists near misses."""

    def __str__(self) -> str:
        # KeyError would show the message quoted.
        return str(self.args[0]) if self.args else ""


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
        return (
            f"a budget of {self.budget_bits:g} effective bits is outside what the allowed formats "
            f"reach: from {self.floor_bits:.4f} (every group in its smallest format) to "
            f"{self.ceiling_bits:.4f} (every group in its largest); choose a budget in that range, "
            "or change --formats or --rule"
        )


class ExportError(InputError):
    """The container cannot express the plan, or the output cannot be written."""


class StudyLockedError(AutoqError):
    """Another process works on the study."""


class StoreError(AutoqError):
    """The study store cannot be opened, read or written."""


class VerificationError(AutoqError):
    """What was written does not read back as what was searched."""
