"""Triton kernels of the operators, for CUDA devices and, under Triton's interpreter, for any CPU.

Triton is an optional dependency: this module imports without it, and `unavailable_reason` says what is in the way. The
kernels themselves are in `table_kernels` and `search_kernels`, what starts them in `tables` and `search`.
"""

import functools
import importlib.util
import os

import torch

# bf16 arithmetic and the asynchronous copies of pipelined loops begin with Ampere.
MINIMUM_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter: TRITON_INTERPRET as it stood when Triton was first imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _import_error() -> str | None:
    try:
        import triton  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def unavailable_reason(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of a device, with the remedy; None if they can."""
    if error := _import_error():
        return f"triton cannot be imported ({error}). Install it: pip install 'ultramem[triton]'"
    if device.type == "cuda":
        if interpreted():
            return None
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, the "
                f"kernels need {MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]}. Use ULTRAMEM_OPS=reference"
            )
        return None
    if device.type != "cpu":
        return f"the kernels run on CUDA devices, not on {device.type!r}. Use ULTRAMEM_OPS=reference"
    if not interpreted():
        set_late = os.environ.get("TRITON_INTERPRET") == "1"
        return "CPU tensors need Triton's interpreter. " + (
            "TRITON_INTERPRET=1 was set after triton was imported; set it before python starts"
            if set_late
            else "Set TRITON_INTERPRET=1 before python starts (slow: for tests), or move the tensors to a CUDA device"
        )
    return None
