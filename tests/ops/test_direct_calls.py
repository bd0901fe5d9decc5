"""Calls past PyTorch's dispatcher: answered wherever kernels can, declined wherever an operator has more to do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tolerances import assert_bit_equal, assert_close
from ultramem.ops import backends, bag, gather_dot, pooled_read, use_backend
from ultramem.ops.cpu import direct_calls, why_unavailable

IDX, BLOCK = torch.tensor([[0, 2, 2], [1, 4, 0]]), torch.tensor([[0, 1, 1], [1, 0, 0]])
GENERATOR = torch.Generator().manual_seed(5)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR)


W, W_CORES, X, X_BLOCKS, TABLE, PRE = (
    normal(2, 3),
    normal(2, 3, 2),
    normal(2, 6),
    normal(2, 12),
    normal(5, 6),
    normal(5, 6),
)
BLOCKS = {"block_NK": BLOCK, "num_blocks": 2}
CALLS = {
    "bag": lambda **options: bag(IDX, W, TABLE, **options),
    "bag, cores and blocks": lambda **options: bag(IDX, W_CORES, TABLE, **BLOCKS, **options),
    "gather_dot": lambda **options: gather_dot(IDX, X, TABLE, **options),
    "gather_dot, cores and blocks": lambda **options: gather_dot(
        IDX, X_BLOCKS, TABLE, num_cores=2, **BLOCKS, **options
    ),
    "pooled_read": lambda **options: pooled_read(IDX, W, TABLE, X, PRE, **options),
    "pooled_read, all": lambda **options: pooled_read(
        IDX, W_CORES, TABLE, X, PRE, activation="gelu", **BLOCKS, **options
    ),
}


class Counting:
    """Stands for the kernels; counts their answers."""

    def __init__(self):
        self.answers = []

    def __getattr__(self, name):
        def call(*args):
            self.answers.append(getattr(direct_calls(), name)(*args))
            return self.answers[-1]

        return call


@pytest.fixture
def direct(monkeypatch):
    assert why_unavailable() is None
    kernels = Counting()
    monkeypatch.setattr(backends, "_direct", kernels)
    return kernels


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_plain_operands_are_answered_as_the_operator_answers(call, direct, monkeypatch):
    out = call(backend="cpu")
    (answer,) = direct.answers
    assert answer is out
    assert_close(out, call(backend="reference"))
    monkeypatch.setattr(backends, "_direct", None)
    assert_bit_equal(out, call(backend="cpu"))


def test_the_reference_is_not_called_past(direct):
    with use_backend("reference"):
        bag(IDX, W, TABLE)
    bag(IDX, W, TABLE, backend="reference")
    assert not direct.answers


class Seeing(TorchDispatchMode):
    """Notes which operators are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_operator(direct):
    with Seeing() as mode:
        pooled_read(IDX, W, TABLE, X, PRE)
    assert "ultramem.pooled_read.default" in mode.seen
    assert direct.answers == [None]


def test_gradients_reach_a_table_that_wants_them(direct):
    table = TABLE.clone().requires_grad_()
    bag(IDX, W, table).sum().backward()
    assert direct.answers == [None]
    assert table.grad.abs().sum() > 0
    with torch.no_grad():
        bag(IDX, W, table)
    assert direct.answers[1] is not None


class Subclass(torch.Tensor):
    """A tensor that something may be done with."""


@pytest.mark.parametrize(
    "table", [TABLE.double(), TABLE.half(), TABLE.as_subclass(Subclass)], ids=["fp64", "fp16", "subclass"]
)
def test_other_tables_are_declined(table, direct):
    assert bag(IDX, W, table, backend="auto").dtype == table.dtype
    assert direct.answers == [None]


def test_transforms_of_functions_are_declined():
    assert why_unavailable() is None

    def total(x):
        assert direct_calls().gather_dot(IDX, x, TABLE, None, 1, 1) is None
        return x.sum()

    torch.func.grad(total)(X)
    torch.func.vmap(total)(X[None])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: bag(IDX, W[:1], TABLE), ValueError, r"bag: weights must be \[N, K\]"),
        (lambda: bag(IDX, normal(2, 3, 4), TABLE), ValueError, "bag: a width of 6 cannot be cut into 4"),
        (lambda: bag(IDX.float(), W, TABLE), TypeError, "bag: idx_NK must be int32 or int64"),
        (lambda: bag(IDX, W, TABLE, num_blocks=2), ValueError, "bag: block_NK and num_blocks > 1 go together"),
        (lambda: bag(IDX + 3, W, TABLE), IndexError, "out of range; the number of rows is 5"),
        (lambda: gather_dot(IDX, X[:, :5], TABLE), ValueError, r"gather_dot: x_NV must be \[N, 6\]"),
        (lambda: gather_dot(IDX, X, TABLE, num_cores=0), ValueError, "gather_dot: a width of 6 cannot be cut into 0"),
        (lambda: pooled_read(IDX, W, TABLE, X, PRE[:4]), ValueError, "pooled_read: x_NU and pre_values_RU must have"),
        (lambda: pooled_read(IDX[0], W, TABLE, X, PRE), ValueError, "pooled_read: weights must be"),
    ],
)
def test_what_is_wrong_is_told_by_the_operator(call, error, words, direct):
    with pytest.raises(error, match=words):
        call()
    assert direct.answers in ([], [None])
