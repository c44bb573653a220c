"""A deterministic artificial language: documents to train on and questions with exact answers.

A document has one topic, which sets its word frequencies, and a few lines of different kinds:
sentences with agreement over nested clauses, brackets, arithmetic, copying and reversal, codes to
be recalled later in the document, facts of a fixed world, and questions with their answers.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator

from autoq.bundled.lexicon import Relation, world
from autoq.bundled.questions import MultipleChoiceQuestion, arithmetic_choices, shuffled
from autoq.bundled.sentences import Document, inflect_verb, phrase_of, sentence

__all__ = ["SPLITS", "MultipleChoiceQuestion", "documents", "multiple_choice_questions"]

SPLITS = ("train", "calibration", "held_out")

_LETTERS = "abcdefghklmnoprst"
_BRACKETS = (("(", ")"), ("[", "]"), ("<", ">"))


def documents(seed: int, split: str = "train") -> Iterator[str]:
    """Yield documents without end.

    Each document has its own random stream derived from split, seed and position, so the streams
    of different splits are disjoint by construction.
    """
    _check_split(split)
    for index in itertools.count():
        yield _document(_generator_for("document", split, seed, index))


def multiple_choice_questions(
    seed: int, count: int, split: str = "held_out"
) -> list[MultipleChoiceQuestion]:
    """Return `count` questions; the kinds take turns, and choices start with a space.

    A choice is appended to its question as it is: a model answers by the likelihood it gives to
    the choice after the question. `answer` is the index of the right choice.
    """
    _check_split(split)
    makers = (_fact_choice, _arithmetic_choice, _agreement_choice, _recall_choice)
    return [
        makers[index % len(makers)](_new_document(_generator_for("question", split, seed, index)))
        for index in range(count)
    ]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def _generator_for(purpose: str, split: str, seed: int, index: int) -> random.Random:
    digest = hashlib.sha256(f"{purpose}/{split}/{seed}/{index}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _new_document(generator: random.Random) -> Document:
    topic = generator.choice(world().topics)
    people = [topic.people.pick(generator) for _ in range(3)]
    return Document(generator, topic, people)


def _document(generator: random.Random) -> str:
    document = _new_document(generator)
    # Documents differ in their mixture of lines: each line kind is scaled by its own draw.
    weights = [weight * generator.expovariate(1.0) for _, weight in _LINES]
    makers = [maker for maker, _ in _LINES]
    chosen = generator.choices(makers, weights=weights, k=generator.randint(6, 16))
    return "\n".join(maker(document) for maker in chosen) + "\n"


# --- brackets, copying, codes ------------------------------------------------------------------


def _brackets(document: Document) -> str:
    generator = document.generator
    words: list[str] = []
    open_brackets: list[str] = []
    for _ in range(generator.randint(4, 10)):
        draw = generator.random()
        if draw < 0.45:
            opening, closing = generator.choice(_BRACKETS)
            words.append(opening)
            open_brackets.append(closing)
        elif draw < 0.7 and open_brackets:
            words.append(open_brackets.pop())
        else:
            words.append(document.topic.nouns.pick(generator))
    return " ".join([*words, *reversed(open_brackets), "."])


def _letters(generator: random.Random, shortest: int, longest: int) -> list[str]:
    return generator.choices(_LETTERS, k=generator.randint(shortest, longest))


def _copying(document: Document) -> str:
    letters = _letters(document.generator, 3, 8)
    if document.generator.random() < 0.5:
        return f"copy {' '.join(letters)} : {' '.join(letters)} ."
    return f"reverse {' '.join(letters)} : {' '.join(reversed(letters))} ."


def _code(document: Document) -> str:
    generator = document.generator
    if document.codes and generator.random() < 0.6:
        noun = generator.choice(sorted(document.codes))
        return f"recall the code of the {noun} : {document.codes[noun]} ."
    noun = document.topic.nouns.pick(generator)
    document.codes[noun] = " ".join(_letters(generator, 2, 4))
    return f"the code of the {noun} is {document.codes[noun]} ."


# --- arithmetic --------------------------------------------------------------------------------


def _problem(generator: random.Random) -> tuple[str, int]:
    operation = generator.choices("+-*%", weights=(4, 3, 2, 1))[0]
    if operation == "*":
        first, second = generator.randint(2, 12), generator.randint(2, 12)
        return f"{first}*{second}", first * second
    if operation == "%":
        first, second = generator.randint(1, 99), generator.randint(2, 9)
        return f"{first}%{second}", first % second
    limit = generator.choices((9, 99, 999), weights=(2, 6, 2))[0]
    first, second = generator.randint(0, limit), generator.randint(0, limit)
    if operation == "+":
        return f"{first}+{second}", first + second
    first, second = max(first, second), min(first, second)
    return f"{first}-{second}", first - second


def _arithmetic(document: Document) -> str:
    if document.generator.random() < 0.2:
        expression, result = _problem(document.generator)
        return f"question : what is {expression} ? answer : {result} ."
    problems = [_problem(document.generator) for _ in range(document.generator.randint(1, 3))]
    return " , ".join(f"{expression}={result}" for expression, result in problems) + " ."


# --- facts -------------------------------------------------------------------------------------


def _relation_and_key(document: Document) -> tuple[Relation, str]:
    generator = document.generator
    if generator.random() < 0.2:
        relation = generator.choice(world().place_relations)
        return relation, document.topic.places.pick(generator)
    return generator.choice(world().person_relations), document.person()


def _fact(document: Document) -> str:
    relation, key = _relation_and_key(document)
    value = relation.values[key]
    if document.generator.random() < 0.3:
        return f"question : {relation.question.format(key=key)} answer : {value} ."
    return document.generator.choice(relation.statements).format(key=key, value=value)


_LINES: tuple[tuple[Callable[[Document], str], float], ...] = (
    (sentence, 0.34),
    (_brackets, 0.05),
    (_copying, 0.08),
    (_code, 0.10),
    (_arithmetic, 0.20),
    (_fact, 0.23),
)


# --- multiple choice ---------------------------------------------------------------------------


def _fact_choice(document: Document) -> MultipleChoiceQuestion:
    generator = document.generator
    relation = generator.choice([*world().person_relations, *world().place_relations])
    key = generator.choice(sorted(relation.values))
    right = relation.values[key]
    wrong = [word for word in relation.candidates if word not in (right, key)]
    question = f"question : {relation.question.format(key=key)} answer :"
    return shuffled(generator, "fact", question, right, generator.sample(wrong, 3))


def _arithmetic_choice(document: Document) -> MultipleChoiceQuestion:
    expression, result = _problem(document.generator)
    wrong = arithmetic_choices(document.generator, result)
    question = f"question : what is {expression} ? answer :"
    return shuffled(document.generator, "arithmetic", question, str(result), wrong)


def _agreement_choice(document: Document) -> MultipleChoiceQuestion:
    generator = document.generator
    noun = document.topic.nouns.pick(generator)
    plural = generator.random() < 0.5
    phrase: list[str] = []
    while len(phrase) < 5:
        phrase = phrase_of(document, noun, plural, depth=0)
    verb = world().verbs_of_noun[noun].pick(generator)
    right, wrong = inflect_verb(verb, plural), inflect_verb(verb, not plural)
    return shuffled(generator, "agreement", " ".join(phrase), right, [wrong])


def _recall_choice(document: Document) -> MultipleChoiceQuestion:
    generator = document.generator
    nouns = generator.sample(world().nouns, 2)
    codes = [" ".join(generator.sample(_LETTERS, 3)) for _ in range(4)]
    lines = [
        f"the code of the {noun} is {code} ." for noun, code in zip(nouns, codes, strict=False)
    ]
    question = "\n".join([*lines, f"recall the code of the {nouns[0]} :"])
    return shuffled(generator, "recall", question, codes[0], codes[1:])
