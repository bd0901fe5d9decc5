"""Which kernels an operator runs on: the plain PyTorch reference, C++ for CPUs, or Triton."""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ultramem.errors import BackendError
from ultramem.ops import triton

logger = logging.getLogger(__name__)

AUTO = "auto"
REFERENCE = "reference"
CPU = "cpu"
TRITON = "triton"
BACKENDS = (AUTO, REFERENCE, CPU, TRITON)
# Those whose choice for plain CPU tensors is the C++ kernels.
_DIRECT = (AUTO, CPU)

# Each package of kernels has a function `why_unavailable() -> str | None`: None where it can run.
_PACKAGES = {CPU: "ultramem.ops.cpu", TRITON: "ultramem.ops.triton"}
_DEVICES = {CPU: "cpu", TRITON: "cuda"}
# What the kernels of tables are written for; fp64 is for checking derivatives, which is the reference's work.
_DTYPES = {CPU: (torch.float32, torch.bfloat16), TRITON: (torch.float32, torch.bfloat16, torch.float16)}

# Plain module state: torch.compile guards on it, as it cannot on a context variable.
_chosen = os.environ.get("ULTRAMEM_OPS", AUTO)
_logged: set[str] = set()
# Why a backend cannot run on this machine, or None, as far as it was asked.
_reasons: dict[str, str | None] = {}
# C++ kernels that can be called past the dispatcher, once they are loaded.
_direct: ModuleType | None = None
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run operators on one backend inside a ``with`` block, and their gradients wherever these are computed.

    Args:
        name: ``reference``, ``cpu``, ``triton``, or ``auto`` for the fastest that can run.

    Raises:
        BackendError: an unknown name; from the operators, a backend that cannot run.
    """
    global _chosen
    previous, _chosen = _chosen, requested(name)
    try:
        yield
    finally:
        _chosen = previous


def requested(backend: str | None) -> str:
    """The backend that a call asks for: its argument, else that of `use_backend`, else ``ULTRAMEM_OPS``, else ``auto``.

    Raises:
        BackendError: an unknown name.
    """
    name = _chosen if backend is None else backend
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: ULTRAMEM_OPS and backend= take {', '.join(BACKENDS)}.")
    return name


def choose(operator: str, backend: str, *tensors: Tensor, available: tuple[str, ...] = (CPU, TRITON)) -> str:
    """The backend that an operator runs on.

    Args:
        operator: its name, for messages.
        backend: what was asked for (see `requested`).
        tensors: its floating operands; the first is the largest, which the others are brought to.
        available: backends that the operator has kernels in, beside the reference.

    Returns:
        ``reference``, ``cpu`` or ``triton``. With ``auto``, kernels that cannot run are replaced by the reference; the
        reason is logged once.

    Raises:
        BackendError: an explicitly requested backend cannot run; says why and what to do.
    """
    if backend == REFERENCE:
        return REFERENCE
    device = tensors[0].device.type
    if backend == AUTO:
        for name in available:
            # On CPU tensors Triton is an interpreter for tests, which has to be asked for.
            if _DEVICES[name] == device and not _why_not_tensors(name, tensors):
                if not (reason := _why_not_here(name)):
                    return name
                _log_once(f"operators run on their plain PyTorch reference, several times slower: {reason}")
        return REFERENCE
    if backend not in available:
        reason = f"{operator} has no {backend} kernel"
    else:
        reason = _why_not_tensors(backend, tensors) or _why_not_here(backend) or ""
    if reason:
        raise BackendError(
            f"{operator}: backend {backend!r} was asked for but cannot run: {reason}. Mend that, or ask for 'auto' or "
            "'reference'."
        )
    return backend


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called past PyTorch's dispatcher of custom operators, which costs more than small reads.

    True where nothing has to see the call: no gradient, no compilation, no tensor subclass, no dispatch mode.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    # Loops and no generators here and below: one token's read is as short as ten of these calls.
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN_TYPES or (grad and tensor.requires_grad)):
            return False
    return True


def direct_calls(backend: str | None) -> ModuleType | None:
    """C++ kernels that check their operands by themselves, for a call that asks for this backend (see `requested`).

    Each takes all arguments of the operator of its name by position, and answers None where the operator has more to do
    than to compute: other operands than plain ones of its kernels, gradients, dispatch modes, errors to tell.

    Returns:
        None where they are not loaded, compilation has to see the operator, or another backend was asked for.
    """
    if torch.compiler.is_compiling() or (_chosen if backend is None else backend) not in _DIRECT:
        return None
    return _direct


def _why_not_tensors(backend: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why a backend has no kernel for these operands, or None."""
    device = tensors[0].device.type
    if _DEVICES[backend] != device and (backend != TRITON or device not in triton.devices()):
        hint = " (tests: set TRITON_INTERPRET=1 before python starts)" if (backend, device) == (TRITON, "cpu") else ""
        return f"its kernels are for {_DEVICES[backend]} tensors, these are on {device}{hint}"
    wrong = tensors[0].dtype not in _DTYPES[backend]
    for tensor in tensors:
        wrong = wrong or tensor.dtype is torch.float64
    if wrong:
        names = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[backend])
        return f"its kernels are for {dtypes}, the operands are {names}"
    return None


def _why_not_here(backend: str) -> str | None:
    """Why a backend cannot run on this machine, or None. The kernels are built or loaded on the first call."""
    global _direct
    if backend not in _reasons:
        try:
            package = importlib.import_module(_PACKAGES[backend])
            _reasons[backend] = package.why_unavailable()
            if backend == CPU:
                _direct = package.direct_calls()
        except ImportError as error:
            _reasons[backend] = str(error)
    return _reasons[backend]


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)
