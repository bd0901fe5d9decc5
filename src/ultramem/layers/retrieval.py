"""Query-key retrieval, from a token to scored slots of a product-key grid: what all share, and Tucker scores."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.layers.derived import Derived
from ultramem.layers.plain import apply_linear
from ultramem.ops import Search, coarse_candidates, contract_keys, contract_sides, fine_scores, key_search, rms_norm
from ultramem.ops.precision import accumulation_dtype, without_autocast

NORM_EPSILON = 1e-5
# Tokens of the simulation that sets the norm gains: the mean score's standard error is then well under one percent.
_SIMULATED_TOKENS = 512


def is_loaded(tensor: Tensor) -> bool:
    """Whether a tensor's values came from a checkpoint."""
    # transformers marks what came from a checkpoint; its initialisers skip such tensors, and so must we.
    return getattr(tensor, "_is_hf_initialized", False)


def simulated_inputs(weight: Tensor, seed: int) -> Tensor:
    """Standard normal inputs [tokens, D] for a query projection, in its dtype."""
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    inputs = torch.randn(_SIMULATED_TOKENS, weight.shape[1], generator=generator, device=weight.device)
    return inputs.to(weight.dtype)


def typical_score(scores: Tensor) -> float:
    """Mean of the selected scores, by which gains are set.

    Where nearly the whole grid is selected it is about zero, or below, and no gain brings it to 1: the scores' spread
    then bounds the gain.
    """
    return max(float(scores.mean()), 0.1 * float(scores.std()))


class Retrieved(NamedTuple):
    """Slots that the tokens selected, and what was searched, from which losses and statistics make what they need.

    Attributes:
        scores_NHKC: scores of the selected slots.
        slots_NHK: their grid indices.
        query: the queries as they were scored: [N, 2, Q, kd] for Tucker scores, [N, H, 2, kd] for additive ones.
        keys: the keys as they were scored: [H, 2, S, r, kd], or [H, 2, S, kd].
    """

    scores_NHKC: Tensor
    slots_NHK: Tensor
    query: Tensor
    keys: Tensor


class Retrieval(nn.Module):
    """Buffers that stay fp32 whatever the model is cast to, and nothing derived that outlives a change of the weights.

    Rounded directions would select other slots, and a running mean in bf16 would stand still.
    """

    def forget(self) -> None:
        """Drop what was derived from the weights: they may change in ways that their versions do not show."""

    def train(self, mode: bool = True) -> "Retrieval":
        """As of every module; a change of mode is where weights may have been exchanged."""
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Retrieval":
        self.forget()
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, buffer.to(device=after.device))
        return self


class TuckerRetrieval(Retrieval):
    """Product keys with a rank axis, one query for all heads, and Tucker cores (UltraMem, arXiv 2411.12364, §3.2).

    S_row[i, ρ] = ⟨K_row[i, :, ρ], q_row⟩ after RMS norm of both, likewise for columns;
    g_c(i, j) = S_row[i] C_c S_col[j]ᵀ.

    Args:
        hidden_size: D.
        num_keys: S, keys per side.
        key_dim: kd.
        num_heads: H; heads share the query and differ in their keys and cores.
        num_cores: C.
        rank: r.
        top_k: slots per token and head.
        coarse_top_k: keys that each side keeps before the grid is scored.
        search: see `ultramem.ops.product_topk`.
        num_queries: queries per side: one for all ranks, or one for every rank (UltraMemV2).
    """

    parameter_roles: ClassVar[dict[str, str]] = {
        "keys": "key",
        "cores": "key",
        "query_norm": "norm",
        "key_norm": "norm",
    }
    row_direction: Tensor
    col_direction: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_keys: int,
        key_dim: int,
        num_heads: int,
        num_cores: int,
        rank: int,
        top_k: int,
        coarse_top_k: int,
        search: Search,
        num_queries: int,
    ) -> None:
        super().__init__()
        self.key_dim, self.top_k, self.coarse_top_k, self.search = key_dim, top_k, coarse_top_k, search
        self.num_queries = num_queries
        self.query_proj = nn.Linear(hidden_size, 2 * self.num_queries * key_dim, bias=False)
        self.query_norm = nn.Parameter(torch.empty(key_dim))
        self.key_norm = nn.Parameter(torch.empty(key_dim))
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim, rank))
        self.cores = nn.Parameter(torch.empty(num_cores, num_heads, rank, rank))
        self.register_buffer("row_direction", torch.empty(num_heads, rank, dtype=torch.float32))
        self.register_buffer("col_direction", torch.empty(num_heads, rank, dtype=torch.float32))
        self._refreshed = (0, 0)
        # Of weights that stand still.
        self._searched_keys: Derived[tuple[Tensor, Tensor]] = Derived()
        self._singular_values: Derived[Tensor] = Derived()

    def forget(self) -> None:
        """Drop the cached keys and singular values."""
        self._searched_keys.clear()
        self._singular_values.clear()

    @torch.no_grad()
    @without_autocast
    def refresh(self) -> None:
        """Recompute the leading singular pair (u, t) of Σ_c C_c; call after every optimizer step.

        The pair's common sign is the one nearer, in L1 distance, to the pair that it replaces. In training mode the
        layer also calls this by itself when its cores have changed (except under `torch.compile`).
        """
        self.forget()
        u, _, vh = torch.linalg.svd(self.cores.float().sum(0))
        row, col = u[..., :, 0], vh[..., 0, :]
        previous_row, previous_col = self.row_direction, self.col_direction
        distance = (row - previous_row).abs().sum(-1) + (col - previous_col).abs().sum(-1)
        flipped = (row + previous_row).abs().sum(-1) + (col + previous_col).abs().sum(-1)
        sign = torch.where(flipped < distance, -1.0, 1.0)[:, None]
        self.row_direction.copy_(sign * row)
        self.col_direction.copy_(sign * col)
        self._refreshed = self._cores_state()

    @torch.no_grad()
    def reset_parameters(self, query_std: float, norm_gain: float | None) -> None:
        """Draw keys from N(0, 1/kd), cores from U(0, 1), the query projection from N(0, query_std²).

        Args:
            query_std: standard deviation of the query projection.
            norm_gain: gain of both norms; None simulates the retrieval with the drawn weights on normal inputs and sets
                the gains so that the mean selected score, over tokens, slots and cores, is 1.
        """
        init.normal_(self.query_proj.weight, std=query_std)
        init.normal_(self.keys, std=self.key_dim**-0.5)
        init.uniform_(self.cores)
        missing = [direction for direction in (self.row_direction, self.col_direction) if not is_loaded(direction)]
        for direction in missing:
            direction.zero_()
        if missing:
            # A loaded half decides the sign, and comes out as it was.
            self.refresh()
        if norm_gain is None and not is_loaded(self.query_norm):
            # Scores are of degree two in each gain.
            norm_gain = typical_score(self.simulate(gains=1.0)) ** -0.25
        if norm_gain is not None:
            init.constant_(self.query_norm, norm_gain)
            init.constant_(self.key_norm, norm_gain)

    @torch.no_grad()
    @without_autocast
    def simulate(self, gains: float | None = None, seed: int = 0) -> Tensor:
        """Selected scores [tokens, H, K, C] of standard normal inputs, with the present weights.

        Args:
            gains: replaces the gains of both norms; None keeps them.
            seed: of the inputs.
        """
        weight = self.query_proj.weight
        query_gain, key_gain = (
            (torch.full_like(gain, gains) if gains is not None else gain) for gain in (self.query_norm, self.key_norm)
        )
        return self._retrieve(simulated_inputs(weight, seed), query_gain, key_gain).scores_NHKC

    def forward(self, x_ND: Tensor) -> Retrieved:
        """Select top_k slots per token and head for x [N, D]; scores in fp32 (fp64 for an fp64 model)."""
        if self.training and not torch.compiler.is_compiling() and self._cores_state() != self._refreshed:
            self.refresh()
        return self._retrieve(x_ND, self.query_norm, self.key_norm)

    def _cores_state(self) -> tuple[int, int]:
        # Versions alone are not enough: those of a copy of this module count from zero and may meet ours.
        return id(self.cores), self.cores._version

    def _retrieve(self, x_ND: Tensor, query_gain: Tensor, key_gain: Tensor) -> Retrieved:
        query = apply_linear(self.query_proj, x_ND).view(-1, 2, self.num_queries, self.key_dim)
        return self._search(query, query_gain, key_gain)

    @without_autocast
    def _search(self, query_N2Qd: Tensor, query_gain: Tensor, key_gain: Tensor) -> Retrieved:
        query_N2Qd = rms_norm(query_N2Qd, query_gain, NORM_EPSILON)
        keys, contracted = self._keys_to_search(key_gain, query_N2Qd.dtype)
        cores = self.cores.to(query_N2Qd.dtype)
        directions = (self.row_direction.to(query_N2Qd.dtype), self.col_direction.to(query_N2Qd.dtype))
        scores, slots = key_search(
            query_N2Qd,
            keys,
            cores,
            *directions,
            top_k=self.top_k,
            coarse_top_k=self.coarse_top_k,
            search=self.search,
            contracted_2HSe=contracted,
        )
        return Retrieved(scores, slots, query_N2Qd, keys)

    def _keys_to_search(self, key_gain: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Normalised keys [H, 2, S, r, kd], and for the cached ones their contraction [2, H, S, Q·kd]."""
        if key_gain is not self.key_norm or torch.is_grad_enabled():
            # Gradients must reach the raw keys; a pass that records them announces that the weights will change.
            self._searched_keys.clear()
            return self._normalized_keys(key_gain, dtype), None
        sources = (self.keys, self.key_norm, self.row_direction, self.col_direction)

        def derive() -> tuple[Tensor, Tensor]:
            keys = self._normalized_keys(key_gain, dtype)
            directions = (self.row_direction.to(dtype), self.col_direction.to(dtype))
            return keys, contract_sides(keys, *directions, self.num_queries)

        return self._searched_keys.get(sources, dtype, derive)

    def searched_keys(self) -> tuple[Tensor, Tensor]:
        """Normalised keys [H, 2, S, r, kd] and their contraction [2, H, S, Q·kd], in fp32; without gradients."""
        keys_H2Srd, contracted_2HSe = self._keys_to_search(self.key_norm, torch.float32)
        assert contracted_2HSe is not None, "gradients are recorded"
        return keys_H2Srd, contracted_2HSe

    def _normalized_keys(self, gain: Tensor, dtype: torch.dtype) -> Tensor:
        # Each key of each rank contiguous: the fine scores read single ones.
        return rms_norm(self.keys.transpose(3, 4), gain, NORM_EPSILON).to(dtype).contiguous()

    def singular_values(self) -> Tensor:
        """Singular values [H, r] of Σ_c C_c in fp32, computed once for as long as the cores stand still."""
        with torch.no_grad():
            return self._singular_values.get(
                (self.cores,), torch.float32, lambda: torch.linalg.svdvals(self.cores.float().sum(0))
            )

    @without_autocast
    def fine_scores(self, retrieved: Retrieved, sample_M: Tensor) -> tuple[Tensor, Tensor]:
        """Fine scores [M, H, S, r] of all row and all column keys for M of the tokens."""
        query_M2Qd, keys_H2Srd = retrieved.query[sample_M], retrieved.keys
        row, col = (fine_scores(query_M2Qd[:, side], keys_H2Srd[:, side]) for side in (0, 1))
        return row, col

    @without_autocast
    def tucker_penalty(self, margin: float) -> Tensor:
        """1/(r−1) · Σ_{i≥2} max(0, λ_i − margin)², λ the singular values of Σ_c C_c, averaged over heads; a scalar."""
        values_Hr: Tensor = torch.linalg.svdvals(self.cores.to(accumulation_dtype(self.cores)).sum(0))
        if values_Hr.shape[1] == 1:
            return values_Hr.new_zeros(())
        return (values_Hr[:, 1:] - margin).clamp_min(0).square().mean()

    @without_autocast
    def key_balance(self, retrieved: Retrieved) -> Tensor:
        """S · Σ_i p_i f_i for each side, added: p the mean softmax of the coarse scores, f the share of selections.

        Zero for an empty batch.
        """
        total = retrieved.scores_NHKC.new_zeros(())
        if retrieved.scores_NHKC.shape[0] == 0:
            return total
        for side, direction in enumerate((self.row_direction, self.col_direction)):
            contracted = contract_keys(retrieved.keys[:, side], direction.to(retrieved.keys.dtype), self.num_queries)
            coarse_NHS = torch.einsum("ne,hse->nhs", retrieved.query[:, side].flatten(1), contracted)
            probability_S = coarse_NHS.softmax(-1).mean((0, 1))
            selected = torch.cat(coarse_candidates(coarse_NHS.detach(), self.coarse_top_k, self.search), dim=-1)
            count_S = torch.zeros_like(probability_S).scatter_add_(
                0, selected.flatten(), torch.ones_like(selected, dtype=probability_S.dtype).flatten()
            )
            total = total + coarse_NHS.shape[2] * (probability_S * count_S / selected.numel()).sum()
        return total

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        heads, _, side, key_dim, rank = self.keys.shape
        return f"heads={heads}, keys={side}, key_dim={key_dim}, rank={rank}, top_k={self.top_k}, search={self.search}"
