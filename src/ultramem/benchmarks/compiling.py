"""`torch.compile` as a competitor."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ultramem.errors import BackendError

T = TypeVar("T")


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """A function compiled for the shapes of its first call, which says in a BackendError why it cannot be.

    Raises:
        BackendError: from the first call, with the compiler's first line.
    """
    compiled_function = torch.compile(function, dynamic=False)
    is_compiled = False

    def call(*arguments: Any) -> T:
        nonlocal is_compiled
        # Straight away: what guards the first call would be timed with a single token's.
        if is_compiled:
            return compiled_function(*arguments)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = compiled_function(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise BackendError(f"torch.compile cannot compile this here: {first_line}") from error
        is_compiled = True
        return result

    return call
