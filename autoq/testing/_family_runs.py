"""Taking one family's tiny model the whole way, in every format and container."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoq.api import auto_quantize, search
from autoq.api.exports.exporting import inexpressible
from autoq.calibration import without_unfolded_scales
from autoq.export import export_checkpoint, is_held, verify_checkpoint, verify_logits
from autoq.formats import FORMATS, NONE, FormatName
from autoq.layers import Container, LayerCalibration
from autoq.layers.simulate import slot_formats_of
from autoq.models import Assignment, GroupName, ModelMap, SlotName, discover
from autoq.models.loading import load_model, use_eager_experts
from autoq.search.costs import build_cost_table, effective_bits
from autoq.testing._family_settings import REMOTE_CODE
from autoq.testing.tiny_models import write_family_model

_SEQUENCES, _TOKENS_EACH, _HELD_OUT = 4, 24, 1
_LARGEST_ID = 260
_UNUSED_IDS = 4  # padding and the like
_GENEROUS_BITS = 8.0


class Reach(StrEnum):
    """How many of a family's groups a container holds in a format."""

    ALL = "all"
    SOME = "some"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What came of one format in one container."""

    container: Container
    format: FormatName
    groups: int  # those that can be written so
    all_groups: int
    reason: str = ""  # why others cannot

    @property
    def reach(self) -> Reach:
        """Whether all groups, some or none can be written so."""
        if not self.groups:
            return Reach.NONE
        return Reach.ALL if self.groups == self.all_groups else Reach.SOME


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """A model with its calibration, ready to be written in any plan."""

    model: nn.Module
    model_map: ModelMap
    calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration]
    source: Path
    storage_dtype: torch.dtype
    original: AbstractContextManager[None]  # in which the model has its own weights
    loads_anywhere: bool  # whether transformers can be asked for logits of token ids


def quantised_formats() -> list[FormatName]:
    """All formats but "none" that a container holds."""
    return [entry.name for entry in FORMATS.values() if entry.name != NONE and is_held(entry.name)]


def run_family(name: str, folder: Path) -> list[Cell]:
    """Search a family's tiny model, and export and read back every format in each container.

    Args:
        name: one of FAMILY_SETTINGS.
        folder: an empty one to work in.
    Returns:
        A cell for each container and format, in order. A format counts where it was exported and
        read back bit for bit; from compressed-tensors checkpoints, transformers' logits are those
        of the simulation, too.
    Raises:
        AutoqError: something that should have worked did not.
    """
    source = write_family_model(name, folder / "model")
    return [cell for c in Container for cell in _run_container(name, source, c, folder / c.value)]


def _run_container(name: str, source: Path, container: Container, work: Path) -> list[Cell]:
    model = load_model(source, trust_remote_code=name in REMOTE_CODE)
    model_map = discover(model)
    unusable = inexpressible(model, model_map, quantised_formats(), container)
    cells = list(_cells(model_map, unusable, container))
    plans = list(covering_plans(model_map, unusable))
    if plans:
        searched = _searched(name, model, source, container, plans[0], unusable, work)
        for number, plan in enumerate(plans):
            _write_and_read_back(searched, plan, container, work / f"plan-{number}")
    return cells


def _cells(
    model_map: ModelMap, unusable: Mapping[tuple[GroupName, FormatName], str], container: Container
) -> Iterator[Cell]:
    for fmt in quantised_formats():
        reasons = [unusable.get((group.name, fmt)) for group in model_map.groups]
        yield Cell(
            container=container,
            format=fmt,
            groups=reasons.count(None),
            all_groups=len(reasons),
            reason=next((reason for reason in reasons if reason is not None), ""),
        )


def covering_plans(
    model_map: ModelMap, unusable: Mapping[tuple[GroupName, FormatName], str]
) -> Iterator[dict[GroupName, FormatName]]:
    """Few plans that have, together, each format in one group at least that can take it."""
    left = {
        fmt
        for fmt in quantised_formats()
        if any((group.name, fmt) not in unusable for group in model_map.groups)
    }
    while left:
        plan: dict[GroupName, FormatName] = {}
        for group in model_map.groups:
            fits = [fmt for fmt in quantised_formats() if (group.name, fmt) not in unusable]
            wanted = [fmt for fmt in fits if fmt in left]
            plan[group.name] = (wanted or fits or [NONE])[0]
            left.discard(plan[group.name])
        yield plan


def _searched(
    name: str,
    model: nn.Module,
    source: Path,
    container: Container,
    plan: Assignment,
    unusable: Mapping[tuple[GroupName, FormatName], str],
    work: Path,
) -> _Searched:
    main_input = getattr(model, "main_input_name", "input_ids")
    if main_input != "input_ids":
        return _searched_on_features(model, source, container)
    model_map = discover(model)
    formats = _offered(model_map, unusable)
    ids = np.random.default_rng(0).integers(
        _UNUSED_IDS, _LARGEST_ID, size=(2 * (_SEQUENCES + _HELD_OUT), _TOKENS_EACH)
    )
    work.mkdir(parents=True)
    np.save(work / "ids.npy", ids)
    study = search(
        source,
        effective_bits=effective_bits(build_cost_table(model_map, [*formats, NONE]), plan),
        formats=formats,
        rules=[f"{group}={fmt}" for group, fmt in plan.items()],
        calibration_data=str(work / "ids.npy"),
        calibration_sequences=_SEQUENCES,
        sequence_length=_TOKENS_EACH,
        batch_size=_SEQUENCES // 2,
        held_out_sequences=_HELD_OUT,
        container=container.value,
        store=f"sqlite:///{work / 'studies.db'}",
        export=work / "checkpoint",
        trust_remote_code=name in REMOTE_CODE,
    )
    loaded = study.loaded()
    return _Searched(
        model=loaded.model,
        model_map=study.model_map,
        calibration=study.calibration,
        source=source,
        storage_dtype=study.storage_dtype,
        original=nullcontext(),
        loads_anywhere=name not in REMOTE_CODE,
    )


def _offered(
    model_map: ModelMap, unusable: Mapping[tuple[GroupName, FormatName], str]
) -> list[FormatName]:
    return [
        fmt
        for fmt in quantised_formats()
        if any((group.name, fmt) not in unusable for group in model_map.groups)
    ]


def _searched_on_features(model: Any, source: Path, container: Container) -> _Searched:
    """Of a model that takes sounds: through `auto_quantize`, with batches and a forward step."""
    formats = _offered(discover(model), {})
    use_eager_experts(model)
    model, state = auto_quantize(
        model,
        {"effective_bits": _GENEROUS_BITS},
        formats,
        [_features(model, seed) for seed in range(2)],
        lambda model, batch: model(**batch).logits,
    )
    return _Searched(
        model=model,
        model_map=state.model_map,
        calibration=state.calibration,
        source=source,
        storage_dtype=state.storage_dtype,
        original=state.simulated.paused(),
        loads_anywhere=False,
    )


def _features(model: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    frames = 2 * config.max_source_positions  # the encoder's convolutions halve them
    sounds = torch.randn(2, config.num_mel_bins, frames, generator=generator)
    ids = torch.randint(_UNUSED_IDS, _LARGEST_ID, (2, _TOKENS_EACH), generator=generator)
    return {"input_features": sounds.to(model.dtype), "decoder_input_ids": ids}


def _write_and_read_back(
    searched: _Searched, plan: Assignment, container: Container, destination: Path
) -> None:
    slot_formats = slot_formats_of(searched.model_map, plan)
    with searched.original:
        calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration] = searched.calibration
        if container is Container.COMPRESSED_TENSORS:
            calibration, _ = without_unfolded_scales(
                searched.model,
                searched.model_map,
                slot_formats,
                calibration,
                searched.storage_dtype,
            )
        export_checkpoint(
            searched.model,
            searched.model_map,
            slot_formats,
            calibration,
            source=searched.source,
            destination=destination,
            container=container,
            scale_dtype=searched.storage_dtype,
        )
        verify_checkpoint(
            destination,
            searched.model,
            searched.model_map,
            slot_formats,
            calibration,
            container,
            searched.storage_dtype,
        )
    if container is Container.COMPRESSED_TENSORS and searched.loads_anywhere:
        verify_logits(destination, _token_ids())


def _token_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(_UNUSED_IDS, _LARGEST_ID, (1, _TOKENS_EACH), generator=generator)
