"""What a search will need of memory and disk, from shapes alone.

Each term is a buffer that the code keeps, by its size; where a step makes many short-lived ones,
how many are alive at once was counted in the code, and the sum held against measured peaks
(`benchmarks/preflight.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoq.api.preflight.teams import Team
from autoq.api.preflight.workload import Workload
from autoq.api.refinement.measure import AVAILABLE_SHARE
from autoq.evaluators.reference import MEMORY_BYTES as REFERENCE_BYTES
from autoq.export.export import MAX_SHARD_BYTES
from autoq.formats import Container, FormatName
from autoq.search._projections import LARGEST_ERROR_BYTES, WEIGHT_ERROR_CACHE_BYTES
from autoq.search.sensitivity import KEPT_ACTIVATION_BYTES

_FLOAT = 4  # bytes of a float32

_SHARE_OF_FREE_MEMORY = 0.25
"""That moments of inputs may take: see `autoq.calibration.moments`."""

_ROUNDED_COPIES = 4
"""Matrices in float32 that are alive while one is rounded: itself, scaled, codes' values, error."""

_LOGITS_IN_SCORING = 4
"""The output, its softmax or root, the noise's direction, and the gradient."""

_LOGITS_IN_MEASURING = 3
"""The model's, the original's, and logarithms of a sequence at a time."""

_STORED_TWICE = 2
"""Arrays on their way into the store: themselves, and as the database's bytes."""

_TRIALS_BYTES = 90 * 10**6
"""What a process loads to choose and to record trials, Optuna for the most part."""

_WORKER_BYTES = 350 * 10**6
"""Python, torch, transformers and what else a process has loaded that scores, and no model yet."""

_IDLE_BYTES = 250 * 10**6
"""The same before it is told which model: transformers loads most of its parts with one."""

RAY_BYTES = 400 * 10**6
"""Ray's own processes, where a cluster is started on this machine."""

FINALISTS = 3
"""Plans that a refinement measures on fresh tokens at most."""

_CACHED_COPIES = 4
"""Keys and values of a layer in float32 while they are scored: themselves, their gradients, in a
format, and the error."""

NEW_SHARE_OF_A_TRIAL = 0.4
"""Of a forward pass, that a measured trial computes anew. The rest is what the first blocks gave to
plans before, and sequences that a hopeless plan is not measured on; see `benchmarks/trials.py`."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process has before the work begins, and what it could still take."""

    used_bytes: int  # Python, torch, transformers
    shared_bytes: int  # of these, pages of libraries that processes of a machine share
    free_bytes: int  # of which moments and caches take a share


def memory_by_stage(work: Workload, memory: Memory) -> dict[str, int]:
    """Peak of each stage of a search in the process that owns the study, in bytes."""
    stages = {
        "loading": work.stored_bytes * (work.dtype.itemsize == _FLOAT) // 2,
        "calibrating": _calibrating(work, memory.free_bytes),
        "scoring": _scoring(work) + work.calibration_bytes * (work.scorers.others > 0),  # sent
    }
    if work.scores_cache:
        stages["scoring cache"] = _scoring_cache(work)
    if work.held_out_sequences:
        stages["measuring"] = _measuring(work)
    if work.refining is not None:
        libraries = _TRIALS_BYTES if memory.used_bytes else 0  # a GPU holds none
        stages["refining"] = libraries + _refining(work, memory.free_bytes)
    if work.exports:
        stages["exporting"] = _exporting(work)
    own = memory.used_bytes + work.weight_bytes
    return {name: own + bytes_ for name, bytes_ in stages.items()}


def memory_of_workers(work: Workload, memory: Memory) -> dict[str, int]:
    """Peak of each process that works on a stage beside the owner, in bytes, by stage.

    It reads the model itself.
    """
    stages = {}
    if work.scorers.others:
        base = _WORKER_BYTES if memory.used_bytes else 0  # a GPU holds no libraries
        stages["scoring"] = base + work.weight_bytes + _scoring(work)
    if work.trial_workers.others:
        stages["refining"] = memory_by_stage(work, memory)["refining"]
    return stages


def memory_of_machine(work: Workload, memory: Memory) -> dict[str, int]:
    """Peak of each stage, of all processes that take of the owner's memory, in bytes.

    Pages of libraries count once, and those of weights that are used as the files hold them.
    Processes that score are started before calibration, to import
    what they need meanwhile.
    """
    daemons = RAY_BYTES if work.scorers.starts_ray and memory.used_bytes else 0
    stages = {name: own + daemons for name, own in memory_by_stage(work, memory).items()}
    others = memory_of_workers(work, memory)
    if work.scorers.others and not work.scorers.waits_for_start:
        others["calibrating"] = _IDLE_BYTES
    for name, bytes_ in others.items():
        team: Team = work.trial_workers if name == "refining" else work.scorers
        weights = work.mapped_bytes if name != "calibrating" else 0
        if team.shares_memory:
            stages[name] += team.others * max(0, bytes_ - memory.shared_bytes - weights)
    return stages


def _block_bytes(work: Workload) -> int:
    """What one block computes for a batch."""
    return int(work.batch_tokens * work.widths_of_block * work.dtype.itemsize)


def _calibrating(work: Workload, free_bytes: int) -> int:
    squares = [width * width * _FLOAT for width in work.input_widths]
    moments = min(sum(squares), max([int(free_bytes * _SHARE_OF_FREE_MEMORY), *squares, 0]))
    rounding = _ROUNDED_COPIES * work.largest_set * _FLOAT + 3 * max(squares, default=0)
    gathering = _block_bytes(work) + moments
    finding = moments + rounding + work.calibration_bytes
    return max(gathering, finding, _STORED_TWICE * work.calibration_bytes)


def _scoring(work: Workload) -> int:
    names: list[FormatName] = [fmt.name for fmt in work.formats]
    itemsize = work.dtype.itemsize
    errors = min(WEIGHT_ERROR_CACHE_BYTES, work.searched_weights * len(names) * itemsize)
    making = min(LARGEST_ERROR_BYTES, work.largest_set * _FLOAT) * _ROUNDED_COPIES
    handed_on = work.batch_tokens * work.hidden_width * itemsize * len(work.model_map.blocks)
    logits = _LOGITS_IN_SCORING * work.batch_tokens * work.output_width * _FLOAT
    kept = min(KEPT_ACTIVATION_BYTES, 2 * _block_bytes(work) * max(len(work.model_map.blocks), 1))
    block = 2 * _block_bytes(work)  # forward's insides and their gradients
    return work.calibration_bytes + errors + handed_on + kept + max(logits, block, making)


def _measuring(work: Workload) -> int:
    originals = work.searched_weights * work.dtype.itemsize
    output = work.batch_tokens * work.output_width * _FLOAT
    batches = -(-work.held_out_sequences // work.config.batch_size)
    reference = min(REFERENCE_BYTES, output * batches)
    running = max(_LOGITS_IN_MEASURING * output, _block_bytes(work))
    return work.calibration_bytes + originals + reference + running


def _scoring_cache(work: Workload) -> int:
    itemsize = work.dtype.itemsize
    handed_on = work.batch_tokens * work.hidden_width * itemsize * len(work.model_map.blocks)
    logits = _LOGITS_IN_SCORING * work.batch_tokens * work.output_width * _FLOAT
    cached = _CACHED_COPIES * work.batch_tokens * work.cached_elements * _FLOAT
    block = 2 * _block_bytes(work) + cached
    kept = min(KEPT_ACTIVATION_BYTES, 2 * _block_bytes(work) * max(len(work.model_map.blocks), 1))
    return work.calibration_bytes + handed_on + kept + max(logits, block)


def _refining(work: Workload, free_bytes: int) -> int:
    output = work.batch_tokens * work.output_width * _FLOAT
    running = max(_LOGITS_IN_MEASURING * output, _block_bytes(work))
    originals = work.searched_weights * work.dtype.itemsize
    kept = max(
        _kept_between_trials(work, which, plans, free_bytes)
        for which, plans in (("selection", _trials_of_a_process(work)), ("fresh", FINALISTS))
    )
    return work.calibration_bytes + originals + running + kept


def _trials_of_a_process(work: Workload) -> int:
    assert work.refining is not None  # `_refining` is for searches that have trials
    return -(-work.refining.trials // work.trial_workers.count)


def _kept_between_trials(work: Workload, which: str, plans: int, free_bytes: int) -> int:
    """The original's outputs, quantised weights, and what blocks gave, while plans are measured."""
    assert work.refining is not None
    tokens, itemsize = work.refined_tokens(which), work.dtype.itemsize
    reference = min(REFERENCE_BYTES, tokens * work.output_width * _FLOAT)
    asked = work.refining.cache_bytes
    share = int(AVAILABLE_SHARE * max(0, free_bytes - work.weight_bytes))
    bound = share // work.trial_workers.count if asked is None else asked
    weights = len(work.formats) * work.searched_weights * itemsize
    blocks = max(0, len(work.model_map.blocks) - 1)  # the last one's output serves nobody
    given = tokens * work.hidden_width * itemsize * blocks
    passes = 1 + NEW_SHARE_OF_A_TRIAL * (plans - 1)
    return reference + min(bound // 2, weights) + min(bound // 2, int(passes * given))


def _exporting(work: Workload) -> int:
    shard = min(MAX_SHARD_BYTES, work.checkpoint_bytes)
    compared = 0
    if work.config.container is Container.COMPRESSED_TENSORS:  # transformers loads it, twice
        compared = 2 * work.weight_bytes
    return work.calibration_bytes + max(shard, compared)


def largest(stages: Mapping[str, int]) -> tuple[str, int]:
    """The stage that needs most."""
    return max(stages.items(), key=lambda item: item[1])
