"""What a search will need of time, memory and disk, before any weight is read, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from autoq.api.config import ScoringConfig, parse_calibration
from autoq.api.kv_cache import cache_wish
from autoq.api.preflight.cluster import Cluster, cluster_at
from autoq.api.preflight.disk import outputs_bytes, store_bytes
from autoq.api.preflight.found import Preflight, WorkerNeeds
from autoq.api.preflight.gpus import free_bytes_of_gpus
from autoq.api.preflight.memory import (
    Memory,
    memory_by_stage,
    memory_of_machine,
    memory_of_workers,
)
from autoq.api.preflight.misfits import disk_misfits, memory_misfits
from autoq.api.preflight.notes import notes_of_gpus, notes_of_search
from autoq.api.preflight.seconds import AllRates, seconds_by_stage
from autoq.api.preflight.teams import ALONE, Team, scoring_team, trials_team
from autoq.api.preflight.workload import Workload
from autoq.api.refinement.edge import check_before_search, check_workers
from autoq.api.refinement.options import RefineOptions, options_of_search
from autoq.api.sizes import parse_bytes
from autoq.api.streamed.memory_bound import MemoryNeeds, refuse_unstreamable
from autoq.api.targeting import offers
from autoq.api.task import LoadedModel, load_data, longest_sequence, resolve_device
from autoq.formats import parse_target
from autoq.memory import available_bytes
from autoq.models import discover
from autoq.models.folder import shard_paths, storage_dtype
from autoq.models.loading import unloaded_model
from autoq.studies.maintenance import file_of


def preflight(
    model: str | Path,
    *,
    formats: Sequence[str] | None = None,
    container: str | None = None,
    target: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: str = "best",
    calibration_data: str | None = None,
    calibration_sequences: int = 128,
    sequence_length: int = 512,
    batch_size: int = 4,
    held_out_sequences: int = 32,
    measure: bool = True,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    store: str = "sqlite:///autoq.db",
    export: str | Path | None = None,
    trust_remote_code: bool = False,
    max_memory: str | int | None = None,
    kv_formats: Sequence[str] | None = None,
    kv_bits: float | None = None,
    kv_scope: str | None = None,
    refine: int = 0,
    refine_options: Mapping[str, Any] | None = None,
    workers: int = 1,
    devices: int | None = None,
    ray: str | None = None,
    reads_data: bool = True,
    cluster_may_grow: bool = False,
) -> Preflight:
    """Estimate a search from the model's configuration and headers; no weight is read.

    The arguments are those of `autoq.search`. A Ray cluster is asked what it has, for a few seconds
    at most.

    Args:
        reads_data: read the calibration data, and that of tasks, too, to refuse at once what is
            too short or cannot be had.
        cluster_may_grow: note that a cluster has not room for `workers` yet, and do not refuse: the
            search will want them when it has scored.
    Raises:
        InputError, ModelError, DataError: as the search would raise them: shards that are missing,
            a folder that cannot be read, an unknown format, too few tokens, a bound on memory that
            is too small, more workers than there are devices.
    """
    path = Path(model)
    goal = None if target is None else parse_target(target)
    offer = offers(goal, formats, container)[0]
    config = ScoringConfig(
        formats=offer.formats,
        container=offer.container,
        include=tuple(include),
        exclude=tuple(exclude),
        calibration=parse_calibration(calibration),
        calibration_data=calibration_data,
        calibration_sequences=calibration_sequences,
        sequence_length=sequence_length,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    is_stated = goal is not None or container is not None or export is not None
    wish = cache_wish(
        kv_formats,
        kv_bits,
        kv_scope,
        target=goal,
        container=config.container if is_stated else None,
    )
    refining = options_of_search(refine, refine_options, held_out_sequences)
    if refining is not None:
        _check_trials(refining, path, store, workers, config, reads_data=reads_data)
    if max_memory is not None:
        _refuse_unstreamable(config, wish is not None, refine, devices, ray)
    cluster = None if ray is None else cluster_at(ray)
    work = replace(
        _workload(path, config, held_out_sequences if measure else 0, export is not None),
        scorers=scoring_team(devices, cluster, device=device),
        refining=refining,
        trial_workers=ALONE
        if refining is None
        else trials_team(workers, cluster, device=device, may_grow=cluster_may_grow),
        scores_cache=wish is not None,
    )
    if reads_data:
        _read_data(work, path)
    return _estimate(work, path, cluster, max_memory, store, export)


def _estimate(
    work: Workload,
    path: Path,
    cluster: Cluster | None,
    max_memory: str | int | None,
    store: str,
    export: str | Path | None,
) -> Preflight:
    device = resolve_device(work.config.device)
    is_cpu = device.type == "cpu"
    used, shared = _own_bytes() if is_cpu else (0, 0)
    memory = Memory(used, shared, available_bytes(device))
    own, machine = memory_by_stage(work, memory), memory_of_machine(work, memory)
    needs, temporary = _needs_of(work, path), 0
    on_gpus = free_bytes_of_gpus(work.scorers.devices)
    if max_memory is not None:
        bound = parse_bytes(max_memory)
        needs.refuse_less(bound)
        own = machine = {name: min(peak, bound) for name, peak in own.items()}
        temporary = max(0, needs.kept_at_least(work.calibration_tokens) - needs.room_of(bound))
    found = Preflight(
        seconds=seconds_by_stage(work, AllRates.measured(work, device)),
        memory_bytes=own,
        machine_bytes=machine,
        workers=_workers(work, memory),
        store_bytes=store_bytes(work),
        checkpoint_bytes=work.checkpoint_bytes if work.exports else 0,
        temporary_bytes=temporary,
        outputs_bytes=outputs_bytes(work, file_of(store)),
        free_memory_bytes=memory.free_bytes,
        used_memory_bytes=memory.used_bytes,
        misfits=(),
        notes=(*notes_of_search(work, cluster), *notes_of_gpus(work, on_gpus)),
    )
    lacking = memory_misfits(
        work,
        memory,
        found,
        cluster,
        device=str(device),
        streamed_bytes=needs.least,
        free_on_gpus=on_gpus or {},
    )
    return replace(found, misfits=(*lacking, *disk_misfits(found, work, store, export)))


def _check_trials(
    refining: RefineOptions,
    path: Path,
    store: str,
    workers: int,
    config: ScoringConfig,
    *,
    reads_data: bool,
) -> None:
    """
    Raises:
        InputError: as the search would, before it begins.
    """
    if reads_data:
        check_before_search(refining, path, store, workers, config.trust_remote_code)
    else:
        check_workers(workers, has_folder=True, store_url=store)


def _refuse_unstreamable(
    config: ScoringConfig, has_wish: bool, refine: int, devices: int | None, ray: str | None
) -> None:
    """
    Raises:
        InputError: something needs the model in memory.
    """
    others = (
        (has_wish, "--kv-formats"),
        (refine > 0, "--refine"),
        (devices not in (None, 1) or ray is not None, "--devices, --ray and torchrun"),
    )
    refuse_unstreamable(config, is_module=False, others=others)


def _workers(work: Workload, memory: Memory) -> tuple[WorkerNeeds, ...]:
    found = []
    for stage, bytes_ in memory_of_workers(work, memory).items():
        team = work.scorers if stage == "scoring" else work.trial_workers
        found.append(
            WorkerNeeds(stage=stage, count=team.others, memory_bytes=bytes_, place=_place(team))
        )
    return tuple(found)


def _place(team: Team) -> str:
    return ", ".join(team.devices) or team.place


def _workload(path: Path, config: ScoringConfig, held_out: int, exports: bool) -> Workload:
    dtype = _dtype(path, config)
    model = unloaded_model(path, trust_remote_code=config.trust_remote_code).to(dtype)
    longest = longest_sequence(model)
    return Workload(
        model=model,
        model_map=discover(model, include=config.include, exclude=config.exclude),
        config=config,
        tokens_in_sequence=min(config.sequence_length, longest or config.sequence_length),
        held_out_sequences=held_out,
        exports=exports,
        dtype=dtype,
        stored_bytes=sum(shard.stat().st_size for shard in shard_paths(path)),
        is_mapped=resolve_device(config.device).type == "cpu"
        and dtype == getattr(torch, storage_dtype(path)),
    )


def _dtype(path: Path, config: ScoringConfig) -> torch.dtype:
    """As `autoq.api.task.load` chooses it."""
    name = config.dtype
    if name == "auto":
        on_cpu = resolve_device(config.device).type == "cpu"
        name = "float32" if on_cpu else storage_dtype(path)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _read_data(work: Workload, path: Path) -> None:
    """
    Raises:
        DataError: the data cannot be read, or are too few.
        ModelError: the folder has no tokenizer for text.
    """
    config = work.config
    loaded = LoadedModel(work.model, path, "", work.dtype, config.trust_remote_code)
    wanted = [("calibration", config.calibration_sequences)]
    if work.held_out_sequences:
        wanted.append(("held_out", work.held_out_sequences))
    for split, sequences in wanted:
        load_data(
            loaded,
            config.calibration_data,
            sequences=sequences,
            sequence_length=config.sequence_length,
            split=split,  # type: ignore[arg-type]
            seed=config.seed,
        )


def _own_bytes() -> tuple[int, int]:
    """What this process has, libraries for the most part, as the search will; and the pages of it
    that processes of a machine share."""
    memory = psutil.Process().memory_info()
    return int(memory.rss), int(getattr(memory, "shared", 0))


def _needs_of(work: Workload, path: Path) -> MemoryNeeds:
    """Of the same search with its blocks read one by one."""
    return MemoryNeeds.of(
        LoadedModel(work.model, path, "", work.dtype), work.model_map, work.config
    )
