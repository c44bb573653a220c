"""pyproject.toml and constraints.txt agree."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    """Package -> version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(equals for _, equals, _ in parts), "every line pins one version with =="
    return {canonicalize_name(name): version for name, _, version in parts}


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, in all extras, except autoq itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    return [entry for entry in map(Requirement, lines) if entry.name != project["name"]]


def test_every_requirement_has_a_pin_that_meets_it() -> None:
    pinned = pins()
    unmet = [
        str(entry)
        for entry in requirements()
        if not entry.specifier.contains(pinned.get(canonicalize_name(entry.name), "0"))
    ]
    assert not unmet, "add or raise the pins in constraints.txt"


def test_pins_hold_on_every_machine() -> None:
    local = {
        name: version for name, version in pins().items() if not re.fullmatch(r"[\w.]+", version)
    }
    assert not local, "a version such as 1.0+cpu exists on some machines only"


def test_torch_and_triton_are_the_pair_that_resolves_with_and_without_cuda() -> None:
    # torch's CUDA builds pin triton exactly: 2.13.0 goes with 3.7.1 only.
    assert (pins()["torch"], pins()["triton"]) == ("2.13.0", "3.7.1")
