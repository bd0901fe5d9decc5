"""Training data from one or several sources: data folders and raw token files, as `dolma tokens` writes them.

A raw token file is headerless little-endian token ids; what no manifest says about it (type, tokenizer, special tokens)
comes from the run's configuration.
"""

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ultramem.data.manifest import DataManifest, DataSplit, MixtureSource, load_manifest
from ultramem.data.tokenizer import load_tokenizer_with_ids, stored_vocabulary, token_dtype, vocabulary_size
from ultramem.errors import DataError

# A file's fingerprint reads this many blocks of so many bytes: hashing terabytes would delay every start by hours.
_NUM_SAMPLED_BLOCKS = 16
_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class SourceSpec:
    """One source: a data folder or patterns of raw token files, and its weight in a mixture."""

    folder: str | None = None
    files: tuple[str, ...] = ()
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.folder if self.folder is not None else self.files[0]


@dataclass(frozen=True)
class RawSettings:
    """What raw token files do not say; None where data folders beside them do, or the tokenizer does.

    Attributes:
        tokenizer: Hugging Face tokenizer folder or tokenizer.json-style file.
        dtype: "uint16" or "uint32"; by default the type that the tokenizer's ids fit.
        eos_token_id: the token that ends each document.
        pad_token_id: the token for padding.
        validation_files: patterns of token files to measure the loss on.
    """

    tokenizer: str | None = None
    dtype: str | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    validation_files: tuple[str, ...] = ()


def expand_patterns(patterns: Sequence[str]) -> tuple[Path, ...]:
    """The files that paths and patterns (`*`, `**`) name, as absolute paths, each pattern's matches sorted.

    Raises:
        DataError: a path or pattern names no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        matches = [Path(match).absolute() for match in sorted(glob.glob(pattern, recursive=True))]
        found = [match for match in matches if match.is_file()]
        if not found:
            raise DataError(f"no token file matches '{pattern}': give headerless .npy files of token ids, or a pattern")
        files.extend(found)
    return tuple(files)


def are_present(specs: Sequence[SourceSpec]) -> bool:
    """Whether every source's folder or files are there."""
    return all(
        Path(spec.folder).exists() if spec.folder is not None else all(map(glob.glob, spec.files)) for spec in specs
    )


def load_sources(specs: Sequence[SourceSpec], raw: RawSettings) -> DataManifest:
    """Open all sources of a run and check that they fit together.

    Args:
        specs: at least one source.
        raw: settings of the raw token files among them; ignored where all sources are data folders.

    Returns:
        One description of all: the training split holds every source's files; the validation split those of the data
        folders and of ``raw.validation_files``, and is missing if there are none. A single data folder is described as
        :func:`ultramem.data.manifest.load_manifest` does.

    Raises:
        DataError: a folder or file is missing, damaged or cut short, or two sources have different token types,
            vocabularies or special tokens.
    """
    folders = {spec.folder: load_manifest(spec.folder) for spec in specs if spec.folder is not None}
    if len(specs) == 1 and folders:
        return next(iter(folders.values()))
    reference = _common_settings(list(folders.values()), raw)
    total_weight = sum(spec.weight for spec in specs)
    mixture = []
    for spec in specs:
        if spec.folder is not None:
            files, fingerprint = folders[spec.folder].splits["train"].files, folders[spec.folder].fingerprint
            num_tokens = folders[spec.folder].splits["train"].num_tokens
        else:
            files = expand_patterns(spec.files)
            num_tokens = sum(_count_tokens(file, reference) for file in files)
            fingerprint = _fingerprint(files, reference)
        mixture.append(MixtureSource(spec.name, spec.weight / total_weight, files, num_tokens, fingerprint))
    splits = {"train": _train_split(mixture, reference.dtype)}
    if (validation := _validation_split(list(folders.values()), raw, reference)) is not None:
        splits["validation"] = validation
    # Weights are part of what the data are: with others, the same position is another sequence.
    identity = (
        [(source.weight, source.fingerprint) for source in mixture] if len(mixture) > 1 else mixture[0].fingerprint
    )
    return replace(
        reference,
        folder=mixture[0].files[0].parent,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        sources=tuple(source.name for source in mixture),
        splits=splits,
        mixture=tuple(mixture) if len(mixture) > 1 else (),
    )


def _common_settings(folders: Sequence[DataManifest], raw: RawSettings) -> DataManifest:
    """Type, vocabulary, special tokens and tokenizer that hold for all sources, as a manifest without files.

    Raises:
        DataError: two folders disagree, the run's configuration disagrees with a folder, or nobody names a tokenizer.
    """
    if not folders:
        if raw.tokenizer is None:
            raise DataError(
                "raw token files need 'data.tokenizer': the tokenizer folder or file that they were made with"
            )
        path = Path(raw.tokenizer)
        tokenizer = load_tokenizer_with_ids(path, raw.eos_token_id, raw.pad_token_id)
        vocab_size = vocabulary_size(tokenizer)
        return DataManifest(
            folder=path.parent,
            fingerprint="",
            dtype=raw.dtype or token_dtype(vocab_size).name,
            vocab_size=vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            sources=(),
            seed=0,
            splits={},
            tokenizer=path.absolute(),
        )
    first = folders[0]
    for key in ("dtype", "eos_token_id", "pad_token_id"):
        if getattr(raw, key) not in (None, getattr(first, key)):
            raise DataError(
                f"'data.{key}' is {getattr(raw, key)}, but {first.folder} has {getattr(first, key)}: leave the "
                "key out, the folder says it for the raw files too"
            )
    vocabulary = stored_vocabulary(first.tokenizer_folder / "tokenizer.json")
    for other in folders[1:]:
        for key in ("dtype", "vocab_size", "eos_token_id", "pad_token_id"):
            if getattr(other, key) != getattr(first, key):
                raise DataError(
                    f"the sources {first.folder} and {other.folder} do not fit together: {key} is "
                    f"{getattr(first, key)} in one and {getattr(other, key)} in the other. Prepare both with the "
                    "same tokenizer"
                )
        if stored_vocabulary(other.tokenizer_folder / "tokenizer.json") != vocabulary:
            raise DataError(
                f"the sources {first.folder} and {other.folder} were made with different tokenizers. Prepare both with "
                "the same one"
            )
    return replace(first, tokenizer=first.tokenizer_folder)


def _train_split(mixture: Sequence[MixtureSource], dtype: str) -> DataSplit:
    """All sources' files as one split; bytes and documents of a mixture have no use."""
    files = tuple(file for source in mixture for file in source.files)
    file_tokens = tuple(file.stat().st_size // np.dtype(dtype).itemsize for file in files)
    return DataSplit(sum(file_tokens), None, None, files, file_tokens)


def _validation_split(folders: Sequence[DataManifest], raw: RawSettings, reference: DataManifest) -> DataSplit | None:
    """The validation parts of all folders, then the raw files; None if there are none."""
    parts = [folder.splits["validation"] for folder in folders if "validation" in folder.splits]
    if raw.validation_files:
        files = expand_patterns(raw.validation_files)
        file_tokens = tuple(_count_tokens(file, reference) for file in files)
        parts.append(DataSplit(sum(file_tokens), None, None, files, file_tokens))
    if not parts:
        return None
    num_bytes = [part.num_bytes for part in parts if part.num_bytes is not None]
    num_documents = [part.num_documents for part in parts if part.num_documents is not None]
    return DataSplit(
        num_tokens=sum(part.num_tokens for part in parts),
        num_bytes=sum(num_bytes) if len(num_bytes) == len(parts) else None,
        num_documents=sum(num_documents) if len(num_documents) == len(parts) else None,
        files=tuple(file for part in parts for file in part.files),
        file_tokens=tuple(count for part in parts for count in part.file_tokens),
    )


def _count_tokens(file: Path, settings: DataManifest) -> int:
    """Tokens of a raw file, after a look at its size and first block.

    Raises:
        DataError: it is cut short, in NumPy's own format, of another token type, or of another vocabulary.
    """
    item_dtype = np.dtype(settings.dtype).newbyteorder("<")
    num_bytes = file.stat().st_size
    if num_bytes % item_dtype.itemsize:
        raise DataError(
            f"the token file {file} has {num_bytes:,} bytes, not a multiple of the {item_dtype.itemsize} of a "
            f"{settings.dtype} token: it is cut short. Copy or tokenize it again"
        )
    with file.open("rb") as stream:
        head = stream.read(_BLOCK_BYTES)
    if head.startswith(b"\x93NUMPY"):
        raise DataError(
            f"{file} is in NumPy's own format; token files are raw ids without a header, as `dolma tokens` and "
            "`ndarray.tofile` write them"
        )
    tokens = np.frombuffer(head, item_dtype)
    if settings.dtype == "uint16" and len(tokens) >= 8 and not tokens[1::2].any():
        raise DataError(f"every second token of {file} is 0: it holds uint32 ids. Set 'data.dtype: uint32'")
    if len(tokens) and tokens.max() >= settings.vocab_size:
        raise DataError(
            f"{file} holds the token {tokens.max()}, but the tokenizer has only {settings.vocab_size} tokens: it was "
            f"made with another tokenizer, or its type is not {settings.dtype} ('data.dtype')"
        )
    return num_bytes // item_dtype.itemsize


def _fingerprint(files: Sequence[Path], settings: DataManifest) -> str:
    """SHA-256 over names, sizes and evenly spread blocks of raw files, and what gives the tokens their meaning."""
    meaning = [settings.dtype, settings.vocab_size, settings.eos_token_id, settings.pad_token_id]
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for file in files:
        num_bytes = file.stat().st_size
        digest.update(json.dumps([file.name, num_bytes]).encode())
        with file.open("rb") as stream:
            for block in range(_NUM_SAMPLED_BLOCKS):
                stream.seek(max(0, num_bytes - _BLOCK_BYTES) * block // (_NUM_SAMPLED_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
