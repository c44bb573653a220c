"""The `autoq` command.

Results go to standard output, everything else (progress, notes, errors) to standard error.
Exit codes: 0 fine; 1 unexpected; 2 what was given, the store or a place cannot be used, or another
process works on the study; 4 what was written or a compiled kernel is not as it must be; 130
interrupted.
"""

from autoq.cli._app import app, main

__all__ = ["app", "main"]
