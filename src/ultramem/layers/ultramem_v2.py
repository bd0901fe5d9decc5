"""UltraMemV2: a memory with pre-values in every block, reading rows that all layers share (arXiv 2508.18756)."""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ultramem.layers.retrieval import TuckerRetrieval, is_loaded
from ultramem.layers.table import MemoryPool, RingWindow
from ultramem.layers.ultramem_v2_config import UltraMemV2Config


class MemoryOutput(NamedTuple):
    """What a memory layer returns.

    Attributes:
        output: like the input, [..., D].
        losses: weighted auxiliary losses, scalars by name; empty when none is switched on.
        statistics: measurements by name, detached; empty unless asked for.
    """

    output: Tensor
    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]


class UltraMemV2(nn.Module):
    """One UltraMemV2 memory layer; the rows belong to a `MemoryPool` that is passed to ``forward``.

    y = W_out · pool_b( Σ_k g_c(k) · p_k · value[row_k] ),   p_k = ⟨W_pre x, pre_value[row_k]⟩

    Args:
        hidden_size: D.
        config: the layer's settings.
        num_memories: L, memory layers that share the pool.
        memory_index: ℓ in [0, L), which decides the layer's window of the pool.
    """

    parameter_roles: ClassVar[dict[str, str]] = {}
    permutation: Tensor

    def __init__(
        self, hidden_size: int, config: UltraMemV2Config, num_memories: int = 1, memory_index: int = 0
    ) -> None:
        super().__init__()
        self.config, self.hidden_size, self.memory_index = config, hidden_size, memory_index
        side = config.window_side(num_memories)
        config.check_sizes(num_memories)
        self.window = RingWindow(memory_index * config.num_keys**2, side**2, num_memories * config.num_keys**2)
        self.num_blocks = config.key_expansion**2
        self.num_slots = self.num_blocks * self.window.size
        self.retrieval = TuckerRetrieval(
            hidden_size,
            num_keys=config.key_expansion * side,
            key_dim=config.key_dim,
            num_heads=config.num_heads,
            num_cores=config.num_cores,
            rank=config.rank,
            top_k=config.top_k,
            coarse_top_k=config.resolved_coarse_top_k(num_memories),
            search=config.search,
            query_per_rank=config.query_per_rank,
        )
        self.pre_proj = nn.Linear(hidden_size, config.pre_value_dim, bias=False) if config.pre_value_dim else None
        self.out_proj = nn.Linear(config.pooled_dim, hidden_size, bias=False)
        self.output_dropout = nn.Dropout(config.output_dropout)
        # Spreads the neighbours of the grid over the pool's rows; int32 holds every grid that fits in memory.
        self.register_buffer("permutation", torch.empty(self.num_slots, dtype=torch.int32))
        self.reset_parameters()

    @classmethod
    def make_pool(cls, config: UltraMemV2Config, num_memories: int = 1, std: float | None = 0.02) -> MemoryPool:
        """The pool of L·n² rows that ``num_memories`` layers of this config share; ``std`` as in `MemoryPool`."""
        return MemoryPool(num_memories * config.num_keys**2, config.value_dim, config.pre_value_dim, std)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the layer's own tensors by the config's scheme; see `table_std` for the pool."""
        if self.permutation.is_meta:
            return
        config = self.config
        if config.init == "paper":
            linear_std = math.sqrt(2 / (5 * self.hidden_size))
            query_std, out_std, pre_std, gain = linear_std, linear_std, linear_std, None
        else:
            query_std, out_std = config.key_dim**-0.5, config.pooled_dim**-0.5
            pre_std, gain = self.hidden_size**-0.5, config.key_dim**-0.4
        if not is_loaded(self.permutation):
            generator = torch.Generator().manual_seed(config.shuffle_seed * 1_000_003 + self.memory_index)
            self.permutation.copy_(torch.randperm(self.num_slots, generator=generator, device="cpu"))
        init.normal_(self.out_proj.weight, std=out_std)
        if self.pre_proj is not None:
            init.normal_(self.pre_proj.weight, std=pre_std)
        self.retrieval.reset_parameters(query_std, gain)

    def forward(self, x: Tensor, pool: MemoryPool, *, return_statistics: bool = False) -> MemoryOutput:
        """Look up and pool the slots that each token selects.

        Args:
            x: normed hidden states [..., D].
            pool: the rows, shared by all layers of the model.
            return_statistics: also return ``slots_NK`` (virtual slots, int64), ``scores_NK`` (mean over cores),
                ``output_std`` and the core's ``singular_values`` [H, r].

        Returns:
            The output in the dtype of ``out_proj``'s result, with losses and statistics as values.
        """
        x_ND = x.reshape(-1, self.hidden_size)
        retrieved = self.retrieval(x_ND)
        scores_NKC = retrieved.scores_NHKC.flatten(1, 2)
        virtual_NK = self.permutation[retrieved.slots_NHK.flatten(1)].long()
        rows_NK = self.window.physical_rows(virtual_NK)
        weights_NKC = scores_NKC
        if self.pre_proj is not None:
            pre_NK = pool.dot_pre_values(rows_NK, self._in_table_dtype(self.pre_proj(x_ND), pool))
            if self.config.pre_value_activation == "gelu":
                pre_NK = nn.functional.gelu(pre_NK)
            weights_NKC = scores_NKC * pre_NK[..., None]
        if self.num_blocks == 1 or self.config.projection == "sum":
            # Σ_b P_b: summing the blocks is pooling into one.
            pooled = pool.pool_values(rows_NK, weights_NKC)
        else:
            pooled = pool.pool_values(rows_NK, weights_NKC, virtual_NK // self.window.size, self.num_blocks)
        y_ND = self.output_dropout(self.out_proj(pooled.to(self.out_proj.weight.dtype)))
        losses: dict[str, Tensor] = {}
        if self.config.tucker_penalty_weight:
            penalty = self.retrieval.tucker_penalty(self.config.tucker_penalty_margin)
            losses["tucker_penalty"] = self.config.tucker_penalty_weight * penalty
        if self.config.key_balance_weight:
            losses["key_balance"] = self.config.key_balance_weight * self.retrieval.key_balance(retrieved)
        statistics = self._statistics(virtual_NK, scores_NKC, y_ND) if return_statistics else {}
        return MemoryOutput(y_ND.view(*x.shape[:-1], self.hidden_size), losses, statistics)

    @staticmethod
    def _in_table_dtype(x: Tensor, pool: MemoryPool) -> Tensor:
        # Under autocast the projection is bf16 and the table fp32: the products keep the table's precision.
        return x.to(pool.values.dtype)

    @torch.no_grad()
    def _statistics(self, virtual_NK: Tensor, scores_NKC: Tensor, y_ND: Tensor) -> dict[str, Tensor]:
        return {
            "slots_NK": virtual_NK,
            "scores_NK": scores_NKC.detach().mean(-1),
            "output_std": y_ND.detach().float().std(),
            "singular_values": torch.linalg.svdvals(self.retrieval.cores.float().sum(0)),
        }

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"window={self.window.offset}+{self.window.size} of {self.window.num_rows} rows, slots={self.num_slots}"


def table_std(
    config: UltraMemV2Config, hidden_size: int, ffn_ratio: float, num_blocks: int, score_variance: float
) -> float:
    """Standard deviation of values and pre-values at initialisation (UltraMemV2's appendix).

    ``paper``: chosen so that the memory's output variance is 0.032·κ/L, the FFN's own at initialisation.

    Args:
        config: the layer's settings.
        hidden_size: D.
        ffn_ratio: κ, the FFN's inner width over D.
        num_blocks: L, blocks of the decoder.
        score_variance: σ_s², variance of the selected scores of a simulated retrieval.
    """
    if config.init == "released":
        return 0.02
    selected = config.num_selected * (1 + score_variance)
    if config.pre_value_dim == 0:
        return math.sqrt(0.08 * ffn_ratio * hidden_size / (selected * config.value_dim * num_blocks))
    area = config.pre_value_dim * config.value_dim
    return float((0.2 * ffn_ratio * hidden_size / (selected * area * num_blocks)) ** 0.25)
