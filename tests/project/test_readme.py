"""The README names everything a user can name."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from autoq.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readme() -> str:
    """The text of README.md."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_lists_every_format(readme: str) -> None:
    missing = [name for name in FORMATS if f"| `{name}` |" not in readme]
    assert not missing, f"add a row to the formats table for {missing}"


def test_readme_states_the_bits_of_every_format(readme: str) -> None:
    rows = {
        line.split("|")[1].strip(" `"): line
        for line in readme.splitlines()
        if line.startswith("| `") and line.split("|")[1].strip(" `") in FORMATS
    }
    for name, entry in FORMATS.items():
        bits = entry.storage_bits(1024, 1024).effective_bits / 1024**2
        assert f" {bits:g} |" in rows[name], f"{name} takes {bits:g} effective bits per weight"


def test_readme_shows_every_command(readme: str) -> None:
    from autoq.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    missing = [name for name in commands if f"autoq {name}" not in readme]
    assert not missing, f"show these commands in the README: {missing}"
