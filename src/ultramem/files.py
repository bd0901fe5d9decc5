"""Files and folders that appear complete or not at all: written beside their place, then renamed."""

import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER_NAME = ".ultramem-partial"
"""First file of a folder being written: only folders with it are ever removed as left over."""


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
