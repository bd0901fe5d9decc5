"""rms_norm: vectors divided by their root mean square, times a gain."""

import torch
from torch import Tensor

from ultramem.ops.backends import CPU, choose, requested, runs_directly
from ultramem.ops.precision import accumulation_dtype


def rms_norm_reference(x: Tensor, gain_d: Tensor, epsilon: float) -> Tensor:
    """Plain PyTorch definition of `rms_norm`; every backend must agree with it."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain_d


def _run(x: Tensor, gain_d: Tensor, epsilon: float) -> Tensor:
    out: Tensor = torch.ops.ultramem_cpu.rms_norm(x.contiguous(), gain_d.contiguous(), epsilon)
    return out


_rms_norm = torch.library.custom_op("ultramem::rms_norm", _run, mutates_args=())


@_rms_norm.register_fake
def _(x, gain_d, epsilon):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("ultramem::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad_out: Tensor, x: Tensor, gain_d: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    operands = (grad_out, x, gain_d)
    grad_x, grad_gain = torch.ops.ultramem_cpu.rms_norm_backward(
        *(operand.contiguous() for operand in operands), epsilon
    )
    return grad_x, grad_gain


@_rms_norm_backward.register_fake
def _(grad_out, x, gain_d, epsilon):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), gain_d.new_empty(gain_d.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *operands, ctx.epsilon = inputs
    ctx.save_for_backward(*operands)


def _backward(ctx, grad_out: Tensor):  # type: ignore[no-untyped-def]
    return *torch.ops.ultramem.rms_norm_backward(grad_out, *ctx.saved_tensors, ctx.epsilon), None


def _second_backward(ctx, *grad_gradients: Tensor):  # type: ignore[no-untyped-def]
    """Second derivatives, by differentiating the definition."""
    with torch.enable_grad():
        grad_out, x, gain_d = operands = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        out = rms_norm_reference(x, gain_d, ctx.epsilon)
        gradients = torch.autograd.grad(out, (x, gain_d), grad_out, create_graph=True)
    return *torch.autograd.grad(gradients, operands, grad_gradients), None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)
_rms_norm_backward.register_autograd(_second_backward, setup_context=_setup_context)


def rms_norm(x: Tensor, gain_d: Tensor, epsilon: float, *, backend: str | None = None) -> Tensor:
    """Divide vectors by their root mean square, and multiply them with a gain.

    out = x / √(mean(x²) + ε) ⊙ gain

    Args:
        x: vectors along the last dimension, any floating dtype.
        gain_d: the gain, of their width.
        epsilon: ε.
        backend: see `ultramem.ops.use_backend`; Triton has no kernel of its own and takes the reference.

    Returns:
        Like ``x``, computed in and returned as fp32 (fp64 for fp64).

    Raises:
        BackendError: a backend that was asked for cannot run.
    """
    x = x.to(accumulation_dtype(x))
    gain_d = gain_d.to(x.dtype)
    # A compiler makes one loop of the definition and of what stands around it.
    if torch.compiler.is_compiling() or choose("rms_norm", requested(backend), x, gain_d) != CPU:
        return rms_norm_reference(x, gain_d, epsilon)
    if runs_directly(x, gain_d):
        return _run(x, gain_d, epsilon)
    out: Tensor = _rms_norm(x, gain_d, epsilon)
    return out
