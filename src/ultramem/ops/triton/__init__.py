"""Triton kernels of the operators, for CUDA devices and, under Triton's interpreter, for CPU tensors.

Triton is an optional dependency: this package imports without it, and `why_unavailable` says what is in the way. The
kernels are in `table_kernels` and `search_kernels`, the functions that start them in `tables` and `search`.
"""

import functools

import torch

# bf16 arithmetic begins with Ampere.
MINIMUM_CAPABILITY = (8, 0)


@functools.cache
def _import_error() -> str | None:
    try:
        import triton.language  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: whether TRITON_INTERPRET was 1 when triton was imported."""
    if _import_error():
        return False
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    # Triton decides it once for its own library, which kernels of the other kind cannot call.
    return isinstance(triton.language.standard.sort, InterpretedFunction)


def devices() -> tuple[str, ...]:
    """The types of device whose tensors the kernels take."""
    return ("cuda", "cpu") if interpreted() else ("cuda",)


@functools.cache
def why_unavailable() -> str | None:
    """Why the kernels cannot run on this machine, with the remedy; None if they can."""
    if error := _import_error():
        return f"triton cannot be imported ({error}); pip install 'ultramem[triton]'"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return (
            "no CUDA device is to be had; for tests, TRITON_INTERPRET=1 set before python starts runs them on the CPU"
        )
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]} and the kernels "
            f"need {MINIMUM_CAPABILITY[0]}.{MINIMUM_CAPABILITY[1]}"
        )
    return None
