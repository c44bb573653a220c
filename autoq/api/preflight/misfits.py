"""What there is not enough of, and what smaller search would fit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from autoq.api.config import parse_calibration
from autoq.api.distribution.ray_cluster import Share
from autoq.api.preflight.cluster import Cluster
from autoq.api.preflight.disk import free_disk_bytes
from autoq.api.preflight.found import Misfit, Preflight
from autoq.api.preflight.memory import (
    Memory,
    largest,
    memory_of_machine,
    memory_of_workers,
)
from autoq.api.preflight.teams import ALONE, Team
from autoq.api.preflight.workload import Workload
from autoq.studies.maintenance import file_of

_BOUND_STEP = 10**8  # bytes, of a bound that is proposed
_SAFE_SHARE = 0.95
"""Of what is free: estimates are no measurements, and other programs live here, too."""

_CLUSTER = "the Ray cluster"


def memory_misfits(
    work: Workload,
    memory: Memory,
    found: Preflight,
    cluster: Cluster | None,
    *,
    device: str,
    streamed_bytes: int,
    free_on_gpus: Mapping[str, int],
) -> list[Misfit]:
    """Places with too little memory: this machine or its GPU, further GPUs, a cluster.

    Args:
        memory: of `device`, which the process that owns the study computes on.
        streamed_bytes: the least bound on memory that the search could do with.
        free_on_gpus: those of other processes; one that is not named is not looked at.
    """
    missing = _on_own_device(work, memory, found.machine_peak_bytes, device, streamed_bytes)
    missing += _on_other_gpus(work, memory, free_on_gpus)
    if cluster is not None and cluster.has_answered and not cluster.is_this_machine:
        missing += _on_cluster(work, memory, cluster)
    return missing


def _on_own_device(
    work: Workload, memory: Memory, needed: int, device: str, streamed_bytes: int
) -> list[Misfit]:
    room = int(memory.used_bytes + memory.free_bytes * _SAFE_SHARE)
    if needed <= room:
        return []
    remedies = _that_fit(work, lambda tried: largest(memory_of_machine(tried, memory))[1] <= room)
    bound = room // _BOUND_STEP * _BOUND_STEP
    if streamed_bytes <= bound:
        without = ", ".join(_unstreamable(work))
        end = f", without {without}" if without else ""
        remedies.append(f"--max-memory {bound / 1e9:.1f}GB{end}")
    return [Misfit("memory", device, needed, room, tuple(remedies))]


def _unstreamable(work: Workload) -> Iterator[str]:
    """Options that a bound on memory cannot be had with."""
    if work.scorers != ALONE:
        yield "--devices and --ray"
    if work.refining is not None:
        yield "--refine"
    if work.scores_cache:
        yield "--kv-formats"


def _on_other_gpus(work: Workload, memory: Memory, free_bytes: Mapping[str, int]) -> list[Misfit]:
    found = []
    for number, name in enumerate(work.scorers.devices, 1):
        if name not in free_bytes:
            continue
        room = int(free_bytes[name] * _SAFE_SHARE)

        def fits(tried: Workload, number: int = number, room: int = room) -> bool:
            if len(tried.scorers.devices) < number:
                return True  # it is not asked for
            return memory_of_workers(tried, memory)["scoring"] <= room

        if not fits(work):
            needed = memory_of_workers(work, memory)["scoring"]
            found.append(Misfit("memory", name, needed, room, tuple(_that_fit(work, fits))))
    return found


def _on_cluster(work: Workload, memory: Memory, cluster: Cluster) -> list[Misfit]:
    found = []
    for stage, bytes_ in memory_of_workers(work, memory).items():
        team = _team(work, stage)
        if team.gpus_each or team.lacks:  # Ray does not know GPUs' memory, nor who will join
            continue
        share = Share(team.others, team.gpus_each, team.threads or 1)

        def fits(tried: Workload, stage: str = stage, share: Share = share) -> bool:
            count = _team(tried, stage).others
            needed = memory_of_workers(tried, memory).get(stage, 0)
            return cluster.room_for(share, needed) >= count

        if not fits(work):
            whole = team.others * bytes_
            free = cluster.memory_bytes
            found.append(Misfit("memory", _CLUSTER, whole, free, tuple(_that_fit(work, fits))))
    return found


def _team(work: Workload, stage: str) -> Team:
    return work.trial_workers if stage == "refining" else work.scorers


def _that_fit(work: Workload, fits: Callable[[Workload], bool]) -> list[str]:
    found = [option for option, smaller in _smaller_searches(work) if fits(smaller)]
    fewer = (next((o for o, w in tries if fits(w)), None) for tries in _with_fewer(work))
    return [*filter(None, fewer), *found]


def _with_fewer(work: Workload) -> list[list[tuple[str, Workload]]]:
    """Searches with fewer processes, largest numbers first, for each way to have several."""
    scorers = [
        (f"--devices {count}", replace(work, scorers=work.scorers.of(count)))
        for count in reversed(range(1, work.scorers.count))
    ]
    trials = [
        (f"--workers {count}", replace(work, trial_workers=work.trial_workers.of(count)))
        for count in reversed(range(1, work.trial_workers.count))
    ]
    return [scorers, trials]


def _smaller_searches(work: Workload) -> list[tuple[str, Workload]]:
    """The same search with less of something, one thing at a time and all together."""
    config = work.config
    one = replace(config, batch_size=1)
    short = replace(config, sequence_length=max(2, work.tokens_in_sequence // 4))
    plain = replace(config, calibration=parse_calibration("scales"))
    found = []
    if config.batch_size > 1:
        found.append(("--batch-size 1", replace(work, config=one)))
    length = short.sequence_length
    found.append(
        (f"--sequence-length {length}", replace(work, config=short, tokens_in_sequence=length))
    )
    if any(fmt.algorithm(config.calibration).feeds_errors_back for fmt in work.formats):
        found.append(("--calibration scales", replace(work, config=plain)))
    if len(work.formats) > 2:
        kept = [fmt.name for fmt in sorted(work.formats, key=lambda f: f.nominal_bits)]
        kept = [kept[0], kept[-1]]
        fewer = replace(config, formats=tuple(kept))
        found.append((f"--formats {','.join(kept)}", replace(work, config=fewer)))
    if work.held_out_sequences:
        found.append(("--no-measure", replace(work, held_out_sequences=0)))
    if work.refining is not None:
        found.append(("no --refine", _unrefined(work)))
    if work.scores_cache:
        found.append(("no --kv-formats", replace(work, scores_cache=False)))
    if work.dtype.itemsize == torch.float32.itemsize:
        half = replace(config, dtype="bfloat16")
        found.append(("--dtype bfloat16", replace(work, config=half, dtype=torch.bfloat16)))
    least = replace(one, sequence_length=length, calibration=plain.calibration, dtype="bfloat16")
    everything = replace(
        _unrefined(work),
        config=least,
        tokens_in_sequence=length,
        held_out_sequences=0,
        dtype=torch.bfloat16,
        scores_cache=False,
        scorers=work.scorers.of(1),
    )
    together = (
        f"--batch-size 1 --sequence-length {length} --calibration scales --no-measure "
        "--dtype bfloat16"
    )
    if work.scorers.count > 1:
        together += " --devices 1"
    left_out = [
        option
        for option, asked in (
            ("--refine", work.refining is not None),
            ("--kv-formats", work.scores_cache),
        )
        if asked
    ]
    if left_out:
        together += f", without {' and '.join(left_out)}"
    return [*found, (together, everything)]


def _unrefined(work: Workload) -> Workload:
    return replace(work, refining=None, trial_workers=ALONE)


def disk_misfits(
    found: Preflight, work: Workload, store: str, export: str | Path | None
) -> list[Misfit]:
    """Places with too little room; what lies on one disk shares it."""
    places: dict[int, tuple[Path, int, list[str]]] = {}
    file = file_of(store)
    if file is not None:
        _add(places, file, found.store_bytes, "--store on another disk")
    if found.outputs_bytes:
        asked = work.refining and work.refining.outputs
        kept = Path(asked) if asked else file
        assert kept is not None  # or else nothing is kept
        _add(places, kept, found.outputs_bytes, "--store on another disk")
    if export is not None:
        _add(places, Path(export), found.checkpoint_bytes, "--export on another disk")
    if found.temporary_bytes:
        temporary = Path(tempfile.gettempdir())
        _add(places, temporary, found.temporary_bytes, "TMPDIR on another disk")
    misfits = []
    for path, needed, remedies in places.values():
        free = free_disk_bytes(path)
        if needed > free * _SAFE_SHARE:
            unique = tuple(dict.fromkeys(remedies))
            misfits.append(Misfit("disk", str(path), needed, free, unique))
    return misfits


def _add(
    places: dict[int, tuple[Path, int, list[str]]], path: Path, needed: int, remedy: str
) -> None:
    above = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    disk = above.stat().st_dev
    first, before, remedies = places.get(disk, (path, 0, []))
    places[disk] = (first, before + needed, [*remedies, remedy])
