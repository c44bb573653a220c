"""What a search will need of time, memory and disk, before any weight is read, and whether it fits."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from autoq.api._preflight_memory import (
    Workload,
    free_disk_bytes,
    largest,
    memory_by_stage,
    store_bytes,
)
from autoq.api._preflight_time import measured_rates, seconds_by_stage
from autoq.api.config import ScoringConfig, parse_calibration
from autoq.api.memory_bound import MemoryNeeds
from autoq.api.sizes import parse_bytes
from autoq.api.targeting import offers
from autoq.api.task import LoadedModel, load_data, longest_sequence, resolve_device
from autoq.formats import parse_target
from autoq.memory import available_bytes
from autoq.models import discover
from autoq.models.folder import shard_paths, storage_dtype
from autoq.models.loading import unloaded_model
from autoq.studies.maintenance import file_of

_BOUND_STEP = 10**8  # bytes, of a bound that is proposed
_SAFE_SHARE = 0.95
"""Of what is free: estimates are no measurements, and other programs live here, too."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """Something that there is not enough of."""

    what: str  # "memory" or "disk"
    place: str  # the device, or the folder
    needed_bytes: int
    free_bytes: int
    remedies: tuple[str, ...]  # each would make it fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The estimate; `benchmarks/preflight.py` holds it against what searches take."""

    seconds: Mapping[str, float]  # by stage
    memory_bytes: Mapping[str, int]  # peak of each stage
    store_bytes: int
    checkpoint_bytes: int  # 0 where none is written
    temporary_bytes: int  # what blocks give and memory does not hold; 0 with the model in memory
    free_memory_bytes: int  # that the process could still take
    used_memory_bytes: int  # that it has already, and that is part of the peaks
    misfits: tuple[Misfit, ...]

    @property
    def fits(self) -> bool:
        """Whether all of it fits."""
        return not self.misfits

    @property
    def peak_bytes(self) -> int:
        """Of resident memory, over all stages."""
        return largest(self.memory_bytes)[1]

    @property
    def total_seconds(self) -> float:
        """Of all stages."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "peak_stage": largest(self.memory_bytes)[0],
            "total_seconds": self.total_seconds,
        }


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
    reads_data: bool = True,
) -> Preflight:
    """Estimate a search from the model's configuration and headers; no weight is read.

    The arguments are those of `autoq.search`. Refinement is not counted: it takes as long as its
    trials are asked to.

    Args:
        reads_data: read the calibration data, too, to refuse at once what is too short.
    Raises:
        InputError, ModelError, DataError: as the search would raise them: shards that are missing,
            a folder that cannot be read, an unknown format, too few tokens, a bound on memory that
            is too small.
    """
    path = Path(model)
    offer = offers(None if target is None else parse_target(target), formats, container)[0]
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
    work = _workload(path, config, held_out_sequences if measure else 0, export is not None)
    if reads_data:
        _read_data(work, path)
    place = resolve_device(device)
    used = _used_bytes() if place.type == "cpu" else 0
    free = available_bytes(place)
    stages = memory_by_stage(work, used, free)
    needs, temporary = _needs_of(work, path), 0
    if max_memory is not None:
        bound = parse_bytes(max_memory)
        needs.refuse_less(bound)
        stages = {name: min(peak, bound) for name, peak in stages.items()}
        temporary = max(0, needs.kept_at_least(work.calibration_tokens) - needs.room_of(bound))
    found = Preflight(
        seconds=seconds_by_stage(work, measured_rates(work, place)),
        memory_bytes=stages,
        store_bytes=store_bytes(work),
        checkpoint_bytes=work.checkpoint_bytes if export is not None else 0,
        temporary_bytes=temporary,
        free_memory_bytes=free,
        used_memory_bytes=used,
        misfits=(),
    )
    memory = _memory_misfit(work, found, str(place), needs.least)
    disk = _disk_misfits(found, store, export)
    return replace(found, misfits=(*memory, *disk))


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


def _used_bytes() -> int:
    """What this process has: libraries for the most part, as the search will."""
    return int(psutil.Process().memory_info().rss)


def _needs_of(work: Workload, path: Path) -> MemoryNeeds:
    """Of the same search with its blocks read one by one."""
    return MemoryNeeds.of(
        LoadedModel(work.model, path, "", work.dtype), work.model_map, work.config
    )


def _memory_misfit(
    work: Workload, found: Preflight, place: str, streamed_bytes: int
) -> tuple[Misfit, ...]:
    room = int(found.used_memory_bytes + found.free_memory_bytes * _SAFE_SHARE)
    if found.peak_bytes <= room:
        return ()
    remedies = []
    for option, smaller in _smaller_searches(work):
        stages = memory_by_stage(smaller, found.used_memory_bytes, found.free_memory_bytes)
        if largest(stages)[1] <= room:
            remedies.append(option)
    bound = room // _BOUND_STEP * _BOUND_STEP
    if streamed_bytes <= bound:
        remedies.append(f"--max-memory {bound / 1e9:.1f}GB")
    return (Misfit("memory", place, found.peak_bytes, room, tuple(remedies)),)


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
    if work.dtype.itemsize == torch.float32.itemsize:
        half = replace(config, dtype="bfloat16")
        found.append(("--dtype bfloat16", replace(work, config=half, dtype=torch.bfloat16)))
    least = replace(one, sequence_length=length, calibration=plain.calibration, dtype="bfloat16")
    everything = replace(
        work,
        config=least,
        tokens_in_sequence=length,
        held_out_sequences=0,
        dtype=torch.bfloat16,
    )
    together = (
        f"--batch-size 1 --sequence-length {length} --calibration scales --no-measure "
        "--dtype bfloat16"
    )
    return [*found, (together, everything)]


def _disk_misfits(found: Preflight, store: str, export: str | Path | None) -> list[Misfit]:
    """Places with too little room; a store and a checkpoint on one disk share it."""
    places: dict[int, tuple[Path, int, list[str]]] = {}
    file = file_of(store)
    if file is not None:
        _add(places, file, found.store_bytes, "--store on another disk")
    if export is not None:
        _add(places, Path(export), found.checkpoint_bytes, "--export on another disk")
    if found.temporary_bytes:
        temporary = Path(tempfile.gettempdir())
        _add(places, temporary, found.temporary_bytes, "TMPDIR on another disk")
    misfits = []
    for path, needed, remedies in places.values():
        free = free_disk_bytes(path)
        if needed > free * _SAFE_SHARE:
            misfits.append(Misfit("disk", str(path), needed, free, tuple(remedies)))
    return misfits


def _add(
    places: dict[int, tuple[Path, int, list[str]]], path: Path, needed: int, remedy: str
) -> None:
    above = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    disk = above.stat().st_dev
    first, before, remedies = places.get(disk, (path, 0, []))
    places[disk] = (first, before + needed, [*remedies, remedy])
