"""The data folder that training and evaluation read, described by its manifest."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ultramem.errors import DataError

MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT = 1


@dataclass(frozen=True)
class DataSplit:
    """One part of the data.

    Attributes:
        num_tokens: tokens in the files, the token that ends each document included.
        num_bytes: UTF-8 bytes of the documents' text; None for raw token files, which do not say.
        num_documents: documents; None for raw token files.
        files: absolute paths of the token files, in order.
        file_tokens: tokens of each file.
    """

    num_tokens: int
    num_bytes: int | None
    num_documents: int | None
    files: tuple[Path, ...]
    file_tokens: tuple[int, ...]

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token: what turns a loss per token into bits per byte; None if they are not known."""
        return None if self.num_bytes is None else self.num_bytes / self.num_tokens


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Attributes:
        name: its folder, or its first file pattern.
        weight: its share of the training tokens; the weights of a mixture add up to 1.
        files: absolute paths of its token files, in order.
        num_tokens: tokens in them.
        fingerprint: of its content.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    num_tokens: int
    fingerprint: str


@dataclass(frozen=True)
class DataManifest:
    """What a data folder holds.

    Attributes:
        folder: the data folder, absolute.
        fingerprint: SHA-256 over the tokenizer and all token files; equal data have equal fingerprints.
        dtype: type of the token files, "uint16" or "uint32" (little-endian, without header).
        vocab_size: size of the embedding that a model for these tokens needs.
        eos_token_id: the token that ends each document.
        pad_token_id: the token for padding; equals `eos_token_id` where the tokenizer has none.
        sources: what the data were made from.
        seed: seed of the split and the order.
        splits: "train" and "validation"; raw token files may come without "validation".
        mixture: the sources of the training tokens where there are several, with weights; else empty.
        tokenizer: the tokenizer's folder or file, where the data folder does not hold it.
    """

    folder: Path
    fingerprint: str
    dtype: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    sources: tuple[str, ...]
    seed: int
    splits: dict[str, DataSplit]
    mixture: tuple[MixtureSource, ...] = ()
    tokenizer: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The Hugging Face tokenizer folder of a data folder."""
        return self.folder / TOKENIZER_FOLDER

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer that belongs to the tokens: a Hugging Face folder, or a bare tokenizer.json-style file."""
        return self.tokenizer or self.tokenizer_folder


def load_manifest(folder: str | os.PathLike[str]) -> DataManifest:
    """Open a data folder and check that every token file is there in its full size.

    Args:
        folder: a folder that `ultramem data prepare` wrote.

    Returns:
        Its description, with absolute paths.

    Raises:
        DataError: no such folder, no manifest in it, a manifest of another format, or a token file that is missing or
            has another size than written.
    """
    folder = Path(folder).absolute()
    content = read_manifest(folder)
    try:
        manifest = _parse(folder, content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / MANIFEST_NAME} is incomplete or changed ({error!r}); prepare the data again with --overwrite"
        ) from error
    item_bytes = np.dtype(manifest.dtype).itemsize
    for split in manifest.splits.values():
        for file, num_tokens in zip(split.files, split.file_tokens, strict=True):
            _check_size(file, num_tokens * item_bytes)
    if not manifest.tokenizer_folder.is_dir():
        raise DataError(f"the data folder {folder} lacks its tokenizer/; prepare it again with --overwrite")
    return manifest


def _parse(folder: Path, content: dict) -> DataManifest:
    """The typed form of a manifest's content."""
    splits = {}
    for name, split in content["splits"].items():
        files = tuple(folder / file for file in split["files"])
        if not len(files) == len(split["file_tokens"]) or sum(split["file_tokens"]) != split["num_tokens"]:
            raise ValueError(f"the files of {name} do not add up to its {split['num_tokens']} tokens")
        counts = {key: split[key] for key in ("num_tokens", "num_bytes", "num_documents")}
        splits[name] = DataSplit(**counts, files=files, file_tokens=tuple(split["file_tokens"]))
    keys = ("fingerprint", "dtype", "vocab_size", "eos_token_id", "pad_token_id", "seed")
    return DataManifest(
        folder=folder, sources=tuple(content["sources"]), splits=splits, **{key: content[key] for key in keys}
    )


def read_manifest(folder: Path) -> dict:
    """The manifest as it stands in the file, its format checked.

    Raises:
        DataError: there is no manifest of this project's format.
    """
    remedy = "make a data folder with: ultramem data prepare SOURCE --output FOLDER"
    if not folder.is_dir():
        raise DataError(f"there is no data folder {folder}; {remedy}")
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"the folder {folder} holds no {MANIFEST_NAME} and is no data folder; {remedy}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove the folder and prepare the data again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "fingerprint" not in content:
        raise DataError(f"{path} is no data manifest of format {FORMAT}; {remedy}")
    return content


def write_manifest(folder: Path, content: dict) -> None:
    """Write the manifest to disk; it comes last, so that a folder with a manifest is complete."""
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **content}, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def compute_fingerprint(folder: Path, files: Sequence[str], settings: dict) -> str:
    """SHA-256 over the tokenizer, the token files and the settings that give the tokens their meaning.

    Args:
        folder: the data folder.
        files: token files of all parts, relative to it, in order.
        settings: dtype and special tokens, as they will stand in the manifest.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in (f"{TOKENIZER_FOLDER}/tokenizer.json", *files):
        with (folder / file).open("rb") as stream:
            digest.update(file.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _check_size(path: Path, num_bytes: int) -> None:
    """Compare a token file with the manifest."""
    remedy = "prepare the data again with --overwrite"
    if not path.is_file():
        raise DataError(f"the token file {path} is missing; {remedy}")
    actual_bytes = path.stat().st_size
    if actual_bytes != num_bytes:
        raise DataError(
            f"the token file {path} has {actual_bytes:,} bytes instead of the {num_bytes:,} that its manifest states "
            f"(cut short or changed); {remedy}"
        )
