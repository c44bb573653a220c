"""What the reader tells of studies, beside what `Study` says of the same ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autoq import open_study
from autoq.api.budgets import Budgets
from autoq.errors import BudgetInfeasibleError, InputError, UnknownNameError
from autoq.service.pagination import encode_cursor
from autoq.service.problems import Refusal
from autoq.service.reading.reader import StudyReader
from autoq.studies import StudyStore, WorkStatus
from autoq.testing.synthetic_study import add_synthetic_study
from autoq.wire import PlanRequest, StudyStatus


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyStore]:
    with StudyStore.open(f"sqlite:///{tmp_path_factory.mktemp('store')}/autoq.db") as opened:
        for name in ("alpha", "beta", "Gamma"):
            add_synthetic_study(opened, groups=14, formats=5, sequences=3, name=name)
        yield opened


@pytest.fixture
def reader(store: StudyStore) -> StudyReader:
    return StudyReader(store, lambda path: f"shown/{Path(path).name}")


def test_plans_are_those_of_the_study_at_any_budget(
    store: StudyStore, reader: StudyReader, tmp_path: Path
) -> None:
    study = open_study("alpha", store)
    floor, ceiling = study.planner().reachable_bits
    before = len(study.plans())
    for bits in np.random.default_rng(7).uniform(floor, ceiling, 20):
        reply = reader.solve("alpha", PlanRequest(effective_bits=float(bits)))
        plan = study.best(budgets := _bits(float(bits)))
        assert reply.assignment == plan.assignment
        assert reply.predicted_loss == plan.predicted_loss
        assert reply.predicted_loss_interval == plan.predicted_loss_interval
        assert (reply.bound, reply.gap) == (plan.bound, plan.gap)
        assert reply.takes == plan.takes
        assert reply.label == study.label_of(budgets)
        assert reply.budgets == {"effective_bits": float(bits)}
        assert reply.id is None
    assert len(study.plans()) == before


def test_a_plan_that_is_kept_is_the_one_that_was_computed(
    store: StudyStore, reader: StudyReader
) -> None:
    request = PlanRequest(effective_bits=5.5, rules=("*o_proj=fp8",))
    computed = reader.solve("alpha", request)
    kept = reader.solve("alpha", request.model_copy(update={"keep": True}))
    assert kept.id is not None
    assert kept.assignment == computed.assignment
    assert {f for g, f in kept.assignment.items() if g.endswith("o_proj")} == {"fp8"}
    assert reader.solve("alpha", request).id == kept.id  # found, not solved again
    assert reader.plan("alpha", kept.id).label == kept.label == computed.label


def test_limits_of_all_kinds_hold(reader: StudyReader) -> None:
    small = reader.solve("alpha", PlanRequest(effective_bits=6.0, max_gb=0.11))
    assert small.takes["stored_bytes"] <= 0.11e9
    assert small.budgets == {"effective_bits": 6.0, "stored_bytes": 0.11e9}
    fast = reader.solve("alpha", PlanRequest(max_latency_ms=1e3, gpu="h200"))
    assert fast.takes["latency_seconds"] <= 1.0
    faithful = reader.solve("alpha", PlanRequest(max_kl=0.05))
    assert faithful.predicted_loss is not None
    assert faithful.predicted_loss <= 0.05
    assert faithful.budgets == {"kl_divergence": 0.05}


def test_without_budgets_it_is_the_last_plan_with_what_was_measured(reader: StudyReader) -> None:
    plan = reader.solve("beta", PlanRequest())
    assert plan.label == "4.8 bits"
    assert plan.measured is not None
    assert plan.measured["top1_agreement"] == 0.97


def test_refinement_is_taken_where_it_found_a_better_plan(
    store: StudyStore, reader: StudyReader
) -> None:
    study = open_study("Gamma", store)
    start = study.solve(6.0)
    better = study.add_plan("better", study.best(_bits(6.5)), details={"refined_from": start.id})
    study.set_refined(start, better)
    reply = reader.solve("Gamma", PlanRequest(effective_bits=6.0))
    assert (reply.id, reply.refined_from) == (better.id, start.label)


def test_what_cannot_be_had_is_refused_as_the_study_refuses_it(reader: StudyReader) -> None:
    with pytest.raises(BudgetInfeasibleError):
        reader.solve("alpha", PlanRequest(effective_bits=1.0))
    with pytest.raises(UnknownNameError, match="no GPU"):
        reader.solve("alpha", PlanRequest(max_latency_ms=1.0, gpu="abacus"))
    with pytest.raises(InputError, match="must match"):
        reader.solve("alpha", PlanRequest(effective_bits=6.0, rules=("nothing=fp8",)))


def test_what_is_not_there_is_not_found(store: StudyStore, reader: StudyReader) -> None:
    other = open_study("beta", store).plans()[0].id
    asked = (
        lambda: reader.detail("alph"),
        lambda: reader.solve("1", PlanRequest()),
        lambda: reader.frontier("nothing"),
        lambda: reader.sensitivities("nothing"),
        lambda: reader.trials("nothing", 5),
        lambda: reader.exports("nothing"),
        lambda: reader.report("nothing"),
        lambda: reader.plan("alpha", 10_000),
        lambda: reader.plan("alpha", other),
    )
    for ask in asked:
        with pytest.raises(Refusal) as refused:
            ask()
        assert refused.value.kind.name == "not-found"


def test_a_study_without_scores_shows_what_there_is(tmp_path: Path) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/autoq.db") as store:
        reader = StudyReader(store, str)
        record = add_synthetic_study(store, groups=5, formats=2, sequences=2)
        store.reset_stage(record.id, "sensitivity")
        for ask in (reader.frontier, reader.sensitivities, reader.report):
            with pytest.raises(Refusal) as refused:
                ask(record.name)
            assert refused.value.kind.name == "not-finished"
        detail = reader.detail(record.name)
        assert (detail.groups, detail.unit, detail.plan) == (5, None, None)


def test_a_study_that_is_scored_anew_is_read_anew(tmp_path: Path) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/autoq.db") as store:
        reader = StudyReader(store, str)
        first = add_synthetic_study(store, groups=9, formats=3, sequences=2, name="s")
        request = PlanRequest(effective_bits=6.0)
        before = reader.solve("s", request)
        contributions = open_study("s", store).sensitivity.contributions
        payload = store.stage(first.id, "sensitivity")
        assert payload is not None
        store.reset_stage(first.id, "sensitivity")
        store.begin_stage(first.id, "sensitivity")
        store.put_score_batch(first.id, 0, 2 * contributions, 1.0)
        store.finish_stage(first.id, "sensitivity", 1.0, payload.payload)
        after = reader.solve("s", request)
        assert after.predicted_loss == pytest.approx(2 * (before.predicted_loss or 0), rel=1e-12)


@pytest.mark.parametrize(
    ("what", "anew"),
    [
        ("detail", False),
        ("solve", False),
        ("frontier", False),
        ("solve", True),
        ("sensitivities", True),
        ("report", True),
    ],
)
def test_a_study_that_goes_while_it_is_read_is_refused_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, anew: bool
) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/autoq.db") as store:
        add_synthetic_study(store, groups=6, formats=3, name="short")
        reader = StudyReader(store, lambda path: path)
        cache_study = reader._cache.study

        def then_gone(name: str) -> object:
            found = cache_study(name)
            store.delete_study(store.study_named(name).id)
            if anew:
                record = add_synthetic_study(store, groups=7, formats=3, seed=1, name=name)
                store.reset_stage(record.id, "discovery")
            return found

        monkeypatch.setattr(reader._cache, "study", then_gone)
        asked = {"solve": (PlanRequest(effective_bits=6.0),)}.get(what, ())
        with pytest.raises(
            Refusal, match="changed while it was read" if anew else "no study"
        ) as one:
            getattr(reader, what)("short", *asked)
        assert one.value.kind.name == ("conflict" if anew else "not-found")


def test_threads_get_the_same_answers(reader: StudyReader) -> None:
    budgets = [4.6 + 0.1 * step for step in range(8)]
    expected = [reader.solve("alpha", PlanRequest(effective_bits=b)).assignment for b in budgets]
    fresh = StudyReader(reader._store, str)
    found: dict[int, dict[str, str]] = {}

    def ask(place: int) -> None:
        request = PlanRequest(effective_bits=budgets[place])
        found[place] = fresh.solve("alpha", request).assignment

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(budgets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(budgets))] == expected


def test_the_frontier_is_the_study_s(store: StudyStore, reader: StudyReader) -> None:
    plans = open_study("alpha", store).frontier(9)
    view = reader.frontier("alpha", 9)
    assert [p.predicted_loss for p in view.points] == [p.predicted_loss for p in plans]
    assert [p.stored_bytes for p in view.points] == [p.stored_bytes for p in plans]
    assert view.budget_floor == pytest.approx(plans[0].effective_bits)
    assert view.budget_ceiling == 16.0


def test_the_table_names_layers_and_kinds(store: StudyStore, reader: StudyReader) -> None:
    view = reader.sensitivities("alpha")
    study = open_study("alpha", store)
    assert view.formats == study.sensitivity.formats
    assert (view.groups[5].layer, view.groups[5].kind) == (1, "self_attn.o_proj")
    assert (view.groups[5].slots, view.groups[5].weights) == (1, 1024 * 1024)
    assert view.scores[5][0] == study.sensitivity.scores()[5, 0]
    assert view.effective_bits[5][view.formats.index("nvfp4")] == 4.5


def test_pages_of_studies_hold_each_study_once(store: StudyStore, reader: StudyReader) -> None:
    first = reader.studies(2)
    second = reader.studies(2, first.next_cursor)
    names = [entry.name for entry in (*first.items, *second.items)]
    assert sorted(names) == ["Gamma", "alpha", "beta"]
    assert (first.total, second.total, second.next_cursor) == (3, 3, None)
    assert first.items[0].updated >= first.items[1].updated >= second.items[0].updated
    assert first.items[0].model == f"shown/{names[0]}"


def test_studies_are_found_by_what_they_are(reader: StudyReader) -> None:
    def names(**wanted: object) -> set[str]:
        return {entry.name for entry in reader.studies(10, **wanted).items}  # type: ignore[arg-type]

    assert names(text="GAM") == {"Gamma"}
    assert names(text="a%") == set()
    assert names(model="shown/beta") == {"beta"}
    assert names(model="beta") == set()
    assert names(status=StudyStatus.RUNNING) == set()
    assert names(status=StudyStatus.DONE, text="synthetic") == {"alpha", "beta", "Gamma"}


def test_a_study_whose_process_ended_is_interrupted(tmp_path: Path) -> None:
    with StudyStore.open(f"sqlite:///{tmp_path}/autoq.db") as store:
        reader = StudyReader(store, str)
        record = add_synthetic_study(store, groups=5, formats=2, sequences=2)
        store.set_status(record.id, WorkStatus.RUNNING)
        assert reader.detail(record.name).status is StudyStatus.INTERRUPTED
        assert reader.studies(5, status=StudyStatus.INTERRUPTED).total == 1
        with store.lease(record.id):
            assert reader.detail(record.name).status is StudyStatus.RUNNING
            assert reader.studies(5, status=StudyStatus.INTERRUPTED).total == 0
            assert reader.studies(5, status=StudyStatus.RUNNING).total == 1


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "abc",
        "WyJzdHVkaWVzIiwieCIsMV0",
        "WyJ0cmlhbHMiLDFd",
        encode_cursor("studies", "9999-12-31T23:59:59-23:59", 1),  # in UTC there is no such year
        encode_cursor("studies", "0001-01-01T00:00:00+23:59", 1),
    ],
)
def test_cursors_that_no_page_gave_are_refused(reader: StudyReader, cursor: str) -> None:
    with pytest.raises(InputError, match="next_cursor"):
        reader.studies(2, cursor)


def test_details_show_no_place_of_the_machine(store: StudyStore, tmp_path: Path) -> None:
    reader = StudyReader(store, lambda path: Path(path).name)
    record = open_study("beta", store).record
    store.begin_export(
        record.id,
        plan_id=open_study("beta", store).plans()[0].id,
        container="modelopt",
        path=str(tmp_path / "out"),
    )
    detail = reader.detail("beta")
    assert str(tmp_path) not in detail.model_dump_json()
    assert detail.exports[-1].path == "out"
    assert [file.path for file in detail.exports[0].files] == ["config.json", "model.safetensors"]
    assert detail.plan is not None
    assert detail.plan.assignment
    assert not detail.plans[0].assignment
    assert [stage.name for stage in detail.stages] == [
        "discovery",
        "calibration",
        "sensitivity",
        "sizes",
        "solve",
    ]
    assert {entry.metric for entry in detail.measurements} == {"kl_divergence", "top1_agreement"}


def test_the_report_is_a_page_of_its_own(reader: StudyReader) -> None:
    page = reader.report("beta")
    assert page.lstrip().lower().startswith("<!doctype html")
    assert "model.layers.0.self_attn.qkv" in page


def _bits(bits: float) -> Budgets:
    return Budgets(effective_bits=bits)
