"""key_search: the search of a product-key grid from queries and keys, where few keys ever need their fine scores."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultramem.ops import backends
from ultramem.ops.precision import without_autocast
from ultramem.ops.product_topk import (
    Search,
    check_search,
    choose_search,
    key_gradients,
    product_topk_flops,
    product_topk_reference,
    put_keys,
    search_fine_scores,
    take_keys,
)


def fine_scores(query_NQd: Tensor, keys_HSrd: Tensor) -> Tensor:
    """⟨query, key⟩ of one side for every key and rank: [N, H, S, r].

    Args:
        query_NQd: one query for all ranks (Q = 1) or one for each (Q = r).
        keys_HSrd: the side's keys.
    """
    if query_NQd.shape[1] == 1:
        return torch.einsum("nd,hsrd->nhsr", query_NQd[:, 0], keys_HSrd)
    return torch.einsum("nrd,hsrd->nhsr", query_NQd, keys_HSrd)


def contract_keys(keys_HSrd: Tensor, direction_Hr: Tensor, num_queries: int) -> Tensor:
    """What a side's flattened queries [N, Q·d] are multiplied with to get its coarse scores: [H, S, Q·d].

    Σ_ρ direction[ρ] ⟨K[s, ρ], q⟩ = ⟨Σ_ρ direction[ρ] K[s, ρ], q⟩ with one query; with a query for each rank the scaled
    keys stand side by side.
    """
    scaled_HSrd = keys_HSrd * direction_Hr[:, None, :, None]
    return scaled_HSrd.sum(2) if num_queries == 1 else scaled_HSrd.flatten(2)


@without_autocast
def key_search_reference(
    query_N2Qd: Tensor,
    keys_H2Srd: Tensor,
    cores_CHrr: Tensor,
    row_direction_Hr: Tensor,
    col_direction_Hr: Tensor,
    top_k: int,
    coarse_top_k: int,
    search: Search = "two_stage",
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `key_search`: `product_topk` of all fine scores. Every backend must agree with it."""
    row, col = (fine_scores(query_N2Qd[:, side], keys_H2Srd[:, side]) for side in (0, 1))
    return product_topk_reference(row, col, cores_CHrr, row_direction_Hr, col_direction_Hr, top_k, coarse_top_k, search)


def _slot_keys(slots_NHK: Tensor, keys_H2Srd: Tensor) -> tuple[Tensor, Tensor]:
    side = keys_H2Srd.shape[2]
    return slots_NHK // side, slots_NHK % side


@without_autocast
def _run(
    query_N2Qd: Tensor,
    keys_H2Srd: Tensor,
    cores_CHrr: Tensor,
    row_direction_Hr: Tensor,
    col_direction_Hr: Tensor,
    contracted_2HSe: Tensor | None,
    top_k: int,
    coarse_top_k: int,
    search: str,
    backend: str = backends.AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, slots, and the fine scores [N, H, K, 2, r] of the selected keys, which the gradients need."""
    chosen = choose_search("key_search", search, backend, query_N2Qd, keys_H2Srd)
    if chosen == backends.CPU:
        if contracted_2HSe is None:
            contracted_2HSe = contract_sides(keys_H2Srd, row_direction_Hr, col_direction_Hr, query_N2Qd.shape[2])
        operands = (query_N2Qd, keys_H2Srd, contracted_2HSe, cores_CHrr)
        scores, slots, fine = torch.ops.ultramem_cpu.key_search(
            *(operand.contiguous() for operand in operands), top_k, coarse_top_k, search == "signed"
        )
        return scores, slots, fine
    row, col = (fine_scores(query_N2Qd[:, side], keys_H2Srd[:, side]) for side in (0, 1))
    # On a device one product with all keys is cheaper than gathering the kept ones.
    searched = (row, col, cores_CHrr, row_direction_Hr, col_direction_Hr)
    scores, slots = search_fine_scores(chosen, *searched, top_k, coarse_top_k, search)
    rows, cols = _slot_keys(slots, keys_H2Srd)
    return scores, slots, torch.stack([take_keys(row, rows), take_keys(col, cols)], dim=3)


_key_search = torch.library.custom_op("ultramem::key_search", _run, mutates_args=())


@_key_search.register_fake
def _(query_N2Qd, keys_H2Srd, cores_CHrr, row_direction_Hr, col_direction_Hr, contracted, top_k, *_):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, rank = query_N2Qd.shape[0], keys_H2Srd.shape[0], keys_H2Srd.shape[3]
    return (
        query_N2Qd.new_empty(num_tokens, num_heads, top_k, cores_CHrr.shape[0]),
        query_N2Qd.new_empty(num_tokens, num_heads, top_k, dtype=torch.int64),
        query_N2Qd.new_empty(num_tokens, num_heads, top_k, 2, rank),
    )


@without_autocast
def key_search_gradients(
    grad_scores_NHKC: Tensor,
    slots_NHK: Tensor,
    fine_NHK2r: Tensor,
    query_N2Qd: Tensor,
    keys_H2Srd: Tensor,
    cores_CHrr: Tensor,
    chosen: str = backends.REFERENCE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of the gradients of queries, keys and cores; every backend must agree with it."""
    row_NHKr, col_NHKr = fine_NHK2r.unbind(3)
    *grad_sides, grad_cores = key_gradients(grad_scores_NHKC, row_NHKr, col_NHKr, cores_CHrr)
    _, _, num_keys, rank, _ = keys_H2Srd.shape
    grad_queries, grad_keys = [], []
    for side, (gradient, keys_NHK) in enumerate(zip(grad_sides, _slot_keys(slots_NHK, keys_H2Srd), strict=True)):
        grad_NHSr = put_keys(gradient, keys_NHK, num_keys, chosen)
        query_Nrd = query_N2Qd[:, side].expand(-1, rank, -1)
        grad_keys.append(torch.einsum("nhsr,nrd->hsrd", grad_NHSr, query_Nrd))
        grad_Nrd = torch.einsum("nhsr,hsrd->nrd", grad_NHSr, keys_H2Srd[:, side])
        grad_queries.append(grad_Nrd.sum(1, keepdim=True) if query_N2Qd.shape[2] == 1 else grad_Nrd)
    return torch.stack(grad_queries, dim=1), torch.stack(grad_keys, dim=1), grad_cores


@torch.library.custom_op("ultramem::key_search_backward", mutates_args=())
@without_autocast
def _key_search_backward(
    grad_scores_NHKC: Tensor,
    slots_NHK: Tensor,
    fine_NHK2r: Tensor,
    query_N2Qd: Tensor,
    keys_H2Srd: Tensor,
    cores_CHrr: Tensor,
    search: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and cores."""
    chosen = choose_search("key_search", search, backend, query_N2Qd, keys_H2Srd)
    if chosen == backends.CPU:
        operands = (grad_scores_NHKC, slots_NHK, fine_NHK2r, query_N2Qd, keys_H2Srd, cores_CHrr)
        grad_query, grad_keys, grad_cores = torch.ops.ultramem_cpu.key_search_backward(
            *(operand.contiguous() for operand in operands)
        )
        return grad_query, grad_keys, grad_cores
    return key_search_gradients(grad_scores_NHKC, slots_NHK, fine_NHK2r, query_N2Qd, keys_H2Srd, cores_CHrr, chosen)


@_key_search_backward.register_fake
def _(grad_scores_NHKC, slots_NHK, fine_NHK2r, query_N2Qd, keys_H2Srd, cores_CHrr, search, backend):  # type: ignore[no-untyped-def]
    # Contiguous whatever the operands' strides are, as the kernel's results.
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query_N2Qd, keys_H2Srd, cores_CHrr))


def _second_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    grad_scores_NHKC, slots_NHK, _, *operands = inputs[:6]
    ctx.save_for_backward(slots_NHK, grad_scores_NHKC, *operands)


@without_autocast
def _second_backward(ctx, *grad_gradients: Tensor):  # type: ignore[no-untyped-def]
    """Second derivatives, by differentiating the definition."""
    slots_NHK, *saved = ctx.saved_tensors
    with torch.enable_grad():
        operands = [tensor.detach().requires_grad_() for tensor in saved]
        grad_scores_NHKC, query_N2Qd, keys_H2Srd, cores_CHrr = operands
        fine = [
            take_keys(fine_scores(query_N2Qd[:, side], keys_H2Srd[:, side]), chosen)
            for side, chosen in enumerate(_slot_keys(slots_NHK, keys_H2Srd))
        ]
        gradients = key_search_gradients(
            grad_scores_NHKC, slots_NHK, torch.stack(fine, dim=3), query_N2Qd, keys_H2Srd, cores_CHrr
        )
    first, *others = torch.autograd.grad(gradients, operands, grad_gradients)
    return first, None, None, *others, None, None


_key_search_backward.register_autograd(_second_backward, setup_context=_second_setup_context)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.search, ctx.backend = inputs[-2:]
    _, slots_NHK, fine_NHK2r = output
    ctx.save_for_backward(*inputs[:3], slots_NHK, fine_NHK2r)
    ctx.mark_non_differentiable(slots_NHK, fine_NHK2r)


def _backward(ctx, grad_scores_NHKC: Tensor, *_):  # type: ignore[no-untyped-def]
    query_N2Qd, keys_H2Srd, cores_CHrr, slots_NHK, fine_NHK2r = ctx.saved_tensors
    gradients = torch.ops.ultramem.key_search_backward(
        grad_scores_NHKC, slots_NHK, fine_NHK2r, query_N2Qd, keys_H2Srd, cores_CHrr, ctx.search, ctx.backend
    )
    return *gradients, *[None] * 7


_key_search.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.ultramem.key_search)
def _(query_shape, keys_shape, cores_shape, row, col, contracted, top_k, coarse_top_k, search, backend=None, **_):  # type: ignore[no-untyped-def]
    num_heads, _, side, rank, width = keys_shape
    scores = 2 * num_heads * 2 * side * rank * width
    search_flops = product_topk_flops(side, rank, num_heads, cores_shape[0], top_k, coarse_top_k, search)
    return query_shape[0] * (scores + search_flops)


def contract_sides(keys_H2Srd: Tensor, row_direction_Hr: Tensor, col_direction_Hr: Tensor, num_queries: int) -> Tensor:
    """`contract_keys` of both sides: [2, H, S, Q·d]."""
    directions = (row_direction_Hr, col_direction_Hr)
    sides = [contract_keys(keys_H2Srd[:, side], directions[side], num_queries) for side in (0, 1)]
    return torch.stack(sides)


def key_search(
    query_N2Qd: Tensor,
    keys_H2Srd: Tensor,
    cores_CHrr: Tensor,
    row_direction_Hr: Tensor,
    col_direction_Hr: Tensor,
    *,
    top_k: int,
    coarse_top_k: int,
    search: Search = "two_stage",
    contracted_2HSe: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the slots of a product-key grid with the largest Tucker scores, from queries and keys.

    The slots of `product_topk` with the fine scores row[s, ρ] = ⟨K_row[s, ρ], q_row⟩ (UltraMem, arXiv 2411.12364,
    §3.2). Coarse scores need no fine ones: row · u = ⟨Σ_ρ u[ρ] K_row[s, ρ], q_row⟩, one product with keys that are
    contracted once. Fine scores are taken of the m keys alone that each side keeps.

    Args:
        query_N2Qd: normalised queries of both sides, one for all ranks (Q = 1) or one for each (Q = r); fp32 or fp64.
        keys_H2Srd: normalised keys of both sides, S a side, in the same dtype.
        cores_CHrr: the Tucker cores, C of them per head.
        row_direction_Hr: u, the leading left singular vector of Σ_c C_c; carries no gradient.
        col_direction_Hr: t, the leading right singular vector; carries no gradient.
        top_k: K slots per head and token; at most the candidates of the search.
        coarse_top_k: m, the keys that each side keeps.
        search: see `product_topk`.
        contracted_2HSe: `contract_sides` of these keys and directions, where it is at hand.
        backend: see `ultramem.ops.use_backend`; the exact search runs on the reference whatever it says.

    Returns:
        scores [N, H, K, C] in the queries' dtype, in descending order of Σ_c, differentiable in queries, keys and
        cores; grid indices i·S + j, [N, H, K] int64.

    Raises:
        ValueError: top_k, coarse_top_k or search outside what is allowed; shapes that do not fit each other.
        BackendError: an explicitly requested backend that cannot run.
    """
    num_queries, rank = query_N2Qd.shape[2], keys_H2Srd.shape[3]
    if num_queries not in (1, rank) or query_N2Qd.shape[3] != keys_H2Srd.shape[4]:
        raise ValueError(
            f"key_search needs queries [N, 2, 1 or r, d] for keys [H, 2, S, r, d]; got {tuple(query_N2Qd.shape)} and "
            f"{tuple(keys_H2Srd.shape)}."
        )
    check_search(search, keys_H2Srd.shape[2], top_k, coarse_top_k)
    operands = (query_N2Qd, keys_H2Srd, cores_CHrr, row_direction_Hr, col_direction_Hr, contracted_2HSe)
    search_keys = _run if backends.runs_directly(*operands) else _key_search
    scores, slots, _ = search_keys(*operands, top_k, coarse_top_k, search, backends.requested(backend))
    return scores, slots
