"""Whoever only reads studies waits neither for torch nor for what else is heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from autoq.studies import StudyStore
from autoq.testing.synthetic_study import add_synthetic_study

_HEAVY = ("torch", "transformers", "optuna", "matplotlib", "pandas", "ray", "lm_eval")

_STUDY = """
from autoq import list_studies, open_study
from autoq.report import render_html, report_data

study = open_study("light", url)
for bits in (4.6, 5.5, 7.25):
    study.solve(bits)
study.uniform("fp8")
study.solve(max_kl=0.5)
plans = study.frontier(5)
page = render_html(report_data(study.summary(), plans))
assert "model.layers.0.self_attn.qkv" in page
assert list_studies(url)[0]["name"] == "light"
"""

_READER = """
from autoq.service.reading.reader import StudyReader
from autoq.studies import StudyStore
from autoq.wire import PlanRequest

reader = StudyReader(StudyStore.open(url), str)
assert reader.studies(5).total == 1
for bits in (4.6, 5.5, 7.25):
    reader.solve("light", PlanRequest(effective_bits=bits))
reader.solve("light", PlanRequest(effective_bits=5.0, keep=True))
reader.solve("light", PlanRequest(max_latency_ms=50.0, gpu="h200", max_gb=0.2))
reader.detail("light"), reader.frontier("light", 5), reader.sensitivities("light")
reader.trials("light", 5), reader.exports("light")
assert "model.layers.0" in reader.report("light")
"""


@pytest.mark.parametrize("work", [_STUDY, _READER], ids=["study", "reader"])
def test_reading_a_study_loads_nothing_heavy(tmp_path: Path, work: str) -> None:
    url = f"sqlite:///{tmp_path}/autoq.db"
    with StudyStore.open(url) as store:
        add_synthetic_study(store, groups=10, formats=4, sequences=3, name="light")
    probe = f"url = {url!r}\n{work}\nimport sys\nprint(*(set(sys.modules) & {set(_HEAVY)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
