"""How operators compute: in fp32 (fp64 for fp64 operands), whatever the surrounding autocast says."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if an operand is fp64, else fp32: the dtype in which sums are accumulated."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function outside autocast, so that its matrix products keep the dtype that it chose."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run
