"""What the store's tests share: a store on disk, a study in it, and child processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autoq.studies import StudyStore


@pytest.fixture
def store_path(tmp_path):
    return tmp_path / "autoq.db"


@pytest.fixture
def store(store_path):
    with StudyStore.open(str(store_path)) as opened:
        yield opened


@pytest.fixture
def make_study(store):
    def make(name="demo", key="a" * 64, **changes):
        values = {
            "model_path": "models/tiny",
            "fingerprint": "f" * 64,
            "architecture": "LlamaForCausalLM",
            "configuration": {"bits": 4.8, "formats": ["fp8", "nvfp4"]},
            "versions": {"autoq": "0.1.0"},
            "seed": 7,
        }
        return store.create_or_get(name=name, key=key, **{**values, **changes})

    return make


@pytest.fixture
def study_id(make_study):
    return make_study().id


@pytest.fixture
def start_child(store_path):
    """Run a script in a process of its own; its sys.argv holds the store, then `arguments`."""
    children = []

    def start(script, *arguments):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(store_path), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()
