"""What other GPUs than the owner's have free, asked in a process of its own.

In the owner's process the question would leave a CUDA context on each of them, hundreds of megabytes,
for as long as the search takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from autoq.api.preflight import asking_gpus

PATIENCE_SECONDS = 30.0
"""torch's import takes a few of them, and so may a context on each of eight GPUs."""


def free_bytes_of_gpus(names: Sequence[str]) -> Mapping[str, int] | None:
    """Bytes by device, less what a process's context takes there; None where they cannot be had.

    Args:
        names: as torch has them, such as "cuda:1"; the process sees the same GPUs.
    """
    if not names:
        return {}
    command = [sys.executable, "-P", asking_gpus.__file__, *names]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
        return {name: int(answer[name]) for name in names}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, KeyError, TypeError):
        return None
