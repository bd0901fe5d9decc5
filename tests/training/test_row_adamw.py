"""Row-wise AdamW: AdamW where all rows are touched, and nothing at all for the rows that are not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

from ultramem.errors import CheckpointError
from ultramem.ops import RowGradients, bag, gather_dot
from ultramem.training.moments import FIRST, MOMENT_TYPES, SECOND, EightBitMoments, PlainMoments
from ultramem.training.row_adamw import CPU_CHUNK_ROWS, RowAdamW

SETTINGS = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Pair:
    """The same table twice: with a dense gradient under torch's AdamW, and with collected rows under ours."""

    def __init__(self, num_rows, width=6, dtype=torch.float64, moments="fp32"):
        generator = torch.Generator().manual_seed(num_rows)
        start = torch.randn(num_rows, width, generator=generator, dtype=dtype)
        self.dense, self.rows = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        self.collector = RowGradients(num_rows, width)
        self.adamw = AdamW([self.dense], fused=True, **SETTINGS)
        self.ours = RowAdamW([self.rows], {self.rows: self.collector}, MOMENT_TYPES[moments](), **SETTINGS)

    def backward(self, idx_NK, seed=0):
        """One lookup of each kind, backward through both tables."""
        generator = torch.Generator().manual_seed(seed)
        width, dtype = self.rows.shape[1], self.rows.dtype
        w_NK = torch.randn(idx_NK.shape, generator=generator, dtype=dtype)
        x_NV = torch.randn(idx_NK.shape[0], width, generator=generator, dtype=dtype)
        for table, collector in ((self.dense, None), (self.rows, self.collector)):
            pooled_NV = bag(idx_NK, w_NK, table, row_gradients=collector)
            dots_NK = gather_dot(idx_NK, x_NV, table, row_gradients=collector)
            ((pooled_NV * x_NV).sum() + (dots_NK * dots_NK).sum()).backward()

    def step(self):
        for optimizer in (self.adamw, self.ours):
            optimizer.step()
            optimizer.zero_grad()

    def moments(self):
        return {
            name: (self.adamw.state[self.dense][name], self.ours.state[self.rows][name]) for name in (FIRST, SECOND)
        }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_adamw_where_every_row_is_touched(dtype, tolerance):
    """Over several steps, rows repeated, more rows than one chunk."""
    num_rows = CPU_CHUNK_ROWS + 3
    pair = Pair(num_rows, dtype=dtype)
    for step in range(5):
        idx_NK = torch.cat([torch.randperm(num_rows), torch.randint(num_rows, (1,))]).view(-1, 2)
        pair.backward(idx_NK, seed=step)
        pair.step()
    for expected, got in [(pair.dense, pair.rows), *pair.moments().values()]:
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert pair.ours.state[pair.rows]["step"] == pair.adamw.state[pair.dense]["step"] == 5


touched_rows = st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=0, max_size=6)


@given(steps=st.lists(touched_rows, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_touched_rows_follow_the_definition_and_the_others_rest(steps):
    """The lazy update written out row by row: SparseAdam's, with decoupled decay; a step may touch no row at all."""
    pair = Pair(7)
    expected = pair.rows.detach().clone()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    (beta1, beta2), lr, eps = SETTINGS["betas"], SETTINGS["lr"], SETTINGS["eps"]
    for number, rows in enumerate(steps, start=1):
        idx_NK = torch.tensor(rows, dtype=torch.int64).view(-1, 2)
        pair.dense.data.copy_(expected)
        pair.backward(idx_NK, seed=number)
        gradient = pair.dense.grad
        for row in set(idx_NK.flatten().tolist()):
            first[row] = beta1 * first[row] + (1 - beta1) * gradient[row]
            second[row] = beta2 * second[row] + (1 - beta2) * gradient[row] ** 2
            expected[row] *= 1 - lr * SETTINGS["weight_decay"]
            denominator = (second[row] / (1 - beta2**number)).sqrt() + eps
            expected[row] -= lr * first[row] / (1 - beta1**number) / denominator
        pair.dense.grad = None
        pair.ours.step()
        pair.ours.zero_grad()
        torch.testing.assert_close(pair.rows.detach(), expected, rtol=1e-11, atol=1e-11)
    assert pair.ours.state[pair.rows]["step"] == len(steps)


def test_one_row_hit_by_every_token_gets_the_sum():
    pair = Pair(5)
    pair.backward(torch.full((64, 3), 2))
    pair.step()
    torch.testing.assert_close(pair.rows[2], pair.dense[2], rtol=1e-12, atol=1e-12)
    others = torch.tensor([0, 1, 3, 4])
    # AdamW decays them; the lazy update leaves them alone.
    torch.testing.assert_close(pair.rows[others] * (1 - SETTINGS["lr"] * 0.1), pair.dense[others])


@pytest.mark.parametrize("kind", list(MOMENT_TYPES))
def test_untouched_rows_and_their_moments_keep_every_bit(kind):
    pair = Pair(9, dtype=torch.float32, moments=kind)
    pair.backward(torch.arange(9).view(3, 3))
    pair.step()
    before = {name: value.clone() for name, value in pair.ours.state[pair.rows].items()} | {"table": pair.rows.clone()}
    pair.backward(torch.tensor([[1, 4], [4, 7]]), seed=1)
    pair.step()
    after = pair.ours.state[pair.rows] | {"table": pair.rows.detach()}
    touched = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([1, 4, 7]), True)
    for name in before.keys() - {"step"}:
        assert torch.equal(before[name][~touched], after[name][~touched]), name
        assert not torch.equal(before[name][touched], after[name][touched]), name


def test_gradients_accumulate_until_they_are_dropped():
    whole, parts = Pair(9), Pair(9)
    idx_NK = torch.randint(9, (8, 3))
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    bag(idx_NK, w_NK, whole.rows, row_gradients=whole.collector).sum().backward()
    for part in (slice(0, 2), slice(2, 8)):
        bag(idx_NK[part], w_NK[part], parts.rows, row_gradients=parts.collector).sum().backward()
    for pair in (whole, parts):
        pair.ours.step()
    torch.testing.assert_close(parts.rows, whole.rows, rtol=1e-12, atol=1e-12)
    parts.ours.zero_grad()
    assert parts.collector.contributions == []
    before = parts.rows.clone()
    parts.ours.step()
    assert torch.equal(parts.rows, before)


def test_no_dense_gradient_and_no_table_sized_tensor_in_a_step():
    """Every operation of a step, clipping and `zero_grad` included, stays below the table's size."""
    pair = Pair(5000, dtype=torch.float32)
    pair.ours.step()  # creates the moments
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            touched = out if isinstance(out, torch.Tensor) else None
            # An in-place write of rows returns the whole table.
            if touched is not None and func is not torch.ops.aten.index_copy_.default:
                sizes.append(touched.numel())
            return out

    idx_NK = torch.randint(5000, (8, 3))
    with Watch():
        pooled = bag(idx_NK, torch.ones(8, 3), pair.rows, row_gradients=pair.collector)
        pooled.sum().backward()
        sizes.clear()  # lookups see the table through views
        pair.ours.clip_rows_(1.0)
        pair.ours.step()
        pair.ours.zero_grad()
    assert pair.rows.grad is None
    assert 0 < max(sizes) <= 24 * 6


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_is_torchs(limit):
    pair = Pair(9)
    pair.backward(torch.randint(9, (8, 3)))
    expected = nn.utils.clip_grad_norm_([pair.dense], limit)
    torch.testing.assert_close(pair.ours.clip_rows_(limit), expected, rtol=1e-12, atol=0)
    rows, gradient = pair.ours.coalesce()[pair.rows]
    torch.testing.assert_close(gradient, pair.dense.grad[rows], rtol=1e-9, atol=1e-12)


def test_clipping_a_step_without_rows_gives_zero():
    assert Pair(3).ours.clip_rows_(1.0) == 0


def test_a_replaced_gradient_is_the_one_that_is_taken():
    """What a reduction over processes does."""
    pair = Pair(4)
    pair.backward(torch.tensor([[0, 1]]))
    pair.ours.coalesce()[pair.rows] = (torch.tensor([3]), torch.ones(1, 6, dtype=torch.float64))
    before = pair.rows.detach().clone()
    pair.ours.step()
    assert (pair.rows != before).any(1).tolist() == [False, False, False, True]


@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-6), ("bf16", 0.01), ("8bit", 0.1)])
def test_narrow_moments_stay_near_the_full_ones(kind, tolerance):
    """Ten steps of rows whose gradients differ by orders of magnitude between elements."""
    full, narrow = (Pair(50, width=32, dtype=torch.float32, moments=name) for name in ("fp32", kind))
    start = full.rows.detach().clone()
    for step in range(10):
        for pair in (full, narrow):
            pair.backward(torch.randint(50, (40, 4), generator=torch.Generator().manual_seed(step)), seed=step)
            pair.step()
    moved = (full.rows - start).detach().norm()
    assert (narrow.rows - full.rows).detach().norm() / moved < tolerance
    assert moved > 1


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bit_codes_are_near_and_stable(signed):
    """Error within half a gap of the code; zeros are exact; what was written is written again unchanged."""
    name, kind = (FIRST, EightBitMoments()) if signed else (SECOND, EightBitMoments())
    value = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 3, 20)[:, None]
    value[3] = 0
    value = value if signed else value.square()
    state, rows = kind.new_state(torch.empty(20, 32)), torch.arange(20)
    kind.write_rows(state, name, rows, value)
    got = kind.read_rows(state, name, rows)
    largest = value.abs().amax(1, keepdim=True)
    assert ((got - value).abs() <= 0.011 * largest).all()
    assert (got[3] == 0).all()
    torch.testing.assert_close(got.abs().amax(1), largest[:, 0])
    kind.write_rows(state, name, rows, got)
    torch.testing.assert_close(kind.read_rows(state, name, rows), got, rtol=1e-5, atol=0)
    assert {key: value.dtype for key, value in state.items()} == {
        "exp_avg_code": torch.uint8,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq_code": torch.uint8,
        "exp_avg_sq_scale": torch.float32,
    }


def test_a_small_second_moment_is_not_lost_before_the_first():
    """A gradient 10⁻⁵ of the row's largest: its square is below the smallest code, and 0 would blow up the step."""
    pair = Pair(1, width=2, dtype=torch.float32, moments="8bit")
    gradient = torch.tensor([[1.0, 1e-5]])
    pair.ours.coalesce()[pair.rows] = (torch.tensor([0]), gradient)
    pair.ours.step()
    second = EightBitMoments().read_rows(pair.ours.state[pair.rows], SECOND, torch.tensor([0]))
    assert second[0, 1] == pytest.approx(0.05 * 1e-10, rel=0.5)


@pytest.mark.parametrize("kind", list(MOMENT_TYPES))
def test_a_loaded_state_continues_bit_for_bit(kind):
    whole, other = (Pair(9, dtype=torch.float32, moments=kind) for _ in range(2))
    for step in range(3):
        whole.backward(torch.randint(9, (4, 2)), seed=step)
        whole.step()
    other.rows.data.copy_(whole.rows)
    other.ours.load_state_dict(copy.deepcopy(whole.ours.state_dict()))
    idx_NK = torch.randint(9, (4, 2))
    for pair in (whole, other):
        pair.backward(idx_NK, seed=7)
        pair.ours.step()
    assert torch.equal(whole.rows, other.rows)
    for name, value in whole.ours.state[whole.rows].items():
        assert value.dtype == other.ours.state[other.rows][name].dtype
        assert torch.equal(value, other.ours.state[other.rows][name]), name


def test_adamws_state_fits_and_other_moments_are_refused():
    dense, rows, coded = (
        Pair(9, dtype=torch.float32),
        *(Pair(9, dtype=torch.float32, moments=m) for m in ("bf16", "8bit")),
    )
    dense.backward(torch.arange(9).view(3, 3))
    dense.step()
    saved = dense.adamw.state_dict()
    rows.ours.load_state_dict(saved)
    assert torch.equal(rows.ours.state[rows.rows][FIRST], dense.adamw.state[dense.dense][FIRST].bfloat16())
    with pytest.raises(
        CheckpointError, match=r"exp_avg, exp_avg_sq, step, but .*exp_avg_code.*'optimizer.table_moments'"
    ):
        coded.ours.load_state_dict(saved)


def test_dense_parameters_beside_tables_are_adamws():
    weight, twin = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    table = nn.Parameter(torch.ones(4, 3))
    ours = RowAdamW(
        [{"params": [weight]}, {"params": [table]}], {table: RowGradients(4, 3)}, PlainMoments(), **SETTINGS
    )
    adamw = AdamW([twin], fused=True, **SETTINGS)
    for _ in range(3):
        weight.grad = twin.grad = torch.randn(3, 3)
        loss = ours.step(lambda: 2.5)
        adamw.step()
    assert loss == 2.5
    assert torch.equal(weight, twin)
    assert torch.equal(table, torch.ones(4, 3))
    ours.zero_grad()
    assert weight.grad is None
