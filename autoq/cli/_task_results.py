"""What evaluation tasks gave, as tables and as an exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import typer

from autoq.cli._failures import INPUT, one_line


def print_tasks(found: Mapping[str, Any]) -> None:
    """The tasks' metrics, beside the original's where they were measured."""
    for run in found.get("tasks") or []:
        examples = sum(run["examples"].values())
        typer.echo(f"{run['task']} ({_versions(run['versions'])}{examples} examples):")
        for name, entry in run["metrics"].items():
            typer.echo(f"  {_name(name, run['task'])}: {_figures(entry)}")


def _versions(versions: Mapping[str, Any]) -> str:
    said = sorted({str(version) for version in versions.values() if version is not None})
    return f"version {', '.join(said)}, " if said else ""


def _name(name: str, task: str) -> str:
    return name.removeprefix(f"{task}.").replace("_", " ")


def _figures(entry: Mapping[str, Any]) -> str:
    text = f"{entry['value']:.4f}"
    low, high = entry.get("low"), entry.get("high")
    if low is not None and high is not None and math.isfinite(low + high):
        text += f" (95 %: {low:.4f} to {high:.4f})"
    if entry.get("original") is not None:
        text += f", original {entry['original']:.4f}"
    difference = entry.get("difference")
    if difference is not None:
        text += f", difference {difference['value']:+.4f} ({difference['verdict']})"
    return text


def end_after_failed_tasks(found: Mapping[str, Any]) -> None:
    """One line on standard error for each task that did not run, and exit code 2 if there is one."""
    failures = found.get("task_failures") or []
    for failure in failures:
        typer.echo(f"error: {one_line(failure['error'])}", err=True)
    if failures:
        raise typer.Exit(INPUT)
