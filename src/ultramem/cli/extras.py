"""What is said where a verb's packages are not installed."""

from collections.abc import Iterator
from contextlib import contextmanager

from ultramem.errors import ConfigError


@contextmanager
def explains_missing_packages(task: str, extra: str) -> Iterator[None]:
    """Say how to install what an extra brings, in place of a traceback.

    Args:
        task: what needs the packages.
        extra: what brings them.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "ultramem"):  # a bug of ours
            raise
        raise ConfigError(f"{task} needs the package {package}: pip install 'ultramem[{extra}]'") from error
