"""Every cell of docs/support.md: families run for real, and what came of it stands in the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoq.layers import Container
from autoq.testing._family_settings import FAMILY_SETTINGS
from autoq.testing.architectures import FAMILIES, Family, columns, remarks, row, run_family

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
QUICK = ("llama4", "whisper", "gpt2")
"""One of each kind that is particular: experts and parts left out, features, no nn.Linear."""


def check(family: Family, folder: Path) -> None:
    cells = run_family(family.name, folder)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for container in Container:
        assert row(family, container, cells) in lines
    said = [line for line in lines if line.startswith((f"- {family.title}:", f"- {family.title},"))]
    assert said == remarks(family, cells)


@pytest.mark.parametrize("name", QUICK)
def test_quick_families_do_what_the_page_says(name: str, tmp_path: Path) -> None:
    check(next(family for family in FAMILIES if family.name == name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name not in QUICK], ids=lambda family: family.name
)
def test_every_family_does_what_the_page_says(family: Family, tmp_path: Path) -> None:
    check(family, tmp_path)


def test_the_page_has_every_family_and_every_format_once() -> None:
    assert {family.name for family in FAMILIES} == set(FAMILY_SETTINGS)
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for family in FAMILIES:
        assert sum(line.startswith(f"| {family.title} |") for line in lines) == len(Container)
    heads = [line for line in lines if line.startswith("| Models |")]
    for container, head in zip(Container, heads, strict=True):
        names = [cell.strip() for cell in head.strip("|").split("|")][1:]
        assert names == columns(container)
