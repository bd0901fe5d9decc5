"""All documents of a corpus in one temporary file, in an order and a split that depend on their texts alone."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ultramem.data.documents import Document
from ultramem.errors import DataError


class Spool:
    """Takes documents one by one, then gives them back by part.

    The sources are read once (a streamed data set may be slow, and may change), and only two numbers per document stay
    in memory. A document's place is the hash of seed and text: the order of the input does not matter, equal texts
    always share a part, and the tokens come out shuffled.

    Args:
        path: the temporary file.
        seed: changes order and split.
    """

    def __init__(self, path: Path, seed: int):
        self._file = path.open("w+b")
        self._key = f"ultramem {seed}".encode()
        self._places = array("Q")
        self._offsets = array("Q")
        self._kept = bytearray()

    def close(self) -> None:
        """Close the temporary file."""
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def add(self, document: Document) -> None:
        """Append a document.

        Raises:
            DataError: the text holds half of a surrogate pair, which no encoding of Unicode can write.
        """
        try:
            encoded = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{document.source}, document {document.location}: character {error.start:,} of the text is half of a "
                f"surrogate pair and no Unicode text; repair or remove the document"
            ) from None
        digest = hashlib.blake2b(encoded, digest_size=8, key=self._key).digest()
        self._places.append(int.from_bytes(digest, "big"))
        self._offsets.append(self._file.tell())
        self._kept.append(document.keep_in_train)
        record = [document.text, document.identifier, document.source, document.location]
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    def split(self, validation_fraction: float) -> dict[str, np.ndarray]:
        """Divide the documents.

        Args:
            validation_fraction: share of the documents, except those that stay in the training part, that goes into the
                validation part; at least one document does.

        Returns:
            Part → offsets of its documents, int64, in the order to write them. "train" comes first.

        Raises:
            DataError: no document is left over for one of the parts.
        """
        places = np.frombuffer(self._places, dtype=np.uint64)
        is_free = np.frombuffer(self._kept, dtype=np.uint8) == 0
        free_places = np.sort(places[is_free])
        is_validation = np.zeros(len(places), dtype=bool)
        if len(free_places):
            num_validation = max(1, round(validation_fraction * len(free_places)))
            # By place, not by count: equal texts are on one side.
            is_validation = is_free & (places <= free_places[num_validation - 1])
        if is_validation.all() or not is_validation.any():
            raise DataError(
                f"the corpus of {len(self):,} documents cannot be divided into a training and a validation part with a "
                f"validation fraction of {validation_fraction:g}: too few different texts; give more documents or "
                f"another --validation-fraction"
            )
        order = np.argsort(places, kind="stable")
        offsets = np.frombuffer(self._offsets, dtype=np.uint64).astype(np.int64)
        return {
            "train": offsets[order][~is_validation[order]],
            "validation": offsets[order][is_validation[order]],
        }

    def read(self, offsets: np.ndarray) -> Iterator[Document]:
        """Documents at these offsets, in their order."""
        for offset in offsets.tolist():
            self._file.seek(offset)
            yield Document(*json.loads(self._file.readline()))
