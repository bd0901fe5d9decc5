"""Documents out of files: plain text, JSON lines (also compressed) and Parquet."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from ultramem.data.documents import Document
from ultramem.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def text_files(folder: Path) -> list[Path]:
    """The files below a folder that are read as text, in the order of their paths."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())


def iterate_path(path: Path, text_field: str) -> Iterator[Document]:
    """Documents of a file, or of every text file below a folder in the order of their paths.

    Args:
        path: an existing file or folder. Of a folder the .txt and .md files are read; a file is read as rows if its
            name ends in one of `ROW_SUFFIXES`, else as one plain text.
        text_field: field or column that holds the text of a row.

    Yields:
        Documents with text; files and rows without any are passed over.

    Raises:
        DataError: a folder without text files, undecodable bytes, a row without text, a damaged file, or a package that
            is needed and not installed.
    """
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise DataError(f"the folder {path} holds no .txt or .md file; name a .jsonl or .parquet file by itself")
        for file in files:
            yield from _read_text(file)
        return
    name = path.name.lower()
    reader = next((_ROW_READERS[suffix] for suffix in ROW_SUFFIXES if name.endswith(suffix)), None)
    yield from reader(path, text_field) if reader else _read_text(path)


def _read_text(path: Path) -> Iterator[Document]:
    """One document: the whole file."""
    text = _decode(path.read_bytes(), 0, str(path)).removeprefix("\ufeff")
    if text.strip():
        yield Document(text, path.name, str(path), 1)


def _decode(data: bytes, start: int, where: str) -> str:
    """Decode UTF-8; `start` is the position of `data` within the file, in bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise DataError(
            f"{where}: byte 0x{data[error.start]:02x} at offset {offset:,} is not UTF-8 text; "
            f"convert the file (for example with iconv -f latin1 -t utf-8) or remove it"
        ) from None


def _read_jsonl(path: Path, text_field: str, open_file: Callable[[Path], io.BufferedIOBase]) -> Iterator[Document]:
    """One document per line; blank lines are passed over."""
    offset = 0
    try:
        with open_file(path) as stream:
            for number, line in enumerate(stream, start=1):
                where = f"{path}, line {number}"
                text = _decode(line, offset, where)
                offset += len(line)
                if text.strip():
                    yield from _row_document(_parse_row(text, where), text_field, str(path), number, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short ({error}); get the file again") from error


def _parse_row(line: str, where: str) -> dict:
    """The JSON object of one line."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f'{where}: not JSON ({error}); each line must be one object such as {{"text": …}}') from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: a {type(row).__name__} instead of an object; each line must be like {{"text": …}}')
    return row


def _row_document(row: dict, text_field: str, source: str, number: int, where: str) -> Iterator[Document]:
    """The document of a row, if its text is not empty."""
    if text_field not in row:
        names = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where}: no field {text_field!r} (fields: {names}); name the text's field with --text-field")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_field!r} holds a {type(text).__name__}, not text; name another with --text-field"
        )
    if text.strip():
        yield Document(text, str(row.get("id", number)), source, number)


def _open_zstd(path: Path) -> io.BufferedIOBase:
    """Stream of the decompressed bytes."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path} needs the package zstandard; install it with: pip install 'ultramem[train]'") from None
    return io.BufferedReader(_ZstdStream(path, zstandard))


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of all frames of a .zst file; a damaged or cut file raises `EOFError`, as gzip does.

    `zstandard.open` takes a file that ends within a frame for a whole one, which would silently lose text.
    """

    def __init__(self, path: Path, zstandard: ModuleType):
        super().__init__()
        self._file = path.open("rb")
        self._error_type = zstandard.ZstdError
        # Large windows ("zstd --long") are refused by default.
        self._new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        self._frame = None
        self._compressed = self._decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._file.read(io.DEFAULT_BUFFER_SIZE)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._decompressed = self._frame.decompress(self._compressed)
            except self._error_type as error:
                raise EOFError(str(error)) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    """One document per row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow; install it with: pip install 'ultramem[train]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # An absent column is reported by the first row, with the names that there are.
            columns = [name for name in (text_field, "id") if name in names] if text_field in names else None
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield from _row_document(row, text_field, str(path), number, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); get the file again") from error


_ROW_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".jsonl": lambda path, field: _read_jsonl(path, field, lambda file: file.open("rb")),
    ".jsonl.gz": lambda path, field: _read_jsonl(path, field, gzip.open),
    ".jsonl.zst": lambda path, field: _read_jsonl(path, field, _open_zstd),
    ".parquet": _read_parquet,
}
