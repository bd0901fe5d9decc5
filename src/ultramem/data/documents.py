"""The unit that travels from a source to the token files: one text with where it came from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: the text, as decoded; not empty.
        identifier: name of the document within its source.
        source: the file, data set or named corpus that it was read from.
        location: line (from 1), row or place of the document within its source.
        keep_in_train: never put this document into the validation part.
    """

    text: str
    identifier: str
    source: str
    location: int
    keep_in_train: bool = False
