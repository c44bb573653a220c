"""A plan as files for other programs: CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("name", "format", "weights", "effective_bits", "predicted_loss", "slots", "reason")


def plan_csv(groups: Sequence[Mapping[str, Any]]) -> str:
    """One line per decision group; its weight slots stand in one cell, separated by blanks.

    Args:
        groups: "groups" of what `Study.summary` gives.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for group in groups:
        cells = {**group, "slots": " ".join(group["slots"])}
        writer.writerow([cells[column] for column in _COLUMNS])
    return text.getvalue()


def plan_json(groups: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """One object: what `about` says of the plan, group -> format, and weight slot -> format."""
    formats = {group["name"]: group["format"] for group in groups}
    slots = {slot: group["format"] for group in groups for slot in group["slots"]}
    return json.dumps({**about, "groups": formats, "assignment": slots}, indent=2, allow_nan=False)
