"""The main job as functions: search, study, export, evaluate."""

from autoq.api.auto_quantize import AutoQuantizeState, auto_quantize
from autoq.api.compressing import compress
from autoq.api.config import ScoringConfig
from autoq.api.evaluation import evaluate
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
