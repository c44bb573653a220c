"""Sentences whose verbs agree with their subjects, over relative clauses of bounded depth."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from autoq.bundled.lexicon import (
    PLURAL_NOUN_ENDING,
    PLURAL_VERB_ENDING,
    SINGULAR_VERB_ENDING,
    Topic,
    world,
)

_PREPOSITIONS = ("near", "under", "beside", "with")
_ADVERBS = ("today", "again", "often", "slowly")
_MAXIMUM_DEPTH = 2


@dataclass
class Document:
    """What the lines of one document share."""

    generator: random.Random
    topic: Topic
    people: list[str]
    codes: dict[str, str] = field(default_factory=dict)

    def person(self) -> str:
        """One of the people of this document, or now and then another one."""
        if self.generator.random() < 0.7:
            return self.generator.choice(self.people)
        return self.topic.people.pick(self.generator)


def sentence(document: Document) -> str:
    """One or two clauses and a full stop."""
    generator = document.generator
    words = _clause(document)
    if generator.random() < 0.25:
        words += ["and", *_clause(document)]
    return " ".join([*words, "."])


def _clause(document: Document) -> list[str]:
    subject, verb = _subject(document, depth=0)
    words = [*subject, verb]
    if document.generator.random() < 0.7:
        words += _noun_phrase(document, depth=1)
    if document.generator.random() < 0.3:
        words.append(document.generator.choice(_ADVERBS))
    return words


def _subject(document: Document, depth: int) -> tuple[list[str], str]:
    """A noun phrase and a verb that agrees with its head."""
    generator = document.generator
    if generator.random() < 0.12:
        verb = generator.choice(world().verbs)
        return [document.person()], inflect_verb(verb, plural=False)
    noun = document.topic.nouns.pick(generator)
    plural = generator.random() < 0.5
    verb = world().verbs_of_noun[noun].pick(generator)
    return phrase_of(document, noun, plural, depth), inflect_verb(verb, plural)


def _noun_phrase(document: Document, depth: int) -> list[str]:
    if document.generator.random() < 0.12:
        return [document.person()]
    noun = document.topic.nouns.pick(document.generator)
    return phrase_of(document, noun, document.generator.random() < 0.5, depth)


def phrase_of(document: Document, noun: str, plural: bool, depth: int) -> list[str]:
    """A noun phrase with the given head; modifiers stop at the maximum depth."""
    generator = document.generator
    words = ["the"]
    if generator.random() < 0.35:
        words.append(document.topic.adjectives.pick(generator))
    words.append(inflect_noun(noun, plural))
    if depth < _MAXIMUM_DEPTH:
        words += _modifier(document, noun, plural, depth)
    return words


def _modifier(document: Document, noun: str, plural: bool, depth: int) -> list[str]:
    generator = document.generator
    draw = generator.random()
    if draw < 0.18:
        return [generator.choice(_PREPOSITIONS), *_noun_phrase(document, depth + 1)]
    if draw < 0.30:
        verb = world().verbs_of_noun[noun].pick(generator)
        return ["that", inflect_verb(verb, plural), *_noun_phrase(document, depth + 1)]
    if draw < 0.42:
        subject, inner_verb = _subject(document, depth + 1)
        return ["that", *subject, inner_verb]
    return []


def inflect_noun(noun: str, plural: bool) -> str:
    """The form of a noun for its number."""
    return noun + PLURAL_NOUN_ENDING if plural else noun


def inflect_verb(verb: str, plural: bool) -> str:
    """The form of a verb for the number of its subject."""
    return verb + (PLURAL_VERB_ENDING if plural else SINGULAR_VERB_ENDING)
