"""The shape of a multiple-choice question and the making of its choices."""

from __future__ import annotations

import random
from typing import TypedDict


class MultipleChoiceQuestion(TypedDict):
    """A question, its possible continuations and the index of the right one."""

    kind: str
    question: str
    choices: list[str]
    answer: int


def shuffled(
    generator: random.Random, kind: str, question: str, right: str, wrong: list[str]
) -> MultipleChoiceQuestion:
    """Put the right and the wrong choices in random order, each with a leading space."""
    words = [right, *wrong]
    generator.shuffle(words)
    return MultipleChoiceQuestion(
        kind=kind,
        question=question,
        choices=[f" {word}" for word in words],
        answer=words.index(right),
    )


def arithmetic_choices(generator: random.Random, result: int) -> list[str]:
    """Three wrong results near the right one."""
    offsets = (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11)
    near = [result + offset for offset in offsets if result + offset >= 0]
    return [str(value) for value in generator.sample(near, 3)]
