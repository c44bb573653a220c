"""Jobs in a real PostgreSQL: claims that race, events whose order readers may trust."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from autoq.studies import JobEvent, JobStatus, StudyStore
from autoq.testing.postgresql import NoServerError, postgresql_url

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url():
    pytest.importorskip("psycopg")
    try:
        with postgresql_url() as found:
            StudyStore.open(found).close()
            yield found
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def store(url):
    with StudyStore.open(url) as opened:
        for job in opened.jobs(limit=1000):
            if not job.status.is_ended:
                opened.request_cancel(job.id)
        while opened.claim_job() is not None:
            pass
        yield opened


def add(store, number, **options):
    request = {"model": "bundled", "seed": number}
    job, _ = store.add_job(kind="search", request=request, created_by="ada", **options)
    return job


def test_claimers_that_race_never_get_the_same_job(store, url):
    jobs = {add(store, number, study=f"study {number % 20}").id for number in range(40)}
    start = threading.Barrier(4)

    def claim_all(_):
        found = []
        with StudyStore.open(url) as own:
            start.wait(timeout=60)
            while len(everything) < len(jobs):
                claim = own.claim_job()
                if claim is None:
                    continue
                found.append(claim.job.id)
                with lock:
                    assert claim.job.study not in at_work  # one job of a study at a time
                    at_work.add(claim.job.study)
                time.sleep(0.005)  # in which the others claim
                with lock:
                    at_work.remove(claim.job.study)
                    everything.append(claim.job.id)
                own.finish_job(claim, {})
        return found

    everything, at_work, lock = [], set(), threading.Lock()
    with ThreadPoolExecutor(4) as pool:
        claimed = [job for found in pool.map(claim_all, range(4)) for job in found]
    assert len(claimed) == len(jobs)
    assert set(claimed) == jobs


def test_no_more_run_than_may_however_many_claim(store, url):
    for number in range(8):
        add(store, number)
    start = threading.Barrier(4)

    def claim(_):
        with StudyStore.open(url) as own:
            start.wait(timeout=60)
            return own.claim_job(most_running=3)

    with ThreadPoolExecutor(4) as pool:
        claims = [found for found in pool.map(claim, range(4)) if found is not None]
    assert len(claims) == 3
    for found in claims:
        store.finish_job(found, {})


def test_a_reader_that_goes_on_after_an_id_misses_no_event(store, url):
    """Ids are given when rows are written and seen when transactions end, in the same order."""
    claims = [store.claim_job() for _ in (add(store, 0), add(store, 1), add(store, 2))]
    begun = store.newest_event()
    rounds, per_round = 40, 3

    def write(claim):
        with StudyStore.open(url) as own:
            for number in range(rounds):
                events = [JobEvent(kind="note", data={"text": str(number)})] * per_round
                own.append_events(claim, events)

    seen, after = [], begun
    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, claim) for claim in claims]
        while not all(writer.done() for writer in writers):
            new = store.events_after(after)
            seen += new
            after = new[-1].id if new else after
        for writer in writers:
            writer.result()
    seen += store.events_after(after)
    everything = store.events_after(begun, limit=10_000)
    assert len(everything) == 3 * rounds * per_round
    assert [event.id for event in seen] == [event.id for event in everything]


def test_a_job_is_queued_once_by_those_who_ask_at_once(store, url):
    start = threading.Barrier(4)

    def ask(_):
        with StudyStore.open(url) as own:
            start.wait(timeout=60)
            return own.add_job(
                kind="search", request={"model": "m"}, created_by="ada", idempotency_key="once"
            )

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert len({job.id for job, _ in found}) == 1
    assert sum(is_new for _, is_new in found) == 1


def test_a_claim_ends_by_the_servers_clock_and_the_job_is_taken_over(store):
    job = add(store, 0)
    lost = store.claim_job(lease_seconds=0.0)
    assert lost.job.id == job.id
    taken = store.claim_job()
    assert (taken.job.id, taken.job.deaths) == (job.id, 1)
    assert store.finish_job(taken, {}).status is JobStatus.DONE
