"""Writing what `auto_quantize` found as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoq.export import ExportResult, export_checkpoint, verify_checkpoint
from autoq.formats import Container
from autoq.layers.simulate import slot_formats_of

if TYPE_CHECKING:
    from autoq.api.auto_quantizing import AutoQuantizeState


def export_state(
    state: AutoQuantizeState,
    destination: Path,
    source: str | Path | None,
    *,
    overwrite: bool,
) -> ExportResult:
    """See `AutoQuantizeState.export`; meanwhile the model has its own weights."""
    formats = slot_formats_of(state.model_map, state.plan.assignment)
    container, scale_dtype = Container.MODELOPT, state.storage_dtype
    model, model_map, table = state.simulated.model, state.model_map, state.calibration

    def verify(folder: Path) -> None:
        verify_checkpoint(
            folder,
            model,
            model_map,
            formats,
            table,
            container,
            scale_dtype,
            kv_cache=state.kv_cache,
        )

    with state.simulated.paused():
        return export_checkpoint(
            model,
            model_map,
            formats,
            table,
            source=None if source is None else Path(source),
            destination=destination,
            container=container,
            scale_dtype=scale_dtype,
            kv_cache=state.kv_cache,
            overwrite=overwrite,
            provenance={"effective_bits": state.plan.effective_bits},
            verify=verify,
        )
