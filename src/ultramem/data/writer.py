"""Token files as the Dolma toolkit writes them and OLMo-core reads them."""

import csv
import gzip
import io
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ultramem.data.documents import Document
from ultramem.errors import DataError


class TokenWriter:
    """Writes the documents of one part into `part-NNNNN.npy` files and their metadata beside them.

    A `.npy` file is a headerless array of little-endian token ids (a raw memory map, not NumPy's format), each document
    followed by the end-of-text token. The `.csv.gz` of the same name has one line per document: start, end (tokens
    within the file, the end exclusive and the end-of-text token included), identifier, source, location.

    Args:
        folder: folder of the part, made here.
        dtype: uint16 or uint32, little-endian.
        eos_token_id: token that ends a document.
        max_part_tokens: largest number of tokens in one file.
    """

    def __init__(self, folder: Path, dtype: np.dtype, eos_token_id: int, max_part_tokens: int):
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = dtype
        self._eos_token_id = eos_token_id
        self._max_part_tokens = max_part_tokens
        self._open_part = ExitStack()
        self.num_documents = self.num_bytes = 0
        self.file_names: list[str] = []
        self.file_tokens: list[int] = []

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._open_part.close()

    def write(self, document: Document, ids: Sequence[int]) -> None:
        """Append one document.

        Args:
            document: where it came from; its text is only measured.
            ids: its tokens, without the end-of-text token.

        Raises:
            DataError: the document does not fit into one file.
            OSError: the disk is full, among others.
        """
        num_tokens = len(ids) + 1
        if num_tokens > self._max_part_tokens:
            raise DataError(
                f"{document.source}, document {document.identifier}: {num_tokens:,} tokens do not fit into one token "
                f"file of {self._max_part_tokens:,}; raise --max-part-tokens or cut the document"
            )
        if not self.file_tokens or self.file_tokens[-1] + num_tokens > self._max_part_tokens:
            self._start_part()
        start = self.file_tokens[-1]
        self._tokens_file.write(np.array([*ids, self._eos_token_id], dtype=self._dtype).tobytes())
        # A line break within a field would be quoted, which readers that go line by line do not understand.
        names = (" ".join(name.split()) for name in (document.identifier, document.source))
        self._metadata.writerow([start, start + num_tokens, *names, document.location])
        self.file_tokens[-1] += num_tokens
        self.num_documents += 1
        self.num_bytes += len(document.text.encode("utf-8"))

    def _start_part(self) -> None:
        """Close the open files and start the next pair."""
        self._open_part.close()
        name = f"part-{len(self.file_names):05d}"
        self._tokens_file = self._open_durable(f"{name}.npy")
        compressed = self._open_durable(f"{name}.csv.gz")
        # No file name and no time in the header: equal input gives equal bytes.
        unpacked = self._open_part.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=compressed, mtime=0))
        text = self._open_part.enter_context(io.TextIOWrapper(unpacked, encoding="utf-8", newline=""))
        self._metadata = csv.writer(text)
        self.file_names.append(f"{self._folder.name}/{name}.npy")
        self.file_tokens.append(0)

    def _open_durable(self, name: str) -> BinaryIO:
        """Open a file that is on the disk once it is closed: the folder's rename must never outrun its content."""
        file = self._open_part.enter_context((self._folder / name).open("wb"))
        self._open_part.callback(lambda: (file.flush(), os.fsync(file.fileno())))
        return file
