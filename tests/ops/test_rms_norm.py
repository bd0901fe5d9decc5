"""rms_norm against its definition, on the reference and on the C++ kernel."""

import pytest
import torch

from tolerances import assert_bit_equal, assert_close
from ultramem.errors import BackendError
from ultramem.ops import rms_norm, rms_norm_reference, use_backend

BACKENDS = ["reference", "cpu"]
SIZES = [(5, 128), (3, 2, 7), (2, 3, 4, 33), (1,), (700, 40), (0, 6), (4, 0)]


def make_operands(sizes=(5, 33), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sizes, generator=generator, dtype=torch.float64) * 3
    gain = torch.rand(sizes[-1], generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), gain.to(dtype).requires_grad_()


def run_with_gradients(operands, backend):
    out = rms_norm(*operands, 1e-5, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), operands)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_definition(sizes, backend, poisoned_memory):
    operands = make_operands(sizes)
    x, gain = (operand.detach().double().requires_grad_() for operand in operands)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    expected = expected.detach(), *torch.autograd.grad((expected * weights).sum(), (x, gain))
    for ours, theirs in zip(run_with_gradients(operands, backend), expected, strict=True):
        assert_close(ours, theirs)
    with torch.no_grad():
        assert_close(rms_norm(*operands, 1e-5, backend=backend), expected[0])


def test_operands_need_not_be_contiguous():
    x, gain = make_operands((4, 6, 5))
    turned = x.transpose(1, 2)
    gain = torch.rand(12)[::2]
    assert_close(rms_norm(turned, gain, 1e-5, backend="cpu"), rms_norm_reference(turned, gain, 1e-5))
    (ours,) = torch.autograd.grad(rms_norm(turned, gain, 1e-5, backend="cpu")[0].sum(), x)
    (theirs,) = torch.autograd.grad(rms_norm_reference(turned, gain, 1e-5)[0].sum(), x)
    assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_computed_in_fp32(backend):
    x, gain = (operand.detach().bfloat16() for operand in make_operands())
    normed = rms_norm(x, gain, 1e-5, backend=backend)
    assert normed.dtype == torch.float32
    assert_close(normed, rms_norm(x.double(), gain.double(), 1e-5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_the_dtypes_of_their_operands(backend):
    x, gain = make_operands(dtype=torch.bfloat16)
    gradients = torch.autograd.grad(rms_norm(x, gain, 1e-5, backend=backend).square().sum(), (x, gain))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2


def test_second_derivatives():
    operands = make_operands((4, 9))
    expected = [operand.detach().double().requires_grad_() for operand in operands]
    results = []
    for x, gain in (operands, expected):
        out = rms_norm(x, gain, 1e-5, backend="cpu" if x.dtype == torch.float32 else "reference")
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        first = torch.autograd.grad((out.square() * weights).sum(), (x, gain), create_graph=True)
        results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), (x, gain)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max())


def test_registration_is_sound():
    torch.library.opcheck(torch.ops.ultramem.rms_norm.default, (*make_operands(), 1e-5))


def test_bits_do_not_depend_on_the_number_of_threads():
    operands, results, before = make_operands((3000, 48)), [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(run_with_gradients(operands, "cpu"))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for ours, theirs in zip(others, results[0], strict=True):
            assert_bit_equal(ours, theirs)


def test_a_compiler_sees_the_definition(fresh_compiler):
    seen = []

    def see(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    operands = make_operands()
    compiled = torch.compile(lambda x, gain: rms_norm(x, gain, 1e-5), fullgraph=True, backend=see)
    assert_close(compiled(*operands), rms_norm_reference(*operands, 1e-5))
    assert any("rsqrt" in name for name in seen)
    assert not any("ultramem" in name for name in seen)


def test_fp64_takes_the_reference_and_has_no_kernel():
    operands = make_operands(dtype=torch.float64)
    with use_backend("auto"):
        assert_bit_equal(rms_norm(*operands, 1e-5), rms_norm_reference(*operands, 1e-5))
    with pytest.raises(BackendError, match=r"rms_norm: backend 'cpu' .* float64"):
        rms_norm(*operands, 1e-5, backend="cpu")
