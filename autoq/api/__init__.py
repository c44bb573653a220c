"""The main job as functions: search, study, export, evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoq.lazy import names_from

if TYPE_CHECKING:
    from autoq.api.auto_quantizing import AutoQuantizeState, auto_quantize
    from autoq.api.config import ScoringConfig
    from autoq.api.evaluating.evaluation import evaluate
    from autoq.api.exports.compressing import compress
    from autoq.api.loading import generate, load
    from autoq.api.opening import DEFAULT_STORE, list_studies, open_study
    from autoq.api.pipeline import search
    from autoq.api.study import Study

__all__ = [
    "DEFAULT_STORE",
    "AutoQuantizeState",
    "ScoringConfig",
    "Study",
    "auto_quantize",
    "compress",
    "evaluate",
    "generate",
    "list_studies",
    "load",
    "open_study",
    "search",
]


__getattr__ = names_from(
    __name__,
    {
        "autoq.api.auto_quantizing": ("AutoQuantizeState", "auto_quantize"),
        "autoq.api.exports.compressing": ("compress",),
        "autoq.api.config": ("ScoringConfig",),
        "autoq.api.evaluating.evaluation": ("evaluate",),
        "autoq.api.loading": ("generate", "load"),
        "autoq.api.opening": ("DEFAULT_STORE", "list_studies", "open_study"),
        "autoq.api.pipeline": ("search",),
        "autoq.api.study": ("Study",),
    },
)
