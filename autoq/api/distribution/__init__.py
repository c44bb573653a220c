"""Scoring by several processes: on one machine, as ranks that torchrun started, or on a Ray cluster.

Workers score the batches that they are given; the process that holds the study's lease collects
them in their order and alone writes to the store. What a study holds is the same, bit for bit,
however many there were and whoever of them was lost.
"""

from autoq.api.distribution.crew import Crew, Helpers, at_hand, crew_of
from autoq.api.distribution.dealing import WorkersLostError

__all__ = ["Crew", "Helpers", "WorkersLostError", "at_hand", "crew_of"]
