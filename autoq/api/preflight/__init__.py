"""What a search will need of time, memory and disk, before any weight is read, and whether it fits."""

from autoq.api.preflight.estimating import preflight
from autoq.api.preflight.found import Misfit, Preflight, WorkerNeeds

__all__ = ["Misfit", "Preflight", "WorkerNeeds", "preflight"]
