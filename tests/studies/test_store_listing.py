"""`autoq list`: what it shows, and that it loads little to show it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

from autoq.api.budgets import BYTES_PER_GB, MILLISECONDS_PER_SECOND
from autoq.search import Budget, Plan, Resource
from autoq.studies import listing
from autoq.studies.records import WorkStatus

PLAN = Plan(
    assignment={"layers.0.qkv": "nvfp4"},
    budget_bits=4.8,
    effective_bits=4.5,
    peer_effective_bits=4.5,
    stored_bits_per_weight=4.5,
    stored_bytes=100,
    predicted_loss=0.5,
    predicted_loss_interval=(0.25, 1.0),
    bound=0.5,
    gap=0.0,
)


def test_units_are_those_of_the_budgets():
    assert listing.BITS == Resource.EFFECTIVE_BITS
    assert listing.UNITS == {
        Resource.STORED_BYTES: (BYTES_PER_GB, "GB"),
        Resource.ACTIVE_BITS: (1.0, "active bits"),
        Resource.LATENCY: (1 / MILLISECONDS_PER_SECOND, "ms"),
        "kl_divergence": (1.0, "KL"),
    }


def test_an_entry_has_the_budgets_that_somebody_asked_for(store, make_study):
    study = make_study()
    bytes_budget = (Budget(resource=Resource.STORED_BYTES, limit=2.5e9),)
    latency = (Budget(resource=Resource.LATENCY, limit=0.003),)
    store.add_plan(study.id, PLAN, label="4.8 bits")
    store.add_plan(study.id, replace(PLAN, budgets=bytes_budget), label="2.5 GB")
    store.add_plan(
        study.id, replace(PLAN, budgets=latency), label="quality", details={"max_kl": 0.5}
    )
    store.add_plan(study.id, replace(PLAN, budget_bits=7), label="uniform fp8")
    store.add_plan(study.id, replace(PLAN, budget_bits=8), label="validation 3")
    store.add_plan(study.id, replace(PLAN, budget_bits=9), label="x", details={"refinement": "r"})
    make_study(name="empty", key="e" * 64)
    first, second = listing.list_entries(store)
    assert first["budgets"] == [4.8]
    assert first["other_budgets"] == ["0.5 KL", "3 ms", "2.5 GB"]
    assert (first["name"], first["status"], first["exports"]) == ("demo", "todo", 0)
    assert (second["name"], second["budgets"]) == ("empty", [])


def test_the_newest_are_those_that_were_worked_on_last(store, make_study):
    studies = [make_study(name=f"s{number}", key=f"{number:064x}") for number in range(4)]
    for study in studies:
        store.add_plan(study.id, replace(PLAN, budget_bits=study.id + 4.0), label="plan")
    store.set_status(studies[0].id, WorkStatus.DONE)  # the oldest, and the last worked on
    entries = listing.list_entries(store, newest=2)
    assert [entry["name"] for entry in entries] == ["s0", "s3"]
    everything = listing.list_entries(store)
    assert entries == [everything[0], everything[3]]
    assert store.count_studies() == 4


PROBE = """
import sys
sys.argv = ["autoq", "list", "--store", sys.argv[1]]
from autoq.cli import main
try:
    main()
finally:
    loaded = {"torch", "numpy", "transformers", "alembic", "optuna"} & set(sys.modules)
    print("loaded:", sorted(loaded))
"""


def test_the_command_loads_nothing_heavy(store, store_path, make_study):
    make_study()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(store_path)], capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
    assert done.stdout.endswith("loaded: []\n")


def listed(store_path, *options):
    command = [sys.executable, "-m", "autoq", "list", "--store", str(store_path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_part_of_a_long_list_is_shown_and_json_has_all(store, store_path, make_study):
    for number in range(51):
        make_study(name=f"study{number}", key=f"{number:064x}")
    shown = listed(store_path)
    assert "study0 " not in shown.stdout
    assert "study50 " in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("50 of 51 studies, ")
    everything = listed(store_path, "--all").stdout
    assert "study0 " in everything
    assert "of 51" not in everything
    assert len(json.loads(listed(store_path, "--json").stdout)["studies"]) == 51
    (last,) = json.loads(listed(store_path, "--json", "--limit", "1").stdout)["studies"]
    assert last["name"] == "study50"


def test_all_and_a_limit_exclude_each_other(store, store_path):
    refused = listed(store_path, "--all", "--limit", "3")
    assert refused.returncode == 2
    assert "--all and --limit 3 exclude each other" in refused.stderr
