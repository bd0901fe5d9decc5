"""C++ kernels for CPUs: ``torch.ops.ultramem_cpu.*`` exists once :func:`why_unavailable` has answered None."""

from ultramem.ops.cpu.build import direct_calls, why_unavailable

__all__ = ["direct_calls", "why_unavailable"]
