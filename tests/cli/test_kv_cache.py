"""What people read about a plan's key/value cache."""

from __future__ import annotations

import io

from rich.console import Console

from autoq.cli._tables import print_summary
from autoq.report import report_data
from tests.cli.conftest import summary_of


def shown(*formats: str) -> str:
    layers = [
        {"name": f"layers.{number}.attn", "format": fmt} for number, fmt in enumerate(formats)
    ]
    cache = {"layers": layers, "bits": 6.8333, "bytes_per_token": 1312.0, "predicted_loss": 1e-3}
    console = Console(file=io.StringIO(), width=120)
    print_summary(console, report_data({**summary_of(), "kv_cache": cache}, []))
    return console.file.getvalue()


def test_one_format_for_all_is_a_line() -> None:
    output = shown("fp8", "fp8")
    (line,) = [line for line in output.splitlines() if "KV cache" in line]
    assert "fp8, 6.833 bits per element, 1,312 bytes per token, predicted loss" in line
    assert "layers.1.attn" not in output


def test_layers_that_differ_are_listed() -> None:
    output = shown("fp8", "nvfp4", "fp8")
    assert "fp8 in 2 layers, nvfp4 in 1 layer, 6.833 bits per element" in output
    (line,) = [line for line in output.splitlines() if "layers.1.attn" in line]
    assert line.split() == ["layers.1.attn", "nvfp4"]


def test_plans_without_a_choice_say_nothing() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_summary(console, report_data(summary_of(), []))
    assert "KV cache" not in console.file.getvalue()
