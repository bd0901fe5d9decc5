"""Files and folders that appear complete or not at all: written beside their place, then renamed."""

import glob
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

MARKER_NAME = ".ultramem-partial"
"""First file of a folder being written: only folders with it are ever removed as left over."""

CHECKSUMS_NAME = "checksums.json"
_BLOCK_BYTES = 1 << 22
_NUM_READERS = 4


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """Give a path to write a file at, and put the file into place when the block ends without an exception.

    Args:
        output: where the file goes; what is there is replaced. Its folder exists, and no other process writes it.

    Yields:
        `OUTPUT.tmp` beside it; removed again after any exception, Ctrl-C included.
    """
    stage = output.with_name(output.name + ".tmp")
    try:
        yield stage
        stage.replace(output)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Give an empty folder to write into, and put it into place when the block ends without an exception.

    Args:
        output: where the folder goes. What is there is replaced, so the caller checks that it may be.

    Yields:
        `OUTPUT.partial-PID` beside it; removed again after any exception, Ctrl-C included.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    stage = output.with_name(f"{output.name}.partial-{os.getpid()}")
    stage.mkdir()
    try:
        (stage / MARKER_NAME).touch()
        yield stage
        (stage / MARKER_NAME).unlink()
        _put_into_place(stage, output)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _put_into_place(stage: Path, output: Path) -> None:
    """Rename; a folder that is replaced moves aside first, and back if the rename fails."""
    if not output.exists():
        stage.rename(output)
        return
    aside = output.with_name(f"{output.name}.replaced-{os.getpid()}")
    output.rename(aside)
    try:
        stage.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside)


def _remove_abandoned(output: Path) -> None:
    """Remove what a killed run left behind: folders with the marker whose process is gone."""
    for folder in output.parent.glob(f"{glob.escape(output.name)}.partial-*"):
        number = re.fullmatch(r".*\.partial-(\d+)", folder.name)
        if number and (folder / MARKER_NAME).is_file() and not _is_running(int(number[1])):
            shutil.rmtree(folder)


def _is_running(process_id: int) -> bool:
    """Whether a process of this number exists on this machine."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Write down size and CRC-32 of files, for :func:`find_damage`.

    Args:
        folder: gets a `checksums.json`.
        files: in it or below, completely written.
    """
    files = sorted(files)
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        sums = dict(
            zip((file.relative_to(folder).as_posix() for file in files), readers.map(_size_and_sum, files), strict=True)
        )
    with staged_file(folder / CHECKSUMS_NAME) as stage:
        stage.write_text(json.dumps(sums, indent=1), encoding="utf-8")


def has_checksums(folder: Path) -> bool:
    """Whether :func:`write_checksums` was called for a folder."""
    return (folder / CHECKSUMS_NAME).is_file()


def find_damage(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """What has happened to a folder's files since :func:`write_checksums`.

    Args:
        folder: any folder; one without `checksums.json` has no damage that could be found.
        part: reads every `num_parts`-th file only, from this one on, so that several processes can share the reading.
        num_parts: number of parts.

    Returns:
        A text for each file that is missing, cut short or changed; empty if all are as they were written.
    """
    if not has_checksums(folder):
        return []
    try:
        sums = json.loads((folder / CHECKSUMS_NAME).read_text(encoding="utf-8"))
        expected = [(str(name), (int(size), int(checksum))) for name, (size, checksum) in sums.items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS_NAME} cannot be read ({error})"]
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        found = readers.map(lambda item: _damage(folder / item[0], *item), expected[part::num_parts])
        return [text for text in found if text is not None]


def _damage(file: Path, name: str, expected: tuple[int, int]) -> str | None:
    try:
        num_bytes = file.stat().st_size
        if num_bytes != expected[0]:
            return f"{name} has {num_bytes:,} bytes instead of {expected[0]:,}"
        if _size_and_sum(file) != expected:
            return f"{name} has changed since it was written (its checksum differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _size_and_sum(file: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    num_bytes = checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            num_bytes += len(block)
            checksum = zlib.crc32(block, checksum)
    return num_bytes, checksum
