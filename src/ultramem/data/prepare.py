"""`ultramem data prepare`: text in, token files out."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from ultramem.data import tokenizer as tokenizers
from ultramem.data.corpora import iterate_documents, source_signature, tokenizer_signature
from ultramem.data.documents import Document
from ultramem.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    DataManifest,
    compute_fingerprint,
    load_manifest,
    read_manifest,
    write_manifest,
)
from ultramem.data.spool import Spool
from ultramem.data.writer import TokenWriter
from ultramem.errors import ConfigError, DataError
from ultramem.files import staged_folder

# Documents encoded at once: enough for the tokenizer's threads, small enough that Ctrl-C is heard soon.
_BATCH_DOCUMENTS = 256


@dataclass(frozen=True)
class PrepareConfig:
    """What token files are made from, and how.

    Attributes:
        sources: as for `ultramem.data.corpora.iterate_documents`.
        tokenizer: a tokenizer folder, file or hub name, or "train:N".
        validation_fraction: share of the documents that goes into the validation part, above 0 and below 1.
        seed: changes which documents are in the validation part, and the order of all.
        text_field: field that holds the text in JSON lines, Parquet files and data sets.
        split: which split of a hub data set is read.
        max_part_tokens: largest number of tokens in one file.
        vocab_size: size of the embedding that the model will have; None takes the tokenizer's.
        eos_token: the token that ends a document; None takes the tokenizer's.
    """

    sources: tuple[str, ...]
    tokenizer: str = "train:4096"
    validation_fraction: float = 0.02
    seed: int = 0
    text_field: str = "text"
    split: str = "train"
    max_part_tokens: int = 2**30
    vocab_size: int | None = None
    eos_token: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no source given; name at least one file, folder, data set or named corpus")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"--validation-fraction {self.validation_fraction:g} must be above 0 and below 1")
        if self.max_part_tokens < 1:
            raise ConfigError(f"--max-part-tokens {self.max_part_tokens} must be at least 1")
        trained_size = tokenizers.trained_vocabulary_size(self.tokenizer)
        if trained_size and self.vocab_size is not None and trained_size > self.vocab_size:
            raise ConfigError(f"tokenizer {self.tokenizer!r} does not fit --vocab-size {self.vocab_size:,}")
        if trained_size and self.eos_token is not None:
            raise ConfigError(f"--eos-token is for existing tokenizers; {self.tokenizer!r} brings its own")


def prepare(
    config: PrepareConfig, output: str | os.PathLike[str], *, overwrite: bool = False, show_progress: bool = False
) -> tuple[DataManifest, bool]:
    """Write a data folder: token files of a training and a validation part, the tokenizer, a manifest.

    The folder appears complete or not at all: it is written beside its place and renamed.

    Args:
        config: sources, tokenizer and split.
        output: the data folder.
        overwrite: make the folder anew and replace what is there, if that is a data folder.
        show_progress: show progress bars on the terminal.

    Returns:
        (manifest, made): made is False where the folder was there already, from equal arguments and unchanged sources.

    Raises:
        DataError: a source, the tokenizer or the output cannot be used, or the disk is full; nothing was written.
    """
    output = Path(output)
    with _system_errors(output):
        arguments = {
            **asdict(config),
            "sources": list(config.sources),
            "source_signatures": [source_signature(source) for source in config.sources],
            "tokenizer_signature": tokenizer_signature(config.tokenizer),
        }
        is_up_to_date = _is_up_to_date(output, arguments, overwrite)
    if is_up_to_date:
        return load_manifest(output), False
    with _system_errors(output), staged_folder(output) as stage, _progress(show_progress) as progress:
        content = _fill(stage, config, progress)
        write_manifest(stage, {**content, "arguments": arguments})
    return load_manifest(output), True


def _is_up_to_date(output: Path, arguments: dict, overwrite: bool) -> bool:
    """Whether the output is there already; an error if something else is in its place and may not be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output.is_dir() and (output / MANIFEST_NAME).is_file()):
        raise DataError(f"{output} exists and is no data folder, so it is not replaced; choose another --output")
    made_from = read_manifest(output).get("arguments", {})
    if overwrite:
        return False
    changed = sorted(key for key in arguments if made_from.get(key) != arguments[key])
    if changed:
        raise DataError(
            f"{output} exists and was made differently ({', '.join(changed)}); "
            f"replace it with --overwrite or choose another --output"
        )
    return True


def _fill(stage: Path, config: PrepareConfig, progress: Progress) -> dict:
    """Write everything but the manifest; return the manifest's content."""
    spool_path = stage / "documents.spool"
    with closing(Spool(spool_path, config.seed)) as spool:
        documents = iterate_documents(config.sources, text_field=config.text_field, split=config.split)
        for document in _alone_or_cut(_track(progress, "reading", documents), config.validation_fraction):
            spool.add(document)
        parts = spool.split(config.validation_fraction)
        tokenizer = _make_tokenizer(config, spool, parts, progress)
        vocab_size = tokenizers.vocabulary_size(tokenizer, config.vocab_size)
        tokenizer.save_pretrained(stage / TOKENIZER_FOLDER)
        settings = {
            "dtype": tokenizers.token_dtype(vocab_size).name,
            "vocab_size": vocab_size,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        splits = {}
        for name, offsets in parts.items():
            tracked = _track(progress, f"tokenizing {name}", spool.read(offsets), total=len(offsets))
            splits[name] = _write_part(stage / name, tokenizer, vocab_size, tracked, config.max_part_tokens)
    spool_path.unlink()
    files = [file for split in splits.values() for file in split["files"]]
    fingerprint = compute_fingerprint(stage, files, settings)
    return {
        "fingerprint": fingerprint,
        **settings,
        "sources": list(config.sources),
        "seed": config.seed,
        "splits": splits,
    }


def _make_tokenizer(config: PrepareConfig, spool: Spool, parts: dict, progress: Progress) -> PreTrainedTokenizerFast:
    """Load the tokenizer, or train it on the training part."""
    vocab_size = tokenizers.trained_vocabulary_size(config.tokenizer)
    if vocab_size is None:
        return tokenizers.load_tokenizer(config.tokenizer, config.eos_token)
    documents = _track(progress, "training the tokenizer", spool.read(parts["train"]), total=len(parts["train"]))
    return tokenizers.train_tokenizer((document.text for document in documents), vocab_size)


def _write_part(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    documents: Iterator[Document],
    max_part_tokens: int,
) -> dict:
    """Tokenize one part into its files; return its entry in the manifest."""
    dtype = tokenizers.token_dtype(vocab_size)
    with TokenWriter(folder, dtype, tokenizer.eos_token_id, max_part_tokens) as writer:
        while batch := list(islice(documents, _BATCH_DOCUMENTS)):
            encoded = tokenizers.encode_texts(tokenizer, [document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                writer.write(document, ids)
    return {
        "num_tokens": sum(writer.file_tokens),
        "num_bytes": writer.num_bytes,
        "num_documents": writer.num_documents,
        "files": writer.file_names,
        "file_tokens": writer.file_tokens,
    }


def _alone_or_cut(documents: Iterator[Document], validation_fraction: float) -> Iterator[Document]:
    """The documents; a corpus of one single document is cut in two at a line or word near its end.

    One book in one file is a common corpus, and it too needs a validation part: its last share, by characters.
    """
    first, second = next(documents), next(documents, None)
    if second is not None:
        yield first
        yield second
        yield from documents
        return
    cut = round(len(first.text) * (1 - validation_fraction))
    nearby = max(0, cut - 1000)
    cut = next((place + 1 for mark in "\n " if (place := first.text.rfind(mark, nearby, cut)) > 0), cut)
    head, tail = first.text[:cut], first.text[cut:]
    if not head.strip() or not tail.strip():
        raise DataError(
            f"{first.source}: the only document is too short ({len(first.text)} characters) to divide into a training "
            f"and a validation part; give more text"
        )
    yield Document(head, f"{first.identifier} (first part)", first.source, first.location, keep_in_train=True)
    yield Document(tail, f"{first.identifier} (last part)", first.source, first.location)


def _track(
    progress: Progress, description: str, documents: Iterable[Document], total: int | None = None
) -> Iterator[Document]:
    """Count the documents on a progress bar of their own."""
    task = progress.add_task(description, total=total)
    for document in documents:
        progress.advance(task)
        yield document


@contextmanager
def _progress(is_visible: bool) -> Iterator[Progress]:
    """Bars that count documents; they disappear when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Bars in a log file would only leave blank lines.
    with Progress(
        *columns, console=console, transient=True, disable=not (is_visible and console.is_terminal)
    ) as progress:
        yield progress


@contextmanager
def _system_errors(output: Path) -> Iterator[None]:
    """Say what the operating system refused, and that nothing was left behind."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"the disk is full: {output} was not written and its temporary files are removed; free some space (the "
                f"text is needed once more while it is prepared) or choose an --output on another disk"
            ) from error
        raise DataError(f"{error.strerror or error}: {error.filename or output}; nothing was written") from error
