"""The retrieval's directions and their refresh, what stays fp32, and the auxiliary losses against hand formulas."""

import copy

import pytest
import torch

from naive_memories import naive_fine_scores
from tiny_memories import HIDDEN_SIZE, memory_layer, tokens
from tolerances import assert_close


def retrieval(**changes):
    return memory_layer(**changes)[0].retrieval


def pair(module):
    return module.row_direction.clone(), module.col_direction.clone()


def assert_is_leading_pair(module):
    """u and t are unit vectors and uᵀ C t is the largest singular value of C = Σ_c C_c."""
    core, (u, t) = module.cores.detach().float().sum(0), pair(module)
    assert_close(torch.einsum("hr,hrq,hq->h", u, core, t), torch.linalg.svdvals(core)[:, 0])
    for direction in (u, t):
        assert_close(direction.square().sum(-1), torch.ones(len(u)))


def test_construction_leaves_the_leading_pair():
    assert_is_leading_pair(retrieval(num_heads=3, num_cores=3, rank=3))


@pytest.mark.parametrize("signs", [(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)])
def test_refresh_continues_the_sign_of_each_head(signs):
    module = retrieval(num_heads=2)
    sign = torch.tensor(signs)[:, None]
    for direction in (module.row_direction, module.col_direction):
        direction.mul_(sign)
    before = pair(module)
    with torch.no_grad():
        module.cores.add_(0.05 * torch.randn_like(module.cores))
    module.refresh()
    assert_is_leading_pair(module)
    for old, new in zip(before, pair(module), strict=True):
        assert ((old * new).sum(-1) > 0.9).all()
        assert not torch.equal(old, new)


def test_the_sign_is_chosen_by_the_distance_of_both_directions_together():
    """u moved away and t moved little: (−u, −t) would be nearer for u alone, (u, t) is nearer for both."""
    module = retrieval(num_cores=1)
    with torch.no_grad():
        module.cores.copy_(torch.diag(torch.tensor([2.0, 1.0])).view(1, 1, 2, 2))
    for sign in (1.0, -1.0):
        module.row_direction.copy_(sign * torch.tensor([[-0.3, 0.95]]))
        module.col_direction.copy_(sign * torch.tensor([[1.0, 0.0]]))
        module.refresh()
        assert_close(module.row_direction, sign * torch.tensor([[1.0, 0.0]]))
        assert_close(module.col_direction, sign * torch.tensor([[1.0, 0.0]]))


def change_cores(module):
    with torch.no_grad():
        module.cores.copy_(torch.tensor([[0.1, 0.9], [0.8, 0.2]]).expand_as(module.cores))


def test_training_refreshes_changed_cores_by_itself_and_evaluation_does_not():
    module = retrieval()
    x = tokens(3)
    before = pair(module)
    change_cores(module)
    module.eval()(x)
    assert torch.equal(module.row_direction, before[0])
    module.train()(x)
    assert not torch.equal(module.row_direction, before[0])
    assert_is_leading_pair(module)


def test_training_leaves_the_pair_of_unchanged_cores_alone():
    module = retrieval()
    module.train()(tokens(3))
    module.row_direction.fill_(0.25)
    module(tokens(3))
    assert (module.row_direction == 0.25).all()


def test_another_trainers_optimizer_step_is_noticed():
    layer, pool = memory_layer()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.3)
    layer(tokens(5), pool).output.square().sum().backward()
    optimizer.step()
    layer(tokens(5), pool)
    assert_is_leading_pair(layer.retrieval)


def test_a_copy_notices_changes_of_its_own_cores():
    module = retrieval()
    copied = copy.deepcopy(module)
    for _ in range(3):
        change_cores(copied)
        copied.train()(tokens(3))
        assert_is_leading_pair(copied)
        with torch.no_grad():
            copied.cores.add_(torch.eye(2))


def test_loading_keeps_the_saved_pair():
    source, target = retrieval(), retrieval(seed=3)
    source.row_direction.mul_(-1)
    source.col_direction.mul_(-1)
    target.load_state_dict(source.state_dict())
    target.eval()(tokens(3))
    assert torch.equal(target.row_direction, source.row_direction)
    # Refreshing the same cores reproduces the pair, sign included.
    target.train()(tokens(3))
    assert_close(target.row_direction, source.row_direction)


def test_directions_are_no_parameters_and_carry_no_gradient():
    module = retrieval()
    assert {name for name, _ in module.named_buffers()} == {"row_direction", "col_direction"}
    assert {"row_direction", "col_direction"} <= set(module.state_dict())
    module(tokens(3)).scores_NHKC.sum().backward()
    assert not module.row_direction.requires_grad


@pytest.mark.parametrize(
    "cast",
    [
        torch.nn.Module.bfloat16,
        torch.nn.Module.half,
        torch.nn.Module.double,
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to(device="cpu", dtype=torch.bfloat16).float(),
    ],
    ids=["bfloat16", "half", "double", "to", "there_and_back"],
)
def test_casting_leaves_the_directions_bit_equal_in_fp32(cast):
    layer, _ = memory_layer(dtype=torch.float32)
    before = pair(layer.retrieval)
    cast(layer)
    for old, new in zip(before, pair(layer.retrieval), strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(new, old)


def test_moving_to_meta_and_back_keeps_the_dtypes():
    layer, _ = memory_layer(dtype=torch.bfloat16)
    moved = layer.to("meta").to_empty(device="cpu")
    assert moved.retrieval.row_direction.dtype == torch.float32
    assert moved.retrieval.keys.dtype == torch.bfloat16
    assert moved.permutation.dtype == torch.int32


def test_a_default_dtype_of_bf16_leaves_the_directions_fp32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = memory_layer(dtype=torch.bfloat16)[0].retrieval
    finally:
        torch.set_default_dtype(torch.float32)
    assert module.row_direction.dtype == torch.float32


def naive_key_balance(layer, x_ND):
    module, config = layer.retrieval, layer.config
    total = 0
    scores = naive_fine_scores(module, x_ND, config.rank, config.query_per_rank)
    for fine, direction in zip(scores, pair(module), strict=True):
        num_tokens, num_heads, side, _ = fine.shape
        coarse = [fine[n, h] @ direction[h].double() for n in range(num_tokens) for h in range(num_heads)]
        probability = sum(torch.softmax(line, 0) for line in coarse) / len(coarse)
        chosen = torch.zeros(side, dtype=torch.float64)
        for line in coarse:
            order = line.argsort(descending=True).tolist()
            m = module.coarse_top_k
            keys = order[: m - m // 2] + order[side - m // 2 :] if config.search == "signed" else order[:m]
            for key in keys:
                chosen[key] += 1 / (len(coarse) * m)
        total = total + side * (probability * chosen).sum()
    return total


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_heads": 2, "query_per_rank": True}, {"search": "signed", "coarse_top_k": 5}, {"search": "exact"}],
    ids=["two_stage", "heads", "signed", "exact"],
)
def test_key_balance_is_the_published_formula(changes):
    layer, pool = memory_layer(key_balance_weight=0.3, **changes)
    x = tokens(4)
    loss = layer(x, pool).losses["key_balance"]
    expected = 0.3 * naive_key_balance(layer, x)
    assert_close(loss, expected)
    parameters = [layer.retrieval.keys, layer.retrieval.query_proj.weight, layer.retrieval.query_norm]
    gradients = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for ours, theirs in gradients:
        assert ours.abs().sum() > 0
        assert_close(ours, theirs)


def test_key_balance_of_no_tokens_is_finite():
    layer, pool = memory_layer(key_balance_weight=0.3)
    assert layer(tokens(0), pool).losses["key_balance"].item() == 0


def test_balanced_keys_have_the_smallest_loss():
    """Two sides at 1 each where all keys are scored and chosen alike; more where one key takes all."""
    layer, pool = memory_layer(key_balance_weight=1.0, top_k=1, coarse_top_k=1)
    with torch.no_grad():
        layer.retrieval.query_norm.zero_()
    assert layer(tokens(50), pool).losses["key_balance"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("margin", [0.0, 0.15, 0.6])
@pytest.mark.parametrize("changes", [{"rank": 3, "num_heads": 2}, {"rank": 2}])
def test_tucker_penalty_is_the_published_formula(changes, margin):
    layer, pool = memory_layer(tucker_penalty_weight=0.7, tucker_penalty_margin=margin, **changes)
    loss = layer(tokens(2), pool).losses["tucker_penalty"]
    core, rank = layer.retrieval.cores.sum(0), changes["rank"]
    expected = 0
    for head in core:
        # Singular values by the eigenvalues of CᵀC: another route than ours.
        values = torch.linalg.eigvalsh(head.T @ head).clamp_min(0).sqrt().flip(0)
        expected = expected + 0.7 / (rank - 1) * sum(torch.relu(value - margin) ** 2 for value in values[1:]) / len(
            core
        )
    assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, layer.retrieval.cores)
    (theirs,) = torch.autograd.grad(expected, layer.retrieval.cores)
    assert_close(ours, theirs)


def test_a_core_within_the_margin_pays_no_penalty():
    layer, pool = memory_layer(tucker_penalty_weight=0.7, tucker_penalty_margin=0.15, num_cores=1)
    with torch.no_grad():
        layer.retrieval.cores.copy_(torch.diag(torch.tensor([1.0, 0.149])).view(1, 1, 2, 2))
    assert layer(tokens(2), pool).losses["tucker_penalty"].item() == 0


def test_a_core_of_rank_one_pays_no_penalty():
    layer, pool = memory_layer(tucker_penalty_weight=0.7, tucker_penalty_margin=0.0, rank=1)
    assert layer(tokens(2), pool).losses["tucker_penalty"].item() == 0


def test_queries_per_rank_are_all_read():
    """Every row of the query projection has a gradient (the released code reads half of them)."""
    layer, pool = memory_layer(query_per_rank=True, rank=3)
    weight = layer.retrieval.query_proj.weight
    assert weight.shape == (2 * 3 * 8, HIDDEN_SIZE)
    layer(tokens(20), pool).output.square().sum().backward()
    assert (weight.grad.abs().sum(1) > 0).all()
