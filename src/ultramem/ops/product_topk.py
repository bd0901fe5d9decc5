"""product_topk: the two-stage search for the best slots of a product-key grid, with additive or Tucker scores."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ultramem.ops import backends
from ultramem.ops.precision import without_autocast

Search = Literal["two_stage", "signed", "exact"]

# The exact search scores the whole grid; chunks of tokens keep that below this many elements at a time.
_EXACT_CHUNK_ELEMENTS = 1 << 24


def num_candidates(search: Search, side: int, coarse_top_k: int) -> int:
    """How many grid slots a search scores: the largest top_k that it can return."""
    if search == "exact":
        return side * side
    if search == "signed":
        return math.ceil(coarse_top_k / 2) ** 2 + (coarse_top_k // 2) ** 2
    return coarse_top_k**2


def product_topk_flops(
    side: int, rank: int, num_heads: int, num_cores: int | None, top_k: int, coarse_top_k: int, search: Search
) -> int:
    """FLOPs of the search per token: coarse scores, candidate grid, per-core scores of the selected slots.

    A multiply-add counts as two. ``num_cores`` None is for additive scores: one addition per candidate and per slot.
    """
    if num_cores is None:
        return num_heads * (num_candidates(search, side, coarse_top_k) + top_k)
    if search == "exact":
        quadrants, coarse = [side], 0
    elif search == "signed":
        quadrants, coarse = [math.ceil(coarse_top_k / 2), coarse_top_k // 2], 2 * side * rank
    else:
        quadrants, coarse = [coarse_top_k], 2 * side * rank
    grid = sum(keys * rank**2 + keys**2 * rank for keys in quadrants)
    return 2 * num_heads * (coarse + grid + top_k * num_cores * (rank**2 + rank))


def check_search(search: str, side: int, top_k: int, coarse_top_k: int) -> None:
    """Raise ValueError, saying what is allowed, if a search cannot return ``top_k`` slots of a grid of that side."""
    if search not in get_args(Search):
        raise ValueError(f"search must be one of {', '.join(get_args(Search))}; got {search!r}.")
    # The exact search ignores it, but the key-balance loss counts the coarse selections of every search.
    if not 1 <= coarse_top_k <= side:
        raise ValueError(f"coarse_top_k must lie between 1 and the {side} keys of a side; got {coarse_top_k}.")
    most = num_candidates(search, side, coarse_top_k)  # type: ignore[arg-type]
    if not 1 <= top_k <= most:
        raise ValueError(
            f"top_k must lie between 1 and {most}, the candidates of search {search!r} with {side} keys a side and "
            f"coarse_top_k {coarse_top_k}; got {top_k}."
        )


def coarse_candidates(coarse_NHS: Tensor, coarse_top_k: int, search: Search) -> list[Tensor]:
    """The keys of one side that the coarse stage keeps, as one [N, H, m'] index block per quadrant of the search."""
    if search == "signed":
        largest, smallest = math.ceil(coarse_top_k / 2), coarse_top_k // 2
        parts = [coarse_NHS.topk(largest, dim=-1).indices]
        return [*parts, coarse_NHS.topk(smallest, dim=-1, largest=False).indices] if smallest else parts
    return [coarse_NHS.topk(coarse_top_k, dim=-1).indices]


def take_keys(scores_NHSr: Tensor, keys_NHK: Tensor) -> Tensor:
    """The scores of chosen keys: [N, H, K, r] out of [N, H, S, r]."""
    return scores_NHSr.gather(2, keys_NHK[..., None].expand(*keys_NHK.shape, scores_NHSr.shape[3]))


def _score_pairs(row_NHmr: Tensor, col_NHmr: Tensor, core_Hrr: Tensor | None) -> Tensor:
    """The selection score of every pair of a row and a column key: [N, H, m, m]."""
    if core_Hrr is None:
        return row_NHmr + col_NHmr.transpose(2, 3)
    return torch.einsum("nhir,hrq,nhjq->nhij", row_NHmr, core_Hrr, col_NHmr)


def _coarse_scores(scores_NHSr: Tensor, direction_Hr: Tensor | None) -> Tensor:
    """What the coarse stage ranks one side's keys by: [N, H, S]."""
    return scores_NHSr[..., 0] if direction_Hr is None else torch.einsum("nhsr,hr->nhs", scores_NHSr, direction_Hr)


def _best_of_quadrants(
    row_scores_NHSr: Tensor,
    col_scores_NHSr: Tensor,
    core_Hrr: Tensor | None,
    row_quadrants: list[Tensor],
    col_quadrants: list[Tensor],
    top_k: int,
) -> tuple[Tensor, Tensor]:
    """Score every pair inside each quadrant and return the row and column keys [N, H, K] of the top_k."""
    scores, row_positions, col_positions, start = [], [], [], 0
    for rows_NHm, cols_NHm in zip(row_quadrants, col_quadrants, strict=True):
        row_NHmr, col_NHmr = take_keys(row_scores_NHSr, rows_NHm), take_keys(col_scores_NHSr, cols_NHm)
        scores.append(_score_pairs(row_NHmr, col_NHmr, core_Hrr).flatten(2))
        pair = torch.arange(rows_NHm.shape[2] ** 2, device=rows_NHm.device)
        row_positions.append(start + pair // rows_NHm.shape[2])
        col_positions.append(start + pair % rows_NHm.shape[2])
        start += rows_NHm.shape[2]
    best = torch.cat(scores, dim=2).topk(top_k, dim=2).indices
    rows = torch.cat(row_quadrants, dim=2).gather(2, torch.cat(row_positions)[best])
    cols = torch.cat(col_quadrants, dim=2).gather(2, torch.cat(col_positions)[best])
    return rows, cols


def _best_of_grid(
    row_scores_NHSr: Tensor, col_scores_NHSr: Tensor, core_Hrr: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """The exact search: the row and column keys [N, H, K] of the top_k of the whole grid."""
    _, num_heads, side, _ = row_scores_NHSr.shape
    chunk = max(1, _EXACT_CHUNK_ELEMENTS // (num_heads * side * side))
    best = [
        _score_pairs(rows, cols, core_Hrr).flatten(2).topk(top_k, dim=2).indices
        for rows, cols in zip(torch.split(row_scores_NHSr, chunk), torch.split(col_scores_NHSr, chunk), strict=True)
    ]
    slots = torch.cat(best) if best else row_scores_NHSr.new_empty(0, num_heads, top_k, dtype=torch.int64)
    return slots // side, slots % side


@without_autocast
def product_topk_reference(
    row_scores_NHSr: Tensor,
    col_scores_NHSr: Tensor,
    cores_CHrr: Tensor | None,
    row_direction_Hr: Tensor | None,
    col_direction_Hr: Tensor | None,
    top_k: int,
    coarse_top_k: int,
    search: Search = "two_stage",
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of `product_topk`; every backend must agree with it."""
    core_Hrr = None if cores_CHrr is None else cores_CHrr.sum(0)
    if search == "exact":
        rows, cols = _best_of_grid(row_scores_NHSr, col_scores_NHSr, core_Hrr, top_k)
    else:
        row_quadrants = coarse_candidates(_coarse_scores(row_scores_NHSr, row_direction_Hr), coarse_top_k, search)
        col_quadrants = coarse_candidates(_coarse_scores(col_scores_NHSr, col_direction_Hr), coarse_top_k, search)
        rows, cols = _best_of_quadrants(row_scores_NHSr, col_scores_NHSr, core_Hrr, row_quadrants, col_quadrants, top_k)
    row_NHKr, col_NHKr = take_keys(row_scores_NHSr, rows), take_keys(col_scores_NHSr, cols)
    if cores_CHrr is None:
        scores_NHKC = row_NHKr + col_NHKr
    else:
        scores_NHKC = torch.einsum("nhkr,chrq,nhkq->nhkc", row_NHKr, cores_CHrr, col_NHKr)
    return scores_NHKC.contiguous(), rows * row_scores_NHSr.shape[2] + cols


@torch.no_grad()
@without_autocast
def search_recall(
    row_scores_NHSr: Tensor, col_scores_NHSr: Tensor, cores_CHrr: Tensor | None, slots_NHK: Tensor
) -> Tensor:
    """Share of the exact search's slots that a search found: its recall, for each token.

    Args:
        row_scores_NHSr: fine scores of the row keys, as the search was given them.
        col_scores_NHSr: the same for the column keys.
        cores_CHrr: the Tucker cores; None for additive scores.
        slots_NHK: grid indices that the search found, int64.

    Returns:
        [N] in [0, 1], averaged over heads, in the dtype of the fine scores; carries no gradient.
    """
    core_Hrr = None if cores_CHrr is None else cores_CHrr.sum(0)
    rows, cols = _best_of_grid(row_scores_NHSr, col_scores_NHSr, core_Hrr, slots_NHK.shape[2])
    exact_NHK = rows * row_scores_NHSr.shape[2] + cols
    found_NHK = (exact_NHK[..., None] == slots_NHK[:, :, None]).any(-1)
    return found_NHK.to(row_scores_NHSr.dtype).mean((1, 2))


def choose_search(operator: str, search: str, backend: str, *tensors: Tensor) -> str:
    """The backend of a search; the exact one, which is a measure of the others, has the reference alone."""
    if search == "exact":
        return backends.REFERENCE
    return backends.choose(operator, backend, *tensors)


def search_fine_scores(
    chosen: str,
    row_scores_NHSr: Tensor,
    col_scores_NHSr: Tensor,
    cores_CHrr: Tensor | None,
    row_direction_Hr: Tensor | None,
    col_direction_Hr: Tensor | None,
    top_k: int,
    coarse_top_k: int,
    search: str,
) -> tuple[Tensor, Tensor]:
    """The search by Triton's kernels where those were chosen and fit it, else by the reference."""
    operands = (row_scores_NHSr, col_scores_NHSr, cores_CHrr, row_direction_Hr, col_direction_Hr)
    if chosen == backends.TRITON:
        from ultramem.ops.triton import search as kernels

        if kernels.fits(row_scores_NHSr, top_k, coarse_top_k, search):
            return kernels.product_topk(*operands, top_k, coarse_top_k)
    return product_topk_reference(*operands, top_k, coarse_top_k, search)  # type: ignore[arg-type]


@without_autocast
def _run(
    row_scores_NHSr: Tensor,
    col_scores_NHSr: Tensor,
    cores_CHrr: Tensor | None,
    row_direction_Hr: Tensor | None,
    col_direction_Hr: Tensor | None,
    top_k: int,
    coarse_top_k: int,
    search: str,
    backend: str = backends.AUTO,
) -> tuple[Tensor, Tensor]:
    operands = (row_scores_NHSr, col_scores_NHSr, cores_CHrr, row_direction_Hr, col_direction_Hr)
    chosen = choose_search("product_topk", search, backend, row_scores_NHSr)
    if chosen == backends.CPU:
        scores, slots = torch.ops.ultramem_cpu.product_topk(*operands, top_k, coarse_top_k, search == "signed")
        return scores.to(row_scores_NHSr.dtype), slots
    return search_fine_scores(chosen, *operands, top_k, coarse_top_k, search)


_product_topk = torch.library.custom_op("ultramem::product_topk", _run, mutates_args=())


@_product_topk.register_fake
def _(row_scores_NHSr, col_scores_NHSr, cores_CHrr, row_direction_Hr, col_direction_Hr, top_k, *_):  # type: ignore[no-untyped-def]
    num_tokens, num_heads = row_scores_NHSr.shape[:2]
    return (
        row_scores_NHSr.new_empty(num_tokens, num_heads, top_k, 1 if cores_CHrr is None else cores_CHrr.shape[0]),
        row_scores_NHSr.new_empty(num_tokens, num_heads, top_k, dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.search, ctx.backend = inputs[-2:]
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def key_gradients(
    grad_scores_NHKC: Tensor, row_NHKr: Tensor, col_NHKr: Tensor, cores_CHrr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the selected fine scores of both sides, [N, H, K, r] each, and of the cores.

    Scores are bilinear in both sides and linear in the cores; only the selected slots carry gradient.
    """
    weighted = torch.einsum("nhkc,chrq->nhkrq", grad_scores_NHKC, cores_CHrr)
    grad_row = torch.einsum("nhkrq,nhkq->nhkr", weighted, col_NHKr)
    grad_col = torch.einsum("nhkrq,nhkr->nhkq", weighted, row_NHKr)
    grad_cores = torch.einsum("nhkc,nhkr,nhkq->chrq", grad_scores_NHKC, row_NHKr, col_NHKr)
    return grad_row, grad_col, grad_cores


@torch.library.custom_op("ultramem::put_keys", mutates_args=())
def _put_keys(gradient_NHKr: Tensor, keys_NHK: Tensor, side: int) -> Tensor:
    """`put_keys` by Triton's kernel."""
    from ultramem.ops.triton import search as kernels

    return kernels.put_keys(gradient_NHKr, keys_NHK, side)


@_put_keys.register_fake
def _(gradient_NHKr: Tensor, keys_NHK: Tensor, side: int) -> Tensor:
    num_tokens, num_heads, _, rank = gradient_NHKr.shape
    return gradient_NHKr.new_empty(num_tokens, num_heads, side, rank)


_put_keys.register_autograd(
    lambda ctx, grad_NHSr: (take_keys(grad_NHSr, ctx.saved_tensors[0]), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


def put_keys(gradient_NHKr: Tensor, keys_NHK: Tensor, side: int, chosen: str = backends.REFERENCE) -> Tensor:
    """The gradient of `take_keys`: sums over equal keys, [N, H, S, r]; ``chosen`` is the backend of the search."""
    if chosen == backends.TRITON:
        gradient: Tensor = torch.ops.ultramem.put_keys(gradient_NHKr, keys_NHK, side)
        return gradient
    num_tokens, num_heads, _, rank = gradient_NHKr.shape
    gradient = gradient_NHKr.new_zeros(num_tokens, num_heads, side, rank)
    return gradient.scatter_add_(2, keys_NHK[..., None].expand(gradient_NHKr.shape), gradient_NHKr)


@without_autocast
def _backward(ctx, grad_scores_NHKC: Tensor, _):  # type: ignore[no-untyped-def]
    row_scores, col_scores, cores_CHrr, slots_NHK = ctx.saved_tensors
    side = row_scores.shape[2]
    rows, cols = slots_NHK // side, slots_NHK % side
    chosen = choose_search("product_topk", ctx.search, ctx.backend, row_scores)
    if cores_CHrr is None:
        sides = (put_keys(grad_scores_NHKC, keys_NHK, side, chosen) for keys_NHK in (rows, cols))
        return *sides, *[None] * 7
    row_NHKr, col_NHKr = take_keys(row_scores, rows), take_keys(col_scores, cols)
    grad_row, grad_col, grad_cores = key_gradients(grad_scores_NHKC, row_NHKr, col_NHKr, cores_CHrr)
    return put_keys(grad_row, rows, side, chosen), put_keys(grad_col, cols, side, chosen), grad_cores, *[None] * 6


@register_flop_formula(torch.ops.ultramem.product_topk)
def _(row_shape, col_shape, cores_shape, row_direction, col_direction, top_k, coarse_top_k, search, backend=None, **_):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, side, rank = row_shape
    num_cores = None if cores_shape is None else cores_shape[0]
    return num_tokens * product_topk_flops(side, rank, num_heads, num_cores, top_k, coarse_top_k, search)


_product_topk.register_autograd(_backward, setup_context=_setup_context)


def product_topk(
    row_scores_NHSr: Tensor,
    col_scores_NHSr: Tensor,
    cores_CHrr: Tensor | None = None,
    row_direction_Hr: Tensor | None = None,
    col_direction_Hr: Tensor | None = None,
    *,
    top_k: int,
    coarse_top_k: int | None = None,
    search: Search = "two_stage",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the slots of a product-key grid with the largest scores.

    Tucker scores (UltraMem, arXiv 2411.12364, §3.2): g_c(i, j) = row[i, :] · C_c · col[j, :]ᵀ, selected by
    g(i, j) = Σ_c g_c(i, j). Additive scores (product keys, arXiv 1907.05242), without cores: g(i, j) = row[i] + col[j],
    for which the two-stage search is exact.

    ``two_stage``, as published: the coarse scores row · u and col · t keep the top m keys of each side; the exact g
    selects among the m × m pairs. A product of two negative coarse scores, a large positive grid score, is never a
    candidate. ``signed``: the m/2 largest and the m/2 smallest coarse scores of each side, and the two quadrants of
    equal sign; half the candidates, nearly exact. ``exact``: the whole grid, against which recall is measured.

    Args:
        row_scores_NHSr: fine scores of the row keys, S keys a side and r ranks (additive: r = 1), for N tokens and H
            heads; fp32 or fp64.
        col_scores_NHSr: the same for the column keys.
        cores_CHrr: the Tucker cores, C of them per head; None for additive scores.
        row_direction_Hr: u, the leading left singular vector of Σ_c C_c; carries no gradient; None for additive scores.
        col_direction_Hr: t, the leading right singular vector; None for additive scores.
        top_k: K slots per head and token; at most the candidates of the search (m², signed about m²/2, exact S²).
        coarse_top_k: m, the keys that each side keeps; None for top_k (at most S).
        search: which of the three searches.
        backend: see `ultramem.ops.use_backend`; the exact search runs on the reference whatever it says.

    Returns:
        scores [N, H, K, C] (additive: C = 1) in the dtype of the fine scores, in descending order of Σ_c,
        differentiable in the fine scores and the cores; grid indices i·S + j, [N, H, K] int64.

    Raises:
        ValueError: top_k, coarse_top_k or search outside what is allowed, directions missing or left over, or additive
            scores with several ranks or the signed search, which only products of scores need.
        BackendError: an explicitly requested backend that cannot run.
    """
    if (cores_CHrr is None) != (row_direction_Hr is None) or (cores_CHrr is None) != (col_direction_Hr is None):
        raise ValueError("product_topk takes cores with both directions, or none of the three for additive scores.")
    if cores_CHrr is None and (row_scores_NHSr.shape[3] != 1 or search == "signed"):
        raise ValueError(
            f"additive scores have one rank and need no signed search; got {row_scores_NHSr.shape[3]} ranks and search "
            f"{search!r}."
        )
    side = row_scores_NHSr.shape[2]
    coarse_top_k = min(top_k, side) if coarse_top_k is None else coarse_top_k
    check_search(search, side, top_k, coarse_top_k)
    operands = (row_scores_NHSr, col_scores_NHSr, cores_CHrr, row_direction_Hr, col_direction_Hr)
    search_grid = _run if backends.runs_directly(*operands) else _product_topk
    scores, slots = search_grid(*operands, top_k, coarse_top_k, search, backends.requested(backend))
    return scores, slots
