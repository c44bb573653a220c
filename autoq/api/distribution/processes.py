"""Workers that are processes of this machine, one for each GPU or for a part of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import IO, BinaryIO

from autoq.api.distribution.streams import StreamWorker, serve

_END_SECONDS = 5.0


class ProcessWorker(StreamWorker):
    """A Python of its own; what is said goes through its standard input and output."""

    def __init__(self, name: str, *, device: str, threads: int) -> None:
        """Start the process; it reads the model when it is told which."""
        super().__init__(name, device=device, threads=threads)
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
        )

    @property
    def process(self) -> int:
        """Its number."""
        return self._process.pid

    def _streams(self) -> tuple[BinaryIO, BinaryIO]:
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        return self._process.stdout, self._process.stdin  # type: ignore[return-value]

    def _last_words(self) -> str:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code < 0:  # what it wrote before says nothing of that
            return f"killed by signal {-code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Serve the process that started this one."""
    reader = os.fdopen(os.dup(0), "rb")
    writer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no message
    serve(reader, writer, device="cpu", threads=1)


if __name__ == "__main__":
    main()
