"""Query-key retrieval with additive scores: PKM, Memory+ and PEER."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.layers.plain import apply_linear
from ultramem.layers.retrieval import (
    NORM_EPSILON,
    Retrieval,
    Retrieved,
    is_loaded,
    simulated_inputs,
    typical_score,
)
from ultramem.ops import product_topk, rms_norm
from ultramem.ops.precision import accumulation_dtype, without_autocast

# Weight of a batch in the running statistics of batch-normalised queries.
_BATCH_MOMENTUM = 0.1


def _runs_again() -> bool:
    """Whether this is the forward pass that gradient checkpointing repeats inside backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class AdditiveRetrieval(Retrieval):
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
            value = typical_score(self.simulate()) ** (-1 / len(gains))
            for gain in gains:
                init.constant_(gain, value)

    @torch.no_grad()
    def simulate(self, seed: int = 0) -> Tensor:
        """Selected scores [tokens, H, K, 1] of standard normal inputs, with the present weights.

        Batch norm takes the inputs' own statistics, and keeps its running ones.
        """
        inputs_ND = simulated_inputs(self.query_proj.weight, seed)
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
            query_NH2d = rms_norm(query_NH2d, self.query_norm, NORM_EPSILON)
        keys_H2Sd = self.keys if self.key_norm is None else rms_norm(self.keys, self.key_norm, NORM_EPSILON)
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
            if not simulated and not _runs_again():
                for running, batch in ((mean, batch_mean), (variance, batch_variance)):
                    running.lerp_(batch.detach().to(running.dtype), _BATCH_MOMENTUM)
            mean, variance = batch_mean, batch_variance
        scale = torch.rsqrt(variance.to(query_NQ.dtype) + NORM_EPSILON) * gain.to(query_NQ.dtype)
        return (query_NQ - mean.to(query_NQ.dtype)) * scale + shift.to(query_NQ.dtype)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        heads, _, side, key_dim = self.keys.shape
        return f"heads={heads}, keys={side}, key_dim={key_dim}, top_k={self.top_k}"
