"""Modules whose work a kernel may do in their stead."""

from typing import cast

import torch
from torch import Tensor, nn

from ultramem.ops import decode


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, and nothing sees or changes its calls: no adapter, no hook."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
    )


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, also on fp32 inputs wider than its weights, as the activations of a decode step are.

    Args:
        module: the layer, or what an adapter put in its place.
        x: [..., I] in the dtype of the weights, or [N, I] fp32.

    Returns:
        [..., O] in the dtype of ``x``.
    """
    weight = getattr(module, "weight", None)
    wider = x.dtype == torch.float32 and weight is not None and weight.dtype == torch.bfloat16
    if not wider or torch.is_autocast_enabled(x.device.type):
        return cast(Tensor, module(x))
    assert weight is not None
    if is_plain(module, nn.Linear) and decode.runs_on_kernels(weight):
        return decode.linear(x, weight, cast(Tensor | None, module.bias))
    return cast(Tensor, module(x.to(weight.dtype))).to(x.dtype)
