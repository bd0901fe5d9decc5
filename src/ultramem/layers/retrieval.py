"""Query-key retrieval: from a token to the scored slots of a product-key grid, with additive or Tucker scores."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.layers.derived import Derived
from ultramem.layers.plain import apply_linear
from ultramem.ops import Search, coarse_candidates, contract_keys, contract_sides, fine_scores, key_search, product_topk
from ultramem.ops.precision import accumulation_dtype, without_autocast

NORM_EPSILON = 1e-5
# Tokens of the simulation that sets the norm gains: the mean score's standard error is then well under one percent.
_SIMULATED_TOKENS = 512
# Weight of a batch in the running statistics of batch-normalised queries.
_BATCH_MOMENTUM = 0.1


def rms_normalize(x: Tensor, gain: Tensor, dim: int) -> Tensor:
    """X / rms(x) along ``dim``, times a gain [size of dim]; computed and returned in fp32 (fp64 for fp64)."""
    x = x.to(accumulation_dtype(x))
    normed = x * torch.rsqrt(x.square().mean(dim, keepdim=True) + NORM_EPSILON)
    shape = [1] * x.ndim
    shape[dim] = -1
    return normed * gain.to(x.dtype).view(shape)


def is_loaded(tensor: Tensor) -> bool:
    """Whether a tensor's values came from a checkpoint."""
    # transformers marks what came from a checkpoint; its initialisers skip such tensors, and so must we.
    return getattr(tensor, "_is_hf_initialized", False)


def _simulated_inputs(weight: Tensor, seed: int) -> Tensor:
    """Standard normal inputs [tokens, D] for a query projection, in its dtype."""
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    inputs = torch.randn(_SIMULATED_TOKENS, weight.shape[1], generator=generator, device=weight.device)
    return inputs.to(weight.dtype)


def _typical_score(scores: Tensor) -> float:
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


class _Retrieval(nn.Module):
    """Buffers stay fp32 whatever the model is cast to: rounded directions would select other slots, and a running mean
    in bf16 would stand still.
    """

    def forget(self) -> None:
        """Drop what was derived from the weights: they may change in ways that their versions do not show."""

    def train(self, mode: bool = True) -> "_Retrieval":
        """As of every module; a change of mode is where weights may have been exchanged."""
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Retrieval":
        self.forget()
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, buffer.to(device=after.device))
        return self


class AdditiveRetrieval(_Retrieval):
    """Product keys with additive scores, a query and keys for each head (Lample et al., arXiv 1907.05242).

    score(i, j) = ⟨K_row[i], q_row⟩ + ⟨K_col[j], q_col⟩, after the norms that are switched on.

    Args:
        hidden_size: D.
        num_keys: S, keys per side.
        key_dim: kd.
        num_heads: H.
        top_k: slots per token and head.
        query_bias: a bias in the query projection.
        query_norm: None, ``rms`` over each half of a query, or ``batch``: batch norm of every query feature, with
            running statistics in evaluation.
        key_norm: RMS norm of the keys.
    """

    parameter_roles: ClassVar[dict[str, str]] = {
        "keys": "key",
        "query_norm": "norm",
        "query_shift": "norm",
        "key_norm": "norm",
    }
    query_norm: nn.Parameter | None
    query_shift: nn.Parameter | None
    key_norm: nn.Parameter | None
    query_mean: Tensor | None
    query_variance: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_keys: int,
        key_dim: int,
        num_heads: int,
        top_k: int,
        query_bias: bool,
        query_norm: Literal["rms", "batch"] | None,
        key_norm: bool,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.query_proj = nn.Linear(hidden_size, num_heads * 2 * key_dim, bias=query_bias)
        width = {None: 0, "rms": key_dim, "batch": self.query_proj.out_features}[query_norm]
        self.register_parameter("query_norm", nn.Parameter(torch.empty(width)) if query_norm else None)
        batch = query_norm == "batch"
        self.register_parameter("query_shift", nn.Parameter(torch.empty(width)) if batch else None)
        for name in ("query_mean", "query_variance"):
            self.register_buffer(name, torch.empty(width, dtype=torch.float32) if batch else None)
        self.register_parameter("key_norm", nn.Parameter(torch.empty(key_dim)) if key_norm else None)
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim))

    @torch.no_grad()
    def reset_parameters(self, simulate_gains: bool) -> None:
        """Draw keys from U(±1/√(2·kd)), the query projection Xavier-uniform with zero bias; gains are one.

        Args:
            simulate_gains: set the norms' gains so that the mean selected score of standard normal inputs is 1.
        """
        bound = (2 * self.keys.shape[3]) ** -0.5
        init.uniform_(self.keys, -bound, bound)
        init.xavier_uniform_(self.query_proj.weight)
        if self.query_proj.bias is not None:
            init.zeros_(self.query_proj.bias)
        for tensor in (self.query_shift, self.query_mean):
            if tensor is not None:
                init.zeros_(tensor)
        if self.query_variance is not None:
            init.ones_(self.query_variance)
        gains = [gain for gain in (self.query_norm, self.key_norm) if gain is not None]
        for gain in gains:
            init.ones_(gain)
        if simulate_gains and gains and not any(is_loaded(gain) for gain in gains):
            value = _typical_score(self.simulate()) ** (-1 / len(gains))
            for gain in gains:
                init.constant_(gain, value)

    @torch.no_grad()
    def simulate(self, seed: int = 0) -> Tensor:
        """Selected scores [tokens, H, K, 1] of standard normal inputs, with the present weights.

        Batch norm takes the inputs' own statistics, and keeps its running ones.
        """
        inputs_ND = _simulated_inputs(self.query_proj.weight, seed)
        return self._search(self.query_proj(inputs_ND), simulated=True).scores_NHKC

    def forward(self, x_ND: Tensor) -> Retrieved:
        """Select top_k slots per token and head for x [N, D]; scores in fp32 (fp64 for an fp64 model)."""
        return self._search(apply_linear(self.query_proj, x_ND), simulated=False)

    @without_autocast
    def _search(self, query_NQ: Tensor, simulated: bool) -> Retrieved:
        num_heads, _, side, key_dim = self.keys.shape
        query_NQ = query_NQ.to(accumulation_dtype(query_NQ))
        if self.query_shift is not None:
            query_NQ = self._batch_normalize(query_NQ, simulated)
        query_NH2d = query_NQ.view(-1, num_heads, 2, key_dim)
        if self.query_norm is not None and self.query_shift is None:
            query_NH2d = rms_normalize(query_NH2d, self.query_norm, dim=-1)
        keys_H2Sd = self.keys if self.key_norm is None else rms_normalize(self.keys, self.key_norm, dim=3)
        scores_NH2S = torch.einsum("nhcd,hcsd->nhcs", query_NH2d, keys_H2Sd.to(query_NH2d.dtype))
        row_NHS1, col_NHS1 = scores_NH2S[:, :, 0, :, None], scores_NH2S[:, :, 1, :, None]
        # Additive scores: any m ≥ min(k, S) is exact.
        scores, slots = product_topk(row_NHS1, col_NHS1, top_k=self.top_k, coarse_top_k=min(self.top_k, side))
        return Retrieved(scores, slots, query_NH2d, keys_H2Sd)

    def _batch_normalize(self, query_NQ: Tensor, simulated: bool) -> Tensor:
        gain, shift, mean, variance = self.query_norm, self.query_shift, self.query_mean, self.query_variance
        assert gain is not None
        assert shift is not None
        assert mean is not None
        assert variance is not None
        # Fewer than two tokens have no statistics.
        if (self.training or simulated) and query_NQ.shape[0] > 1:
            batch_variance, batch_mean = torch.var_mean(query_NQ, dim=0, correction=0)
            if not simulated:
                for running, batch in ((mean, batch_mean), (variance, batch_variance)):
                    running.lerp_(batch.detach().to(running.dtype), _BATCH_MOMENTUM)
            mean, variance = batch_mean, batch_variance
        scale = torch.rsqrt(variance.to(query_NQ.dtype) + NORM_EPSILON) * gain.to(query_NQ.dtype)
        return (query_NQ - mean.to(query_NQ.dtype)) * scale + shift.to(query_NQ.dtype)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        heads, _, side, key_dim = self.keys.shape
        return f"heads={heads}, keys={side}, key_dim={key_dim}, top_k={self.top_k}"


class TuckerRetrieval(_Retrieval):
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
            norm_gain = _typical_score(self.simulate(gains=1.0)) ** -0.25
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
        return self._retrieve(_simulated_inputs(weight, seed), query_gain, key_gain).scores_NHKC

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
        query_N2Qd = rms_normalize(query_N2Qd, query_gain, dim=-1)
        keys, contracted = self._keys_to_search(key_gain, query_N2Qd.dtype)
        cores = self.cores.to(query_N2Qd.dtype)
        directions = (self.row_direction.to(query_N2Qd.dtype), self.col_direction.to(query_N2Qd.dtype))
        sizes = {"top_k": self.top_k, "coarse_top_k": self.coarse_top_k, "search": self.search}
        scores, slots = key_search(query_N2Qd, keys, cores, *directions, contracted_2HSe=contracted, **sizes)
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
        return rms_normalize(self.keys.transpose(3, 4), gain, dim=-1).to(dtype).contiguous()

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
