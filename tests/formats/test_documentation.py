"""The page on formats has a row for each of them, and says what the containers hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoq.export._layouts import LAYOUTS
from autoq.formats import FORMATS, NONE, Container

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def rows(heading: str) -> dict[str, list[str]]:
    """Format -> the cells after its name, of the table under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {name.strip().strip("`"): [cell.strip() for cell in cells] for name, *cells in lines}


def test_every_format_has_a_row_in_both_tables() -> None:
    assert set(rows("What a layer computes with")) == set(FORMATS)
    assert set(rows("How containers hold it")) == set(FORMATS) - {NONE}


@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_the_formats(name: str) -> None:
    bits = rows("What a layer computes with")[name][3]
    assert float(bits.partition(" + ")[0]) == pytest.approx(FORMATS[name].nominal_bits, abs=5e-4)


@pytest.mark.parametrize("container", Container)
@pytest.mark.parametrize("name", sorted(set(FORMATS) - {NONE}))
def test_containers_are_described_as_they_are_written(name: str, container: Container) -> None:
    cell = rows("How containers hold it")[name][list(Container).index(container)]
    layout = LAYOUTS.get((container, FORMATS[name].name))
    if layout is None:
        assert cell.startswith("no: ")
        return
    key = "quant_algo" if container is Container.MODELOPT else "format"
    assert cell.startswith(f"`{layout.manifest[key]}`: ")
