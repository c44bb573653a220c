"""Print what the Ray cluster at an address has, as JSON; run as a file, and loads nothing but Ray."""

import importlib
import json
import platform
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

NOBODY = "nobody"


def answer(address: str) -> dict[str, Any]:
    """Its machines, or why nobody answers there."""
    ray: Any = importlib.import_module("ray")  # types of which are half there
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        return {NOBODY: str(error).splitlines()[0] if str(error) else type(error).__name__}
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return {
        "machines": [_machine(node["Resources"]) for node in nodes],
        "is_this_machine": {node["NodeManagerHostname"] for node in nodes} == {platform.node()},
    }


def _machine(resources: Mapping[str, float]) -> dict[str, float]:
    return {
        "cores": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "memory_bytes": int(resources.get("memory", 0)),
    }


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # Ray says this and that
        found = answer(sys.argv[1])
    print(json.dumps(found))
