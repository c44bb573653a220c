"""The command line over an API that answers at once."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import autoq.api.distribution.ranks  # noqa: F401  (of the real one: it stays importable beside the fake)
from autoq.cli import app
from autoq.formats import FormatName
from autoq.models import GroupName
from autoq.search import Plan, Resource


def summary_of(study: str = "llama-ab12", blocks: int = 2) -> dict[str, Any]:
    """A plan's summary as the API gives it."""
    groups = [
        {
            "name": f"model.layers.{block}.{kind}",
            "slots": [f"model.layers.{block}.{kind}"],
            "reason": "decided alone",
            "format": fmt,
            "weights": 4096,
            "effective_bits": 4.5,
            "scores": {"nvfp4": 0.01, "fp8": 0.001},
            "standard_errors": {"nvfp4": math.nan, "fp8": 0.0001},
            "predicted_loss": 0.01,
        }
        for block in range(blocks)
        for kind, fmt in (("self_attn.o_proj", "nvfp4"), ("mlp.down_proj", "fp8"))
    ]
    return {
        "study": study,
        "model": "models/llama",
        "budget": 6.0,
        "budgets": {"effective_bits": 6.0, "stored_bytes": 24e9, "kl_divergence": 0.01},
        "takes": {
            "effective_bits": 5.9375,
            "stored_bytes": 20_340,
            "active_bits": 5.25,
            "latency_seconds": 0.0012346,
        },
        "latency": {"model": "h200", "hardware": "NVIDIA H200 SXM", "tokens": 8},
        "assignment": {group["name"]: group["format"] for group in groups},
        "groups": groups,
        "excluded": [],
        "effective_bits": 5.9375,
        "peer_effective_bits": 5.875,
        "stored_bits_per_weight": 5.96875,
        "stored_bytes": 18336,
        "predicted_loss": 0.0437,
        "predicted_loss_interval": [0.0401, math.inf],
        "bound": 0.0436,
        "gap": 0.0023,
        "unit": "nats_per_token",
        "measured": {"kl_divergence": 0.05, "top1_agreement": 0.9121},
        "measurements": [],
        "timings_s": {"sensitivity": 75.0},
        "peak_rss_bytes": 3 << 20,
        "export": {
            "path": "out",
            "container": "modelopt",
            "stored_bytes": 18336,
            "files": [{"path": "model.safetensors", "bytes": 18336, "sha256": "00"}],
        },
        "configuration": {"formats": ["nvfp4", "fp8"]},
        "versions": {"torch": "2.13.0"},
    }


class FakeStudy:
    """A study with one plan."""

    def __init__(self, api: FakeApi, name: str) -> None:
        self._api = api
        self.name = name

    def summary(self, effective_bits: float | None = None, **limits: Any) -> dict[str, Any]:
        self._api.called("summary", effective_bits=effective_bits, **limits)
        return {
            **summary_of(self.name, self._api.blocks),
            "effective_bits": self._api.bits,
            "least": self._api.least,
        }

    def frontier(self, points: int = 64, *, max_gb: float | None = None) -> list[Plan]:
        self._api.called("frontier", points=points, max_gb=max_gb)
        return [
            Plan(
                assignment={GroupName("model.layers.0.mlp.down_proj"): FormatName("fp8")},
                budget_bits=bits,
                effective_bits=bits,
                peer_effective_bits=bits,
                stored_bits_per_weight=bits,
                stored_bytes=1000,
                predicted_loss=loss,
                predicted_loss_interval=(0.0, math.inf),
                bound=loss,
                gap=0.0,
                takes={Resource.STORED_BYTES: 2e9 * bits},
            )
            for bits, loss in [(4.5, 0.06), (5.9375, 0.0437), (16.0, 0.0)]
        ]

    def export(self, destination: str, **options: Any) -> dict[str, Any]:
        self._api.called("export", destination=destination, **options)
        return {"path": destination, "container": "modelopt", "stored_bytes": 18336, "files": []}


class FakeApi(ModuleType):
    """Stands for `autoq.api`; remembers calls, and fails with `failure` where one is set."""

    def __init__(self) -> None:
        super().__init__("autoq.api")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.failure: BaseException | None = None
        self.names = ["llama-ab12"]
        self.blocks = 2
        self.bits = 5.9375
        self.least: dict[str, Any] | None = None
        self.Study = FakeStudy

    def called(self, name: str, /, **arguments: Any) -> None:
        self.calls.append((name, arguments))
        print("a library talks")
        if self.failure is not None:
            raise self.failure

    def arguments(self, name: str) -> dict[str, Any]:
        return next(arguments for called, arguments in self.calls if called == name)

    def search(self, model: str, *, progress: Any, **options: Any) -> FakeStudy:
        with progress.task("scoring", 4) as advance:
            advance(4)
        progress.note("w4a8_awq is not portable")
        self.called("search", model=model, **options)
        return FakeStudy(self, options["name"] or "llama-ab12")

    def open_study(
        self, name: str | None, store: str, *, trust_remote_code: bool = False
    ) -> FakeStudy:
        self.called("open_study", name=name, store=store)
        return FakeStudy(self, name or self.names[-1])

    def list_studies(self, store: str) -> list[dict[str, Any]]:
        self.called("list_studies", store=store)
        return [
            {
                "name": name,
                "model": "models/llama",
                "status": "done",
                "created": "2026-01-02T03:04:05+00:00",
                "updated": "2026-01-02T03:04:05+00:00",
                "budgets": [4.8, 6.0],
                "other_budgets": ["24 GB", "0.01 KL"],
                "exports": 1,
            }
            for name in self.names
        ]

    def generate(self, path: Path, prompt: str, **options: Any) -> dict[str, Any]:
        self.called("generate", path=path, prompt=prompt, **options)
        return {
            "checkpoint": str(path),
            "prompt": prompt,
            "text": f"{prompt} and so on",
            "new_tokens": 3,
            "seconds": 0.5,
            "device": "cpu",
            "weight_bytes": 3 << 20,
        }

    def evaluate(self, target: str, *, progress: Any, **options: Any) -> dict[str, Any]:
        self.called("evaluate", target=target, **options)
        return {
            "target": target,
            "data": "held-out text",
            "tokens": 512,
            "metrics": {
                "kl_divergence": {"value": 0.05, "low": 0.04, "high": 0.07},
                "top1_agreement": None,
                "perplexity": 12.3,
            },
        }


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    """The API that the commands call."""
    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "autoq.api", fake)
    # `autoq list` does without autoq.api, which loads torch.
    monkeypatch.setattr(
        "autoq.studies.listing.list_entries", lambda s, _newest: fake.list_studies(s.url)
    )
    return fake


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command line in an empty folder that has a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOQ_STORE", raising=False)
    monkeypatch.delenv("AUTOQ_DEBUG", raising=False)
    (tmp_path / "autoq.db").touch()

    def invoke(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(app, list(arguments), **options)

    return invoke


@pytest.fixture(autouse=True)
def no_terminal_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output as wide as into a pipe, wherever the tests run: pytest-xdist sets a width."""
    monkeypatch.delenv("COLUMNS", raising=False)
