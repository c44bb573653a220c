"""The study that other tests read: a Study opened on it works like any other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autoq import open_study
from autoq.api import Study
from autoq.report import render_html, report_data
from autoq.studies import StudyStore, WorkStatus
from autoq.testing.synthetic_study import add_synthetic_study


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StudyStore]:
    with StudyStore.open(f"sqlite:///{tmp_path}/autoq.db") as opened:
        yield opened


@pytest.fixture
def study(store: StudyStore) -> Study:
    name = add_synthetic_study(store, groups=22, formats=4, sequences=3).name
    return open_study(name, store)


def test_it_is_a_finished_study_with_a_plan_measurements_and_an_export(
    store: StudyStore, study: Study
) -> None:
    assert store.study(study.id).status is WorkStatus.DONE
    summary = study.summary()
    assert summary["budget"] == 4.8
    assert summary["effective_bits"] <= 4.8
    assert len(summary["groups"]) == 22
    assert summary["measured"]["kl_divergence"] > 0
    assert [file["path"] for file in summary["export"]["files"]] == [
        "config.json",
        "model.safetensors",
    ]


def test_more_bits_lose_less(study: Study) -> None:
    losses = [study.solve(bits).predicted_loss for bits in (4.5, 5.0, 6.0)]
    assert losses == sorted(losses, reverse=True)
    assert study.solve(max_gb=0.2).takes["stored_bytes"] <= 0.2e9


def test_its_report_names_every_group(study: Study) -> None:
    page = render_html(report_data(study.summary(), study.frontier(4)))
    assert all(group.name in page for group in study.model_map.groups)


def test_the_seed_decides_the_scores(store: StudyStore, study: Study) -> None:
    same = open_study(
        add_synthetic_study(store, groups=22, formats=4, sequences=3, name="same").name, store
    )
    other = open_study(
        add_synthetic_study(store, groups=22, formats=4, sequences=3, seed=1).name, store
    )
    scores = study.sensitivity.contributions
    assert (same.sensitivity.contributions == scores).all()
    assert (other.sensitivity.contributions != scores).all()


def test_more_formats_than_there_are_are_refused(store: StudyStore) -> None:
    with pytest.raises(ValueError, match="formats at most"):
        add_synthetic_study(store, groups=4, formats=100)


def test_the_optimum_is_proved_without_a_search_of_the_solvers_that_takes_long(
    store: StudyStore,
) -> None:
    # Among a thousand budgets the one whose first good plan is worst.
    name = add_synthetic_study(store, groups=1000, formats=12, seed=2).name
    planner = open_study(name, store).planner()
    assert planner.solve(7.899325877926421, time_limit_seconds=0.0).gap == 0.0
