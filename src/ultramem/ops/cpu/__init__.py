"""C++ kernels for CPUs: ``torch.ops.ultramem_cpu.*`` exists once :func:`why_unavailable` has answered None."""

from ultramem.ops.cpu.build import why_unavailable

__all__ = ["why_unavailable"]
