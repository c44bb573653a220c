"""A task's examples as data: which of them are run, and what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoq.errors import InputError

FEWEST_FRESH_EXAMPLES = 32
"""Of a task; a paired difference over fewer says next to nothing of right and wrong answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplePart:
    """One of two halves of a task's examples, for choosing by and for confirming on.

    Examples are parted by a hash of the seed and their content, so the parts do not depend on the
    order of the data, and equal examples of a task are in one part. Of a task with too few, or a
    group with a task of one example, nothing is held out: all of it chooses, and there is nothing
    to confirm on.
    """

    seed: int
    fresh: bool  # the half that chooses nothing; False: the other

    def indices(self, examples: Mapping[str, Sequence[Any]]) -> dict[str, list[int]]:
        """Task -> places of its examples that are in this part, rising.

        Args:
            examples: task -> its examples; the tasks of one group together.
        """
        fresh = {task: self._fresh_indices(own) for task, own in examples.items()}
        # A group's number needs all of its tasks.
        if sum(map(len, fresh.values())) < FEWEST_FRESH_EXAMPLES or not all(fresh.values()):
            fresh = {task: [] for task in examples}
        if self.fresh:
            return fresh
        return {
            task: sorted(set(range(len(own))) - set(fresh[task])) for task, own in examples.items()
        }

    def _fresh_indices(self, examples: Sequence[Any]) -> list[int]:
        keys = [self._key(example) for example in examples]
        distinct = sorted(set(keys))
        held_out = set(distinct[: len(distinct) // 2])
        return [index for index, key in enumerate(keys) if key in held_out]

    def _key(self, example: Any) -> str:
        return hashlib.sha256(f"{self.seed}/{content_of(example)}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleCount:
    """How many examples of a task, or of a group's tasks together, chose nothing."""

    fresh: int
    everything: int

    @property
    def suffices(self) -> bool:
        """Whether there are enough to confirm on."""
        return self.fresh >= FEWEST_FRESH_EXAMPLES


def chosen_samples(
    name: str, part: ExamplePart, examples: Mapping[str, Sequence[Any]]
) -> dict[str, list[int]]:
    """As `ExamplePart.indices`, for the harness, which takes an empty list for everything.

    Raises:
        InputError: a task has no example in this part.
    """
    found = part.indices(examples)
    for task, indices in found.items():
        if not indices:
            raise InputError(
                f"{name} has no fresh examples of {task}, of {len(examples[task])} in all, and "
                f"{FEWEST_FRESH_EXAMPLES} are needed to confirm on; name a larger task"
            )
    return found


def content_of(example: Any) -> str:
    """An example as text: equal for equal content, in every process."""
    return json.dumps(example, sort_keys=True, ensure_ascii=False, default=_plain)


def samples_sha256(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Hash of what a model was asked: the documents, prompts and answers, in order.

    Args:
        samples: task -> the harness's samples, of which each document may have several.
    """
    digest = hashlib.sha256()
    for task, own in sorted(samples.items()):
        for number, sample in sorted({sample["doc_id"]: sample for sample in own}.items()):
            parts = [content_of(sample["doc"]), sample["prompt_hash"], sample["target_hash"]]
            digest.update(json.dumps([task, number, *parts]).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    text = str(value)
    # Where it lies in memory is no content.
    return type(value).__name__ if " at 0x" in text else text
