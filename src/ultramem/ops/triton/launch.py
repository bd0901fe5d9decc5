"""How kernels start: tuned on the device, with one fixed configuration where results must repeat bit by bit."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ultramem.ops.triton import interpreted

# Fewer tokens than this do not fill a large GPU with one program per token: they are tuned apart (decoding).
FEW_TOKENS = 256


def configs(*choices: tuple[dict[str, int], int]) -> list[triton.Config]:
    """Configurations to tune over, (block sizes, warps) each, the safest first: it is the one that is never tuned.

    Under the interpreter, which has nothing to tune, blocks shrink so that small tests cross their borders.
    """
    if interpreted():
        return [triton.Config({name: min(size, 8) for name, size in choices[0][0].items()})]
    return [triton.Config(dict(sizes), num_warps=num_warps) for sizes, num_warps in choices]


def launch(
    kernel: Any,
    num_programs: Callable[[dict[str, int]], int],
    device_of: Tensor,
    *arguments: object,
    one_order: bool = False,
    **constants: Any,
) -> None:
    """Run an autotuned kernel over a one-dimensional grid on the device of a tensor; a grid of none runs nothing.

    Where PyTorch is asked for deterministic algorithms the kernel's first configuration runs untuned, unless it adds
    in one order whatever its block sizes: which ones tuning picks depends on timing.

    Args:
        kernel: a `triton.autotune`d kernel.
        num_programs: the size of the grid, from the block sizes.
        device_of: the tensor whose device runs the kernel.
        arguments: what the kernel takes.
        one_order: whether the kernel's sums have the same order with any block sizes.
        constants: its compile-time constants other than block sizes.
    """
    if num_programs(kernel.configs[0].kwargs) == 0:
        return

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (num_programs(meta),)

    with torch.cuda.device_of(device_of):  # type: ignore[no-untyped-call]
        if torch.are_deterministic_algorithms_enabled() and not one_order:
            kernel.fn[grid](*arguments, **constants, **untuned(kernel, constants).all_kwargs())
        else:
            kernel[grid](*arguments, **constants)


def untuned(kernel: Any, constants: dict[str, Any]) -> triton.Config:
    """The configuration that a kernel runs in where none is tuned."""
    fitting: list[triton.Config] = kernel.configs
    if kernel.early_config_prune:
        fitting = kernel.early_config_prune(fitting, {}, **constants)
    return fitting[0]


def check_range(name: str, what: str, values: Tensor, end: int) -> None:
    """Raise IndexError if an index on the CPU is not in [0, end).

    On a device the check would wait for it; there a kernel compiled with TRITON_DEBUG=1 stops at such an index.
    """
    if values.is_cuda or not values.numel():
        return
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= end:
        raise IndexError(f"{name}: {what} in [{lowest}, {highest}] out of range [0, {end}).")


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels write results of a dtype in: the interpreter cuts bf16 off where devices round it."""
    return torch.float32 if interpreted() else dtype


def contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors as the kernels address them: without strides of their own."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
