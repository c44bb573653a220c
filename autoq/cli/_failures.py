"""From exceptions to one line on standard error and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import NoReturn, ParamSpec

import typer

from autoq.errors import (
    AutoqError,
    InputError,
    StoreError,
    StudyLockedError,
    VerificationError,
)

P = ParamSpec("P")

UNEXPECTED, INPUT, NOT_RUN, UNVERIFIED, INTERRUPTED = 1, 2, 3, 4, 130
DEBUG_VARIABLE = "AUTOQ_DEBUG"


def exit_code(error: AutoqError) -> int:
    """The exit code that tells programs what kind of failure it was.

    What the user can mend by other input, another place or waiting is 2; a checkpoint that does
    not read back is 4.
    """
    if isinstance(error, InputError | StudyLockedError | StoreError):
        return INPUT
    return UNVERIFIED if isinstance(error, VerificationError) else UNEXPECTED


def debugging() -> bool:
    """Whether the user asked for tracebacks and for the libraries' messages."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def reports_failures(command: Callable[P, None]) -> Callable[P, None]:
    """A command that ends with one line and an exit code instead of a traceback."""

    @wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _say(
                "interrupted: the study keeps what was finished; "
                "run the same command again to continue"
            )
            raise typer.Exit(INTERRUPTED) from None
        except AutoqError as error:
            _end(error, f"error: {one_line(str(error))}", exit_code(error))
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has had enough
                _forget_output()
                raise typer.Exit(0) from None
            _end(error, _system_refusal(error), INPUT)
        except Exception as error:  # noqa: BLE001  (the last line of defence: nothing above it)
            _end(error, _unexpected(error), UNEXPECTED)

    return guarded


def _forget_output() -> None:
    """Send what is still buffered nowhere, so that closing standard output cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: str) -> str:
    """`text` with line breaks and runs of blanks made one blank."""
    return " ".join(text.split())


def _end(error: Exception, line: str, code: int) -> NoReturn:
    _say(line)
    if debugging():
        traceback.print_exception(error)
    raise typer.Exit(code) from None


def _system_refusal(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or one_line(str(error)) or type(error).__name__
    return f"error: {place}{reason}; see that the path exists, can be written and has room"


def _unexpected(error: Exception) -> str:
    return (
        f"error: unexpected {type(error).__name__}: {one_line(str(error))}; "
        f"set {DEBUG_VARIABLE}=1 for the traceback"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)
