import gzip
import json

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from ultramem.data.files import iterate_path
from ultramem.errors import DataError

ROWS = [{"id": "first", "text": "one é 中"}, {"id": "second", "text": "two\nlines"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_rows(path, suffix):
    if suffix == ".jsonl":
        path.write_bytes(LINES)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(LINES))
    elif suffix == ".jsonl.zst":
        # Two frames, as parallel compressors write them.
        compress = zstandard.ZstdCompressor().compress
        half = LINES.index(b"\n") + 1
        path.write_bytes(compress(LINES[:half]) + compress(LINES[half:]))
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_rows_of_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    write_rows(path, suffix)
    documents = list(iterate_path(path, "text"))
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.identifier for document in documents] == ["first", "second"]
    assert [(document.source, document.location) for document in documents] == [(str(path), 1), (str(path), 2)]


def test_rows_read_another_field_and_number_rows_without_identifier(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "a"}\n\n{"body": "  "}\n{"body": "b"}\n')
    documents = list(iterate_path(path, "body"))
    assert [(document.text, document.identifier, document.location) for document in documents] == [
        ("a", "1", 1),
        ("b", "4", 4),
    ]


def test_parquet_reads_another_column(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"body": ["a", "b"], "text": [1, 2]}), path)
    assert [document.text for document in iterate_path(path, "body")] == ["a", "b"]


def test_one_text_file_is_one_document_without_byte_order_mark(tmp_path):
    path = tmp_path / "book"
    path.write_bytes("\ufeffCall me Ishmael.\r\n".encode())
    (document,) = iterate_path(path, "text")
    assert document.text == "Call me Ishmael.\r\n"
    assert (document.identifier, document.source, document.location) == ("book", str(path), 1)


def test_folder_reads_text_files_at_any_depth_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.md").write_text("# deep")
    (tmp_path / "a.TXT").write_text("flat")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    assert [document.text for document in iterate_path(tmp_path, "text")] == ["flat", "# deep"]


def test_folder_without_text_says_what_it_looked_for(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=r"holds no \.txt or \.md file; name a \.jsonl or \.parquet file by itself"):
        list(iterate_path(tmp_path, "text"))


def test_undecodable_text_names_file_and_offset(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("über".encode("latin1") * 1 + b"x")
    with pytest.raises(DataError, match=r"latin\.txt: byte 0xfc at offset 0 is not UTF-8 text; convert the file"):
        list(iterate_path(path, "text"))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_undecodable_row_names_line_and_offset_in_the_stream(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    data = b'{"text": "fine"}\n{"text": "caf\xe9"}\n'
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(DataError, match=rf"rows{suffix}, line 2: byte 0xe9 at offset {data.index(0xE9)} is not UTF-8"):
        list(iterate_path(path, "text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", r"line 2: not JSON \(Expecting property name.*each line must be one object"),
        ('["text"]', "line 2: a list instead of an object"),
        (
            '{"body": "x", "n": 1}',
            r"line 2: no field 'text' \(fields: body, n\); name the text's field with --text-field",
        ),
        ('{"text": 7}', "line 2: field 'text' holds a int, not text"),
        ('{"text": null}', "line 2: field 'text' holds a NoneType, not text"),
    ],
)
def test_bad_rows_name_the_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(iterate_path(path, "text"))


def test_parquet_without_the_column_or_with_missing_text(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"body": ["a", None]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet, row 1: no field 'text' \(fields: body\)"):
        list(iterate_path(path, "text"))
    with pytest.raises(DataError, match=r"rows\.parquet, row 2: field 'body' holds a NoneType, not text"):
        list(iterate_path(path, "body"))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "replaced"])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"rows{suffix}"
    write_rows(path, suffix)
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == "cut" else b"not what the name says, but long enough to be read")
    with pytest.raises(
        DataError, match=rf"rows{suffix} is (damaged or cut short|not a readable Parquet file).*get the file"
    ):
        list(iterate_path(path, "text"))


@pytest.mark.parametrize(("suffix", "package"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")])
def test_missing_package_says_how_to_install_it(tmp_path, block_import, suffix, package):
    path = tmp_path / f"rows{suffix}"
    write_rows(path, suffix)
    block_import(package)
    with pytest.raises(
        DataError, match=rf"needs the package {package}; install it with: pip install 'ultramem\[train\]'"
    ):
        list(iterate_path(path, "text"))
