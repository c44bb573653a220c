"""The invented words and the fixed world of the artificial language.

Every word is put together from syllables by this module with a constant seed, so the lexicon and
the facts are the same in every process and on every machine.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import cache

_WORLD_SEED = 20_240_817
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st", "kl")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "m", "n", "r", "s", "k", "t")

TOPIC_COUNT = 12
NOUN_COUNT = 80
VERB_COUNT = 40
ADJECTIVE_COUNT = 24
PERSON_COUNT = 48
PLACE_COUNT = 24
REGION_COUNT = 8
GOOD_COUNT = 16
COLOUR_COUNT = 10

PLURAL_NOUN_ENDING = "i"
SINGULAR_VERB_ENDING = "a"
PLURAL_VERB_ENDING = "en"

_FUNCTION_WORDS = frozenset(
    [
        "the",
        "that",
        "near",
        "under",
        "beside",
        "with",
        "and",
        "in",
        "is",
        "of",
        "for",
        "lives",
        "sells",
        "friend",
        "wears",
        "lies",
        "famous",
        "region",
        "question",
        "answer",
        "where",
        "does",
        "live",
        "what",
        "sell",
        "who",
        "which",
        "colour",
        "wear",
        "lie",
        "code",
        "recall",
        "copy",
        "reverse",
        "today",
        "again",
        "often",
        "slowly",
    ]
)


@dataclass(frozen=True)
class Relation:
    """One property of a person or place: how it is stated, how it is asked, and its values."""

    name: str
    statements: tuple[str, ...]
    question: str
    values: dict[str, str]
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Weighted:
    """A list of words with cumulative weights, ready for `random.Random.choices`."""

    words: tuple[str, ...]
    cumulative_weights: tuple[float, ...]

    def pick(self, generator: random.Random) -> str:
        """Draw one word."""
        return generator.choices(self.words, cum_weights=self.cumulative_weights)[0]


@dataclass(frozen=True)
class Topic:
    """The word frequencies that hold within documents of one topic."""

    nouns: Weighted
    adjectives: Weighted
    people: Weighted
    places: Weighted


@dataclass(frozen=True)
class World:
    """All words, word preferences, topics and facts of the language."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    people: tuple[str, ...]
    places: tuple[str, ...]
    verbs_of_noun: dict[str, Weighted]
    topics: tuple[Topic, ...]
    person_relations: tuple[Relation, ...]
    place_relations: tuple[Relation, ...]


class _WordMaker:
    """Makes stems none of whose inflected forms was made before."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator
        self._used = set(_FUNCTION_WORDS)

    def make(self, count: int, syllables: int, endings: tuple[str, ...] = ("",)) -> tuple[str, ...]:
        stems: list[str] = []
        while len(stems) < count:
            stem = self._stem(syllables)
            forms = {stem + ending for ending in endings}
            if not forms & self._used:
                self._used |= forms
                stems.append(stem)
        return tuple(stems)

    def _stem(self, syllables: int) -> str:
        choice = self._generator.choice
        opening = "".join(choice(_ONSETS) + choice(_VOWELS) for _ in range(syllables))
        return opening + choice(_CODAS)


def zipf_weights(count: int, offset: float = 4.0) -> list[float]:
    """Weights that fall off like one over the rank."""
    return [1.0 / (rank + offset) for rank in range(count)]


def weighted(words: tuple[str, ...], weights: list[float]) -> Weighted:
    """Pair words with their cumulative weights."""
    return Weighted(words, tuple(itertools.accumulate(weights)))


def _favouring(words: tuple[str, ...], generator: random.Random, share: float) -> Weighted:
    favourites = set(generator.sample(words, max(2, len(words) // 5)))
    favoured_factor = share / (1.0 - share) * 4.0
    weights = [
        weight * (favoured_factor if word in favourites else 1.0)
        for word, weight in zip(words, zipf_weights(len(words)), strict=True)
    ]
    return weighted(words, weights)


def _verb_preferences(
    nouns: tuple[str, ...], verbs: tuple[str, ...], generator: random.Random
) -> dict[str, Weighted]:
    return {noun: _favouring(verbs, generator, share=0.7) for noun in nouns}


def _assign(
    keys: tuple[str, ...], candidates: tuple[str, ...], generator: random.Random
) -> dict[str, str]:
    return {key: generator.choice([word for word in candidates if word != key]) for key in keys}


def _place_relations(
    places: tuple[str, ...],
    regions: tuple[str, ...],
    goods: tuple[str, ...],
    generator: random.Random,
) -> tuple[Relation, ...]:
    return (
        Relation(
            "region of place",
            ("{key} lies in {value} .", "in {value} lies {key} ."),
            "where does {key} lie ?",
            _assign(places, regions, generator),
            regions,
        ),
        Relation(
            "fame of place",
            ("{key} is famous for {value} .",),
            "what is {key} famous for ?",
            _assign(places, goods, generator),
            goods,
        ),
    )


def _direct_person_relations(
    people: tuple[str, ...],
    places: tuple[str, ...],
    goods: tuple[str, ...],
    colours: tuple[str, ...],
    generator: random.Random,
) -> tuple[Relation, ...]:
    return (
        Relation(
            "home of person",
            ("{key} lives in {value} .", "in {value} lives {key} ."),
            "where does {key} live ?",
            _assign(people, places, generator),
            places,
        ),
        Relation(
            "ware of person",
            ("{key} sells {value} .",),
            "what does {key} sell ?",
            _assign(people, goods, generator),
            goods,
        ),
        Relation(
            "friend of person",
            ("the friend of {key} is {value} .",),
            "who is the friend of {key} ?",
            _assign(people, people, generator),
            people,
        ),
        Relation(
            "colour of person",
            ("{key} wears {value} .",),
            "which colour does {key} wear ?",
            _assign(people, colours, generator),
            colours,
        ),
    )


def _region_of_person(home: Relation, region: Relation) -> Relation:
    values = {person: region.values[place] for person, place in home.values.items()}
    return Relation(
        "region of person",
        ("the region of {key} is {value} .",),
        "which region is {key} of ?",
        values,
        region.candidates,
    )


@cache
def world() -> World:
    """Build the one world of the language (cached)."""
    generator = random.Random(_WORLD_SEED)
    maker = _WordMaker(generator)
    nouns = maker.make(NOUN_COUNT, 1, ("", PLURAL_NOUN_ENDING))
    verbs = maker.make(VERB_COUNT, 1, ("", SINGULAR_VERB_ENDING, PLURAL_VERB_ENDING))
    adjectives = maker.make(ADJECTIVE_COUNT, 1)
    people = maker.make(PERSON_COUNT, 2)
    places = maker.make(PLACE_COUNT, 2)
    regions = maker.make(REGION_COUNT, 2)
    goods = maker.make(GOOD_COUNT, 1)
    colours = maker.make(COLOUR_COUNT, 1)
    topics = tuple(
        Topic(
            *(_favouring(words, generator, 0.65) for words in (nouns, adjectives, people, places))
        )
        for _ in range(TOPIC_COUNT)
    )
    place_relations = _place_relations(places, regions, goods, generator)
    direct = _direct_person_relations(people, places, goods, colours, generator)
    return World(
        nouns=nouns,
        verbs=verbs,
        adjectives=adjectives,
        people=people,
        places=places,
        verbs_of_noun=_verb_preferences(nouns, verbs, generator),
        topics=topics,
        person_relations=(*direct, _region_of_person(direct[0], place_relations[0])),
        place_relations=place_relations,
    )
