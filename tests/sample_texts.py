"""Small distinct texts for the tests of data preparation, and the call that most of them make."""

from pathlib import Path

from ultramem.data.documents import Document
from ultramem.data.manifest import DataManifest
from ultramem.data.prepare import PrepareConfig, prepare

SENTENCE = "the river of a country flows to its sea and nobody counts how many stones it carries on some long way"
WORDS = SENTENCE.split()


def make_texts(count: int) -> list[str]:
    """Texts of a dozen words that a tokenizer can learn from; no two are equal."""
    return [
        f"{number} " + " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 12)) for number in range(count)
    ]


def make_documents(texts: list[str]) -> list[Document]:
    """Documents of a source called "memory"."""
    return [Document(text, f"doc-{place}", "memory", place) for place, text in enumerate(texts, start=1)]


def run(output: Path, sources, tokenizer="train:300", **options) -> DataManifest:
    """Prepare data that are not there yet."""
    manifest, made = prepare(PrepareConfig(tuple(map(str, sources)), tokenizer=str(tokenizer), **options), output)
    assert made
    return manifest
