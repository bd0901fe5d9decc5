"""What is computed from weights and stays right until one of them changes."""

import operator
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

_VERSION = operator.attrgetter("_version")


class Derived(Generic[Value]):
    """A value kept for as long as its sources are the same tensors, unchanged since it was computed.

    Whoever writes to a source behind its version counter (through ``.data``; FSDP into gathered parameters) must call
    `clear`. A copy of the owner, and a pickle, start without a value: versions of copied tensors count from zero again.
    Under `torch.compile` nothing is kept: a graph cannot be guarded by versions.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the value."""
        self._sources: tuple[Tensor, ...] = ()
        self._state: tuple[object, ...] = ()
        self._value: Value | None = None

    def get(self, sources: tuple[Tensor, ...], dtype: torch.dtype, derive: Callable[[], Value]) -> Value:
        """The value for these sources and this dtype, computed by ``derive`` where it is not at hand."""
        same = len(sources) == len(self._sources) and all(map(operator.is_, sources, self._sources))
        if torch.compiler.is_compiling() or not (same or all(map(_has_version, sources))):
            return derive()
        state = (dtype, *map(_VERSION, sources))
        if self._value is None or not same or state != self._state:
            self._value = derive()
            self._sources, self._state = sources, state
        return self._value

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, ()


def _has_version(tensor: Tensor) -> bool:
    """Whether a tensor counts its changes: not those made in inference mode, and subclasses may not."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_inference()
