import csv
import gzip

import numpy as np
import pytest

from ultramem.data.documents import Document
from ultramem.data.writer import TokenWriter
from ultramem.errors import DataError


def write(folder, documents, dtype="<u2", eos_token_id=0, max_part_tokens=100):
    with TokenWriter(folder, np.dtype(dtype), eos_token_id, max_part_tokens) as writer:
        for document, ids in documents:
            writer.write(document, ids)
    return writer


def test_documents_are_ended_by_the_end_of_text(tmp_path):
    writer = write(tmp_path / "train", [(Document("ab", "a", "s", 1), [5, 6]), (Document("é", "b", "s", 2), [7])])
    assert (tmp_path / "train/part-00000.npy").read_bytes() == bytes([5, 0, 6, 0, 0, 0, 7, 0, 0, 0])
    assert (writer.num_documents, writer.num_bytes, writer.file_tokens) == (2, 4, [5])
    assert writer.file_names == ["train/part-00000.npy"]


def test_32_bit_ids_are_little_endian(tmp_path):
    write(tmp_path / "train", [(Document("a", "a", "s", 1), [70_000])], dtype="<u4", eos_token_id=1)
    assert (tmp_path / "train/part-00000.npy").read_bytes() == (70_000).to_bytes(4, "little") + bytes([1, 0, 0, 0])


def test_id_that_does_not_fit_is_no_silent_wrap(tmp_path):
    with pytest.raises(OverflowError):
        write(tmp_path / "train", [(Document("a", "a", "s", 1), [70_000])])


def test_metadata_has_the_columns_of_dolma(tmp_path):
    write(
        tmp_path / "train", [(Document("ab", 'x,"y"\nz', "dir/a.jsonl", 4), [5, 6]), (Document("c", "c", "s", 9), [7])]
    )
    with gzip.open(tmp_path / "train/part-00000.csv.gz", "rt", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["0", "3", 'x,"y" z', "dir/a.jsonl", "4"], ["3", "5", "c", "s", "9"]]


def test_parts_hold_whole_documents(tmp_path):
    documents = [(Document("t", str(place), "s", place), [place] * 3) for place in range(1, 6)]
    writer = write(tmp_path / "train", documents, max_part_tokens=9)
    assert writer.file_tokens == [8, 8, 4]
    assert writer.file_names == [f"train/part-0000{part}.npy" for part in range(3)]
    starts = []
    for part in range(3):
        with gzip.open(tmp_path / f"train/part-0000{part}.csv.gz", "rt") as file:
            starts.append([line.split(",")[:3] for line in file])
    assert starts == [[["0", "4", "1"], ["4", "8", "2"]], [["0", "4", "3"], ["4", "8", "4"]], [["0", "4", "5"]]]


def test_document_longer_than_a_part(tmp_path):
    with pytest.raises(
        DataError, match=r"s, document a: 6 tokens do not fit into one token file of 5; raise --max-part"
    ):
        write(tmp_path / "train", [(Document("t", "a", "s", 1), [1] * 5)], max_part_tokens=5)


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "train", [(Document("ab", "a", "s", 1), [5, 6])])
    for file in ("part-00000.npy", "part-00000.csv.gz"):
        assert (tmp_path / "one/train" / file).read_bytes() == (tmp_path / "two/train" / file).read_bytes()
