"""What several processes, trials, the key/value cache and a cluster add to an estimate."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autoq.api.preflight import Preflight, cluster, disk, estimating, gpus, preflight
from autoq.api.preflight import memory as memory_module
from autoq.api.preflight.cluster import Cluster, Machine
from autoq.api.preflight.memory import Memory, memory_by_stage, memory_of_machine, memory_of_workers
from autoq.api.preflight.seconds import AllRates, Rates, seconds_by_stage, seconds_divided
from autoq.api.preflight.teams import Team, scoring_team
from autoq.api.refinement.process import threads_each
from autoq.api.refinement.refining import RefineOptions
from autoq.errors import InputError
from autoq.models import load_model

SMALL = {
    "calibration_sequences": 8,
    "sequence_length": 32,
    "batch_size": 2,
    "held_out_sequences": 2,
    "formats": ("fp8", "nvfp4"),
}
USED, SHARED, FREE = 400_000_000, 150_000_000, 1 << 34
MEMORY = Memory(USED, SHARED, FREE)
"""Of a process that has 400 MB, 150 MB of them libraries' pages that all share."""


def estimate(model: Path, tmp_path: Path, **options: Any) -> Preflight:
    store = f"sqlite:///{tmp_path / 'studies.db'}"
    return preflight(model, **{**SMALL, "store": store, "reads_data": False, **options})


def workload(folder: Path, **added: Any) -> Any:
    """Of the small search, with fields of `Workload` on top."""
    from autoq.api.config import ScoringConfig

    sizes = {key: value for key, value in SMALL.items() if key != "held_out_sequences"}
    work = estimating._workload(folder, ScoringConfig(**sizes), 2, False)
    return replace(work, **added)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how much memory is free beside what the process has."""
    monkeypatch.setattr(estimating, "_own_bytes", lambda: (USED, SHARED))

    def leave(size: int) -> None:
        monkeypatch.setattr(estimating, "available_bytes", lambda _: size)

    leave(FREE)
    return leave


# Processes of this machine


def test_every_process_has_its_own_model_and_libraries_count_once(llama_folder: Path) -> None:
    alone = workload(llama_folder)
    three = workload(llama_folder, scorers=Team(count=3, threads=1))
    (scoring,) = memory_of_workers(three, MEMORY).values()
    own = memory_by_stage(alone, MEMORY)["scoring"]
    # A worker needs what the owner needs, less what the owner has loaded more of libraries.
    assert own - scoring == USED - memory_module._WORKER_BYTES
    found = memory_by_stage(three, MEMORY)
    assert found["scoring"] == own + three.calibration_bytes  # that it sends to the others
    whole = memory_of_machine(three, MEMORY)
    assert whole["scoring"] == found["scoring"] + 2 * (scoring - SHARED)
    # Before that the others have imported what they need, and wait.
    assert whole["calibrating"] == found["calibrating"] + 2 * (memory_module._IDLE_BYTES - SHARED)
    assert whole["measuring"] == found["measuring"]
    assert memory_of_machine(alone, MEMORY) == memory_by_stage(alone, MEMORY)


def test_weights_that_are_used_as_the_file_holds_them_are_shared(llama_folder: Path) -> None:
    team = Team(count=3, threads=1)
    copied = workload(llama_folder, scorers=team, is_mapped=False)
    mapped = workload(llama_folder, scorers=team, is_mapped=True)
    parameters = sum(parameter.numel() for parameter in load_model(llama_folder).parameters())
    saved = (
        memory_of_machine(copied, MEMORY)["scoring"] - memory_of_machine(mapped, MEMORY)["scoring"]
    )
    assert saved == 2 * 4 * parameters
    assert memory_of_workers(copied, MEMORY) == memory_of_workers(mapped, MEMORY)


def test_weights_are_mapped_where_nothing_is_cast(llama_folder: Path, tmp_path: Path) -> None:
    stored = torch.float32 if _stored(llama_folder) == "F32" else torch.bfloat16
    assert workload(llama_folder).is_mapped == (stored == torch.float32)
    folder = tmp_path / "other"
    other = torch.bfloat16 if stored == torch.float32 else torch.float32
    load_model(llama_folder).to(other).save_pretrained(folder)
    assert workload(folder).is_mapped == (other == torch.float32)


def _stored(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return next(entry["dtype"] for name, entry in header.items() if name != "__metadata__")


def test_work_is_dealt_to_whoever_is_free() -> None:
    assert seconds_divided(7, 2.0, [0.0]) == 14.0
    assert seconds_divided(8, 2.0, [0.0, 0.0]) == 8.0
    assert seconds_divided(7, 2.0, [0.0, 0.0]) == 8.0  # one of them does four
    # The second comes when three are done or begun; the other four are two each.
    assert seconds_divided(7, 2.0, [0.0, 5.0]) == 10.0
    # One that comes when all is done or begun is no help, and no harm.
    assert seconds_divided(3, 2.0, [0.0, 9.0]) == 6.0
    assert seconds_divided(0, 2.0, [1.0]) == 0.0


RATES = Rates(multiplications=1e6, projections=1e6, values=1e6)
"""Of a machine so slow that what is not divided, such as starting, is little beside the rest."""


def _seconds(work: Any) -> dict[str, float]:
    return seconds_by_stage(work, AllRates(RATES, RATES, RATES))


def test_scoring_is_divided_and_nothing_else_is(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    alone = _seconds(workload(llama_folder))
    two = _seconds(workload(llama_folder, scorers=Team(count=2, threads=1)))
    assert {name for name in alone if alone[name] != two[name]} == {"scoring"}
    # Four batches: two each, and what each of them rounds, all 5 % slower beside each other.
    work = workload(llama_folder)
    rounding = 2 * 4 * work.searched_weights / 1e6  # two formats, four passes
    batch = (alone["scoring"] - rounding) / 4
    late = 2 * batch + work.stored_bytes * 3 / 4e8 + work.calibration_bytes / 4e8
    assert two["scoring"] == pytest.approx(1.05 * (rounding + 2 * batch) + late - 2 * batch)


def test_more_devices_take_no_less_memory_and_no_more_time(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    teams = [Team(count=count, threads=1) for count in (1, 2, 3, 4, 8, 64)]
    works = [workload(llama_folder, scorers=team) for team in teams]
    seconds = [_seconds(work)["scoring"] for work in works]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[1] < seconds[0]
    for stage in ("calibrating", "scoring"):
        memory = [memory_of_machine(work, MEMORY)[stage] for work in works]
        assert memory == sorted(set(memory))


def test_processes_beyond_the_cores_win_nothing(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    two, four = (
        _seconds(workload(llama_folder, scorers=Team(count=count, threads=1)))["scoring"]
        for count in (2, 4)
    )
    assert four > two  # weights are rounded twice as often


def test_devices_are_counted_as_the_search_would_start_them(
    llama_folder: Path, tmp_path: Path, room: Any
) -> None:
    one = estimate(llama_folder, tmp_path, devices=1, device="cpu")
    three = estimate(llama_folder, tmp_path, devices=3, device="cpu")
    assert one.workers == ()
    assert one.machine_bytes == one.memory_bytes
    (team,) = three.workers
    assert (team.stage, team.count, team.place) == ("scoring", 2, "this machine")
    assert three.machine_peak_bytes > one.machine_peak_bytes
    assert scoring_team(3, None, device="cpu").threads == max(
        1, min(torch.get_num_threads(), threads_each(3))
    )
    with pytest.raises(InputError, match="devices must be >= 1"):
        estimate(llama_folder, tmp_path, devices=0)
    with pytest.raises(InputError, match="leave --devices, --ray and torchrun or --max-memory out"):
        estimate(llama_folder, tmp_path, devices=2, max_memory="2GB")


def test_fewer_devices_are_proposed_where_these_do_not_fit(
    llama_folder: Path, tmp_path: Path, room: Any
) -> None:
    options = {"device": "cpu", "batch_size": 8}
    needed = {
        count: estimate(llama_folder, tmp_path, devices=count, **options).machine_peak_bytes
        for count in (1, 2, 3, 6)
    }
    room(int((needed[3] + 1e6 - USED) / 0.95))  # for three, and not for four
    (misfit,) = estimate(llama_folder, tmp_path, devices=6, **options).misfits
    assert misfit.needed_bytes == needed[6]
    assert "--devices 3" in misfit.remedies
    assert "--devices 2" not in misfit.remedies  # one proposal is enough
    assert "--batch-size 1" not in misfit.remedies  # libraries are what there is too much of
    assert estimate(llama_folder, tmp_path, devices=3, **options).fits


def test_gpus_hold_one_process_each(llama_folder: Path) -> None:
    gpus = Team(count=3, threads=1, devices=("cuda:1", "cuda:2"))
    work = workload(llama_folder, scorers=gpus)
    on_a_gpu = Memory(0, 0, FREE)
    assert memory_of_machine(work, on_a_gpu) == memory_by_stage(work, on_a_gpu)
    (scoring,) = memory_of_workers(work, on_a_gpu).values()
    assert scoring == memory_by_stage(workload(llama_folder), on_a_gpu)["scoring"]


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    team = Team(count=3, threads=1, devices=("cuda:1", "cuda:2"))
    monkeypatch.setattr(estimating, "scoring_team", lambda *_, **__: team)


def test_other_gpus_are_asked_elsewhere(
    llama_folder: Path,
    tmp_path: Path,
    room: Any,
    three_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("this process would have a context on that GPU")

    free = {"cuda:1": 1 << 40, "cuda:2": 1000}

    def answer(command: list[str], **_: Any) -> Any:
        assert command[-2:] == ["cuda:1", "cuda:2"]
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(free)}\n")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    monkeypatch.setattr(gpus.subprocess, "run", answer)
    found = estimate(llama_folder, tmp_path, device="cpu")
    (misfit,) = found.misfits
    assert (misfit.place, misfit.free_bytes) == ("cuda:2", 950)
    assert found.notes == ()
    free["cuda:2"] = 1 << 40
    assert estimate(llama_folder, tmp_path, device="cpu").fits


def _late(command: list[str], *, timeout: float, **_: Any) -> Any:
    raise subprocess.TimeoutExpired(command, timeout)


def _of_one_only(command: list[str], **_: Any) -> Any:
    return subprocess.CompletedProcess(command, 0, '{"cuda:1": 5}')


@pytest.mark.parametrize("answer", [_late, _of_one_only])
def test_gpus_that_cannot_be_asked_are_said(
    answer: Any,
    llama_folder: Path,
    tmp_path: Path,
    room: Any,
    three_gpus: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus.subprocess, "run", answer)
    found = estimate(llama_folder, tmp_path, device="cpu")
    (note,) = found.notes
    assert note == "what is free on cuda:1, cuda:2 could not be asked, and was not looked at"
    assert found.fits


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be asked")
def test_the_question_fails_where_there_is_no_gpu() -> None:
    assert gpus.free_bytes_of_gpus(["cuda:1"]) is None
    assert gpus.free_bytes_of_gpus([]) == {}


# Trials


def test_trials_are_divided_and_what_is_round_them_is_not(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    options = RefineOptions(trials=40, held_out_sequences=2)
    one = _seconds(workload(llama_folder, refining=options))["refining"]
    more = _seconds(
        workload(llama_folder, refining=RefineOptions(trials=80, held_out_sequences=2))
    )["refining"]
    # Trials are on 8 sequences of calibration, as there are no more. Tokens go through all weights,
    # 1.5 times the products' time; a trial computes 0.4 of that anew.
    work = workload(llama_folder, refining=options)
    token = 1.5 * (work.searched_weights + work.hidden_width * work.output_width) / 1e6
    trial = 0.4 * token * 8 * 32 + 0.05
    assert more - one == pytest.approx(40 * trial)
    rounding = 2 * 4 * work.searched_weights / 1e6
    # The original and its noise before; start and two more on 64 fresh sequences, five on held-out.
    round_them = token * 32 * (2 * 8 + 4 * 64 + 5 * 2) + rounding
    assert one == pytest.approx(40 * trial + round_them)
    two = _seconds(workload(llama_folder, refining=options, trial_workers=Team(2, threads=1)))
    assert round_them + 20 * trial < two["refining"] < one
    assert "refining" not in _seconds(workload(llama_folder))


def test_processes_on_one_gpu_share_it(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    options = RefineOptions(trials=40, held_out_sequences=2)
    gpu = replace(RATES, are_of_a_gpu=True)

    def refining(team: Team) -> float:
        work = workload(llama_folder, refining=options, trial_workers=team)
        return seconds_by_stage(work, AllRates(gpu, gpu, gpu))["refining"]

    alone = refining(Team())
    # As its products take all of the time here, four processes come to the end no sooner.
    assert refining(Team(4, threads=1, waits_for_start=True)) >= alone
    # A cluster's workers have a GPU each.
    elsewhere = refining(Team(4, threads=1, place="the Ray cluster", gpus_each=1))
    assert elsewhere < alone
    # Forty trials by four take what they take by one, all of it 5 % longer beside others.
    work = workload(llama_folder, refining=options)
    token = 1.5 * (work.searched_weights + work.hidden_width * work.output_width) / 1e6
    eighty = RefineOptions(trials=80, held_out_sequences=2)
    team = Team(4, threads=1, waits_for_start=True)
    longer = workload(llama_folder, refining=eighty, trial_workers=team)
    more = seconds_by_stage(longer, AllRates(gpu, gpu, gpu))["refining"] - refining(team)
    # What does not run on the GPU, 0.05 s for a trial, is divided by four.
    assert more == pytest.approx(40 * (1.05 * 0.4 * token * 8 * 32 + 0.05 / 4))


def test_what_trials_keep_is_bounded_by_what_is_free(llama_folder: Path) -> None:
    options = RefineOptions(trials=1000, held_out_sequences=2)
    work = workload(llama_folder, refining=options)
    scarce, plenty = Memory(USED, 0, work.weight_bytes + 400_000), Memory(USED, 0, 1 << 44)
    blocks = len(work.model_map.blocks)
    hidden = load_model(llama_folder).config.hidden_size
    given = 8 * 32 * hidden * 4 * (blocks - 1)  # a pass over the 8 sequences; not the last block's
    confirming = 64 * 32 * hidden * 4 * (blocks - 1) * (1 + 0.4 * 2)
    weights = 2 * work.searched_weights * 4  # in both formats
    reference = work.output_width * 4 * 32
    measured = memory_by_stage(work, plenty)["refining"] - memory_by_stage(work, scarce)["refining"]
    # With plenty all is kept: trials need most. With little, 100000 of the 400000 bytes, halved,
    # and more outputs of the original for the fresh sequences.
    kept = reference * 8 + weights + int((1 + 0.4 * 999) * given)
    assert kept > reference * 64 + weights + confirming
    assert measured == kept - (reference * 64 + 2 * 50_000)
    asked = RefineOptions(trials=1000, held_out_sequences=2, cache_gb=0)
    nothing = workload(llama_folder, refining=asked)
    rest = memory_by_stage(work, scarce)["refining"] - 100_000
    assert memory_by_stage(nothing, plenty)["refining"] == rest


def test_workers_that_measure_trials_have_it_all_again(llama_folder: Path) -> None:
    options = RefineOptions(trials=8, cache_gb=0)
    one = workload(llama_folder, refining=options)
    three = workload(llama_folder, refining=options, trial_workers=Team(count=3, threads=1))
    own = memory_by_stage(one, MEMORY)["refining"]
    assert memory_of_workers(three, MEMORY) == {"refining": own}
    assert memory_of_machine(three, MEMORY)["refining"] == own + 2 * (
        own - SHARED - three.mapped_bytes
    )


def test_trials_and_their_originals_outputs_take_disk(
    llama_folder: Path, tmp_path: Path, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = estimate(llama_folder, tmp_path)
    found = estimate(llama_folder, tmp_path, refine=50)
    width = load_model(llama_folder).config.vocab_size
    assert found.outputs_bytes == 8 * 32 * width * 4
    assert plain.outputs_bytes == 0
    assert found.disk_bytes == found.store_bytes + found.outputs_bytes
    twice = estimate(llama_folder, tmp_path, refine=100)
    trials = twice.store_bytes - found.store_bytes
    assert trials == found.store_bytes - plain.store_bytes - (4 << 20) > 0  # and SQLite's log
    # Outputs take a tenth of the disk at most, or are not kept; nor are they beside a server.
    monkeypatch.setattr(disk, "free_disk_bytes", lambda _: 10 * found.outputs_bytes - 10)
    assert estimate(llama_folder, tmp_path, refine=50).outputs_bytes == 0
    elsewhere = {"store": "postgresql+psycopg://host/db", "refine": 50}
    assert estimate(llama_folder, tmp_path, **elsewhere).outputs_bytes == 0


def test_what_a_refinement_would_refuse_is_refused_at_once(
    llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="workers must be >= 1"):
        estimate(llama_folder, tmp_path, refine=10, workers=0)
    with pytest.raises(InputError, match="this one is in memory"):
        estimate(llama_folder, tmp_path, refine=10, workers=2, store="sqlite:///:memory:")
    with pytest.raises(InputError, match="--refine"):
        estimate(llama_folder, tmp_path, refine=10, max_memory="2GB")
    asked = {"objective": "1 - top1", "constraints": ("top1>=0.9",)}
    notes = estimate(llama_folder, tmp_path, refine=4, refine_options=asked).notes
    assert ["--objective" in notes[0], "--min-task" in notes[1]] == [True, True]
    assert estimate(llama_folder, tmp_path, refine=4).notes == ()


# The key/value cache


def test_the_cache_is_one_more_stage(llama_folder: Path, tmp_path: Path, room: Any) -> None:
    plain = estimate(llama_folder, tmp_path)
    found = estimate(llama_folder, tmp_path, kv_formats=("fp8",))
    assert set(found.memory_bytes) - set(plain.memory_bytes) == {"scoring cache"}
    assert found.seconds.keys() == found.memory_bytes.keys()
    config = load_model(llama_folder).config
    layers = config.num_hidden_layers
    # A number for each of 8 sequences and each layer in fp8, int8 and nvfp4, whatever is offered.
    assert found.store_bytes - plain.store_bytes == 2 * 8 * layers * 3 * 8
    work = workload(llama_folder, scores_cache=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert work.cached_elements == 2 * config.num_key_value_heads * size
    # Forward for the scales; forward, forward again and backward for the scores; twenty passes.
    tokens = 8 * 32
    token = 1.5 * (work.searched_weights + work.hidden_width * work.output_width) / 1e6
    passes = 20 * layers * 3 * work.cached_elements * tokens / 1e6
    assert _seconds(work)["scoring cache"] == pytest.approx(4 * token * tokens + passes)
    with pytest.raises(InputError, match="--kv-formats"):
        estimate(llama_folder, tmp_path, kv_bits=4.0)
    with pytest.raises(InputError, match="--kv-formats"):
        estimate(llama_folder, tmp_path, kv_formats=("fp8",), max_memory="2GB")


# Ray


def _cluster(*machines: Machine) -> Cluster:
    return Cluster(machines=machines, is_this_machine=False)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says what the cluster answers."""

    def answer(found: Cluster) -> None:
        monkeypatch.setattr(estimating, "cluster_at", lambda address: found)

    return answer


def test_a_cluster_of_other_machines_takes_nothing_here(
    llama_folder: Path, tmp_path: Path, room: Any, answering: Any
) -> None:
    machine = Machine(cores=8, gpus=0, memory_bytes=1 << 34)
    answering(_cluster(machine, machine))
    found = estimate(llama_folder, tmp_path, ray="head:6379", device="cpu")
    (team,) = found.workers
    assert (team.count, team.place) == (2, "the Ray cluster")  # one for each machine
    assert found.machine_bytes == found.memory_bytes
    assert any("as fast as this one" in note for note in found.notes)
    with pytest.raises(InputError, match="16 cores, and 17 workers"):
        estimate(llama_folder, tmp_path, ray="head:6379", devices=17, device="cpu")


def test_a_cluster_may_grow_until_there_are_trials(
    llama_folder: Path, tmp_path: Path, room: Any, answering: Any
) -> None:
    asked: dict[str, Any] = {"ray": "a:1", "refine": 4, "workers": 10, "device": "cpu"}
    asked["store"] = "postgresql+psycopg://host/db"
    answering(_cluster(Machine(cores=4, gpus=0, memory_bytes=1 << 34)))
    with pytest.raises(InputError, match="4 cores, and 9 workers"):  # as the cluster is now
        estimate(llama_folder, tmp_path, **asked)
    found = estimate(llama_folder, tmp_path, cluster_may_grow=True, **asked)
    assert [note for note in found.notes if "must join" in note and "9 workers" in note]
    assert [team.count for team in found.workers if team.stage == "refining"] == [9]
    assert found.fits
    enough = estimate(llama_folder, tmp_path, cluster_may_grow=True, **{**asked, "workers": 5})
    assert not [note for note in enough.notes if "must join" in note]
    # One that the search starts is this machine, and stays it.
    machine = Machine(cores=4, gpus=0, memory_bytes=1 << 34)
    answering(Cluster(machines=(machine,), is_this_machine=True, is_to_be_started=True))
    with pytest.raises(InputError, match="4 cores, and 9 workers"):
        estimate(llama_folder, tmp_path, cluster_may_grow=True, **asked)


def test_a_cluster_with_too_little_memory_is_said(
    llama_folder: Path, tmp_path: Path, room: Any, answering: Any
) -> None:
    def asked(memory_bytes: int, devices: int) -> Preflight:
        answering(_cluster(*[Machine(cores=4, gpus=0, memory_bytes=memory_bytes)] * 2))
        return estimate(llama_folder, tmp_path, ray="a:1", devices=devices, device="cpu")

    each = asked(1 << 40, 2).workers[0].memory_bytes
    assert asked(2 * each, 4).fits
    (misfit,) = asked(2 * each - 1, 4).misfits
    assert misfit.place == "the Ray cluster"
    assert (misfit.needed_bytes, misfit.free_bytes) == (4 * each, 2 * (2 * each - 1))
    assert "--devices 2" in misfit.remedies
    assert "--devices 3" not in misfit.remedies


def test_a_cluster_of_this_machine_alone_shares_its_memory(
    llama_folder: Path, tmp_path: Path, room: Any, answering: Any
) -> None:
    machine = Machine(cores=4, gpus=0, memory_bytes=FREE)
    answering(Cluster(machines=(machine,), is_this_machine=True))
    running = estimate(llama_folder, tmp_path, ray="auto", devices=2, device="cpu")
    answering(Cluster(machines=(machine,), is_this_machine=True, is_to_be_started=True))
    found = estimate(llama_folder, tmp_path, ray="auto", devices=2, device="cpu")
    (team,) = found.workers
    work = workload(llama_folder)
    mapped = work.mapped_bytes
    assert team.count == 2  # the owner leaves scoring to them
    daemons = memory_module.RAY_BYTES
    added = found.machine_bytes["scoring"] - found.memory_bytes["scoring"]
    assert added == 2 * (team.memory_bytes - SHARED - mapped) + daemons
    # Actors are started when there is something to score.
    assert found.machine_bytes["calibrating"] == found.memory_bytes["calibrating"] + daemons
    assert running.machine_bytes["calibrating"] == running.memory_bytes["calibrating"]


def test_a_cluster_that_is_silent_is_said_and_waited_for_no_longer(
    llama_folder: Path, tmp_path: Path, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def silent(*_: Any, timeout: float, **__: Any) -> Any:
        waited.append(timeout)
        raise subprocess.TimeoutExpired("ray", timeout)

    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cluster.subprocess, "run", silent)
    found = estimate(llama_folder, tmp_path, ray="far:6379", devices=4, device="cpu")
    assert waited == [cluster.PATIENCE_SECONDS]
    assert any("did not answer within 6 s: " in note for note in found.notes)
    assert found.workers[0].count == 4
    assert found.fits


def _ends(command: list[str], **_: Any) -> Any:
    said = "Traceback:\nRuntimeError: another version of Ray\n"
    raise subprocess.CalledProcessError(1, command, stderr=said)


def _babbles(command: list[str], **_: Any) -> Any:
    return subprocess.CompletedProcess(command, 0, "noise\n")


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (_ends, "could not be asked (RuntimeError: another version of Ray): "),
        (_babbles, "could not be asked: "),
    ],
)
def test_a_cluster_that_answers_with_an_error_is_not_called_silent(
    fails: Any,
    words: str,
    llama_folder: Path,
    tmp_path: Path,
    room: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cluster.subprocess, "run", fails)
    found = estimate(llama_folder, tmp_path, ray="far:6379", devices=4, device="cpu")
    (note,) = found.notes
    assert note.startswith(f"the Ray cluster {words}")
    assert found.fits


@pytest.mark.parametrize("address", ["auto", "far:6379"])
def test_where_nobody_answers_auto_means_this_machine(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(command: list[str], **_: Any) -> Any:
        assert command[-1] == address
        return subprocess.CompletedProcess(command, 0, 'noise\n{"nobody": "none there"}\n')

    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(cluster.subprocess, "run", nobody)
    if address != "auto":
        with pytest.raises(InputError, match=r"none answers at far:6379 \(none there\)"):
            cluster.cluster_at(address)
        return
    found = cluster.cluster_at(address)
    assert found.is_this_machine
    assert found.machines[0].cores >= 1


def test_the_question_is_asked_in_a_file_that_runs_by_itself(tmp_path: Path) -> None:
    stand_in = tmp_path / "ray.py"
    stand_in.write_text(
        "import platform\n"
        "def init(address, **_):\n"
        "    print('hello')\n"
        "    if address == 'nowhere': raise ConnectionError('nothing\\nmore')\n"
        "def nodes():\n"
        "    have = {'CPU': 3.0, 'GPU': 1.0, 'memory': 5e9}\n"
        "    host = platform.node()\n"
        "    return [{'Alive': True, 'NodeManagerHostname': host, 'Resources': have},\n"
        "            {'Alive': False, 'NodeManagerHostname': 'gone', 'Resources': have}]\n"
    )

    def asked(address: str) -> Any:
        command = [sys.executable, "-P", cluster.asking.__file__, address]
        environment = {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    assert asked("head:1") == {
        "machines": [{"cores": 3.0, "gpus": 1.0, "memory_bytes": 5_000_000_000}],
        "is_this_machine": True,
    }
    assert asked("nowhere") == {"nobody": "nothing"}
