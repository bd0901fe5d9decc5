"""The auxiliary losses of routers, against transformers and the paper's formula."""

import pytest
import torch
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from ultramem.model.ffn import make_ffn_config, router_losses

MOE = {"type": "moe", "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 5}


def logits_of_layers(num_layers=3, num_tokens=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        (2 * torch.randn(num_tokens, 6, generator=generator)).to(dtype).requires_grad_() for _ in range(num_layers)
    )


MASKS = {
    "none": None,
    "all": torch.ones(2, 5, dtype=torch.int64),
    "padded": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    "bool": torch.tensor([[False, True, True, True, True], [True, True, False, False, False]]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_those_of_transformers_and_the_paper(mask, dtype):
    config = make_ffn_config({**MOE, "router_aux_loss_coef": 0.7, "router_z_loss_coef": 0.3})
    ours, theirs = logits_of_layers(dtype=dtype), logits_of_layers(dtype=dtype)
    losses = router_losses(ours, config, mask)
    wide = tuple(logits.float() for logits in theirs)
    kept = torch.stack(wide)[:, slice(None) if mask is None else mask.reshape(-1).bool()]
    expected = {
        "load_balance": 0.7 * load_balancing_loss_func(wide, 6, 2, mask),
        "router_z": 0.3 * torch.log(kept.exp().sum(-1)).pow(2).mean(),
    }
    torch.testing.assert_close(losses, expected)
    for name in losses:
        actual = torch.autograd.grad(losses[name], ours, retain_graph=True)
        torch.testing.assert_close(actual, torch.autograd.grad(expected[name], theirs, retain_graph=True))


def test_a_balanced_router_has_the_least_load_balance():
    config = make_ffn_config({**MOE, "num_experts": 6, "router_aux_loss_coef": 1.0})
    rows = torch.eye(6) + torch.eye(6).roll(1, 0)
    balanced = router_losses((rows,), config)["load_balance"]
    torch.testing.assert_close(balanced, torch.tensor(2.0))
    assert router_losses((10 * rows[:1].expand(6, -1),), config)["load_balance"] > 5


def test_masks_of_cached_decoding_and_other_forms():
    config, logits = make_ffn_config(MOE), logits_of_layers()
    mask = MASKS["padded"]
    longer = torch.cat([torch.ones(2, 7, dtype=torch.int64), mask], 1)
    assert router_losses(logits, config, longer) == router_losses(logits, config, mask)
    assert router_losses(logits, config, mask.view(2, 1, 1, 5)) == router_losses(logits, config)


@pytest.mark.parametrize("num_tokens", [0, 10])
def test_padding_alone_costs_nothing(num_tokens):
    logits = logits_of_layers(num_tokens=num_tokens)
    losses = router_losses(logits, make_ffn_config(MOE), torch.zeros(2, num_tokens // 2, dtype=torch.int64))
    assert set(losses) == {"load_balance", "router_z"}
    for loss in losses.values():
        assert loss == 0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, logits, retain_graph=True))


def test_weight_zero_leaves_a_loss_out():
    logits = logits_of_layers()
    assert set(router_losses(logits, make_ffn_config({**MOE, "router_z_loss_coef": 0}))) == {"load_balance"}
    assert set(router_losses(logits, make_ffn_config({**MOE, "router_aux_loss_coef": 0}))) == {"router_z"}
