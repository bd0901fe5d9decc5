"""What UltraMem and UltraMemV2 share: Tucker retrieval, implicit value expansion, the shuffle, their losses."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ultramem.errors import ConfigError
from ultramem.layers.memory import AddOutput, MemoryConfig, MemoryLayer
from ultramem.layers.plain import is_plain
from ultramem.layers.retrieval import NORM_EPSILON, Retrieved, TuckerRetrieval, is_loaded
from ultramem.layers.table import MemoryPool
from ultramem.ops import Search, check_search, decode, product_topk_flops, search_recall

# Tokens of one forward pass on which the search is compared with the exact one.
_RECALL_TOKENS = 64


@strict
@dataclass
class TuckerMemoryConfig(MemoryConfig):
    """Settings of memories with Tucker retrieval, beside those of `MemoryConfig`.

    Attributes:
        value_dim: V.
        coarse_top_k: m, keys that each side keeps before the grid is scored; null for top_k, at most the keys of a
            side.
        num_cores: C; each core weighs its own equal slice of the values.
        rank: r of the Tucker decomposition.
        key_expansion: e; the key grid has side e·w and addresses E = e² virtual blocks over the window's rows.
        search: ``two_stage`` (published), ``signed`` or ``exact``.
        key_balance_weight: weight of the key-balance loss; 0 is off.
        tucker_penalty_weight: α of the Tucker penalty; 0 is off.
        tucker_penalty_margin: τ of the Tucker penalty.
        init: ``paper`` or ``released``.
        shuffle_seed: seed of the permutation from grid to rows.
    """

    value_dim: int = 64
    coarse_top_k: int | None = None
    num_cores: int = 2
    rank: int = 2
    key_expansion: int = 1
    search: Search = "two_stage"
    key_balance_weight: float | int = 0.0
    tucker_penalty_weight: float | int = 0.0
    tucker_penalty_margin: float | int = 0.15
    init: Literal["paper", "released"] = "paper"
    shuffle_seed: int = 0

    _positive: ClassVar[tuple[str, ...]] = (*MemoryConfig._positive, "value_dim", "num_cores", "rank", "key_expansion")
    _not_negative: ClassVar[tuple[str, ...]] = (
        "key_balance_weight",
        "tucker_penalty_weight",
        "tucker_penalty_margin",
    )

    def __post_init__(self) -> None:
        """Check what does not depend on the number of layers. Raises ConfigError naming the field."""
        super().__post_init__()
        if self.value_dim % self.num_cores:
            raise ConfigError(
                f"memory.value_dim ({self.value_dim}) must be a multiple of memory.num_cores ({self.num_cores}): each "
                "core weighs an equal slice of the values."
            )

    def check_sizes(self, num_memories: int) -> None:
        """Raise ConfigError if the sizes do not fit together with L memories."""
        super().check_sizes(num_memories)
        try:
            check_search(self.search, self.side(num_memories), self.top_k, self.resolved_coarse_top_k(num_memories))
        except ValueError as error:
            raise ConfigError(f"memory: {error}") from None

    @property
    def num_blocks(self) -> int:
        """E, virtual blocks over the window's rows."""
        return self.key_expansion**2

    @property
    @abstractmethod
    def pooled_dim(self) -> int:
        """Inputs of the output projection: V where virtual blocks are summed, E·V where they are kept apart."""

    @property
    def num_queries(self) -> int:
        """Queries per side: one for all ranks, unless a layer has one for each."""
        return 1

    def side(self, num_memories: int) -> int:
        """S = e·w, keys per side of a layer, with L memories."""
        return self.key_expansion * self.window_side(num_memories)

    def resolved_coarse_top_k(self, num_memories: int) -> int:
        """m, with its default filled in."""
        return min(self.top_k, self.side(num_memories)) if self.coarse_top_k is None else self.coarse_top_k

    def row_widths(self, hidden_size: int) -> tuple[int, int]:
        """(V, 0)."""
        return self.value_dim, 0

    def matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights of the query and output projections, and the keys."""
        keys = self.num_heads * 2 * self.side(num_memories) * self.key_dim * self.rank
        return hidden_size * (2 * self.key_dim * self.num_queries + self.pooled_dim) + keys

    def other_weights(self, hidden_size: int) -> int:
        """Gains of both norms, and the cores."""
        return 2 * self.key_dim + self.num_cores * self.num_heads * self.rank**2

    def search_flops(self, num_memories: int) -> int:
        """FLOPs of one layer's search per token."""
        side, coarse = self.side(num_memories), self.resolved_coarse_top_k(num_memories)
        return product_topk_flops(side, self.rank, self.num_heads, self.num_cores, self.top_k, coarse, self.search)


class TuckerMemory(MemoryLayer):
    """A memory whose slots have Tucker scores, which weigh the values without a softmax (arXiv 2411.12364, §3)."""

    config: TuckerMemoryConfig
    retrieval: TuckerRetrieval
    out_proj: nn.Linear
    pre_proj: nn.Linear | None
    permutation: Tensor

    def __init__(
        self, hidden_size: int, config: TuckerMemoryConfig, num_memories: int = 1, memory_index: int = 0
    ) -> None:
        super().__init__(hidden_size, config, num_memories, memory_index)
        self.retrieval = TuckerRetrieval(
            hidden_size,
            num_keys=config.side(num_memories),
            key_dim=config.key_dim,
            num_heads=config.num_heads,
            num_cores=config.num_cores,
            rank=config.rank,
            top_k=config.top_k,
            coarse_top_k=config.resolved_coarse_top_k(num_memories),
            search=config.search,
            num_queries=config.num_queries,
        )
        self.out_proj = nn.Linear(config.pooled_dim, hidden_size, bias=False)
        self.pre_proj = None
        # Spreads the neighbours of the grid over the pool's rows; int32 holds every grid that fits in memory.
        self.register_buffer("permutation", torch.empty(self.num_slots, dtype=torch.int32))

    @property
    def num_slots(self) -> int:
        """Virtual slots that the layer addresses: E for each row of its window."""
        return self.config.num_blocks * self.window.size

    @torch.no_grad()
    def reset_retrieval(self, query_std: float, norm_gain: float | None) -> None:
        """Draw permutation and retrieval; ``norm_gain`` None simulates (see `TuckerRetrieval.reset_parameters`)."""
        if not is_loaded(self.permutation):
            generator = torch.Generator().manual_seed(self.config.shuffle_seed * 1_000_003 + self.memory_index)
            self.permutation.copy_(torch.randperm(self.num_slots, generator=generator, device="cpu"))
        self.retrieval.reset_parameters(query_std, norm_gain)

    def score_variance(self) -> float:
        """σ_s², variance of the selected scores of a simulated retrieval."""
        return float(self.retrieval.simulate().var())

    def refresh_retrieval(self) -> None:
        """Recompute the coarse directions from the cores."""
        self.retrieval.refresh()

    def output_kernel(self, pool: MemoryPool) -> AddOutput | None:
        """The kernel, where all parts of the layer are what they were built as."""
        retrieval, pre_proj, out_proj = self.retrieval, self.pre_proj, self.out_proj
        linears = [linear for linear in (retrieval.query_proj, out_proj, pre_proj) if linear is not None]
        plain = [is_plain(linear, nn.Linear) for linear in linears]
        plain += [is_plain(module, type(module)) for module in (self, retrieval, pool)]
        weights = [retrieval.query_norm, *(linear.weight for linear in linears)] if all(plain) else []
        if (
            not weights
            or self.training
            or retrieval.search == "exact"
            or len({weight.dtype for weight in weights}) > 1
            or not decode.runs_on_kernels(*weights, pool.values)
        ):
            return None
        values_RV, pre_values_RU, activation = pool.values, pool.pre_values, self.pre_activation
        num_blocks = self.config.pooled_dim // self.config.value_dim

        def add(residual_ND: Tensor, x_ND: Tensor) -> None:
            keys_H2Srd, contracted_2HSe = retrieval.searched_keys()
            decode.add_tucker_memory(
                residual_ND,
                x_ND,
                query_OD=weights[1],
                query_gain_d=weights[0],
                epsilon=NORM_EPSILON,
                keys_H2Srd=keys_H2Srd,
                contracted_2HSe=contracted_2HSe,
                cores_CHrr=retrieval.cores,
                top_k=retrieval.top_k,
                coarse_top_k=retrieval.coarse_top_k,
                signed=retrieval.search == "signed",
                permutation=self.permutation,
                window_offset=self.window.offset,
                window_size=self.window.size,
                values_RV=values_RV,
                pre_values_RU=pre_values_RU,
                pre_UD=None if pre_proj is None else weights[3],
                activation=activation,
                num_blocks=num_blocks,
                out_DV=weights[2],
            )

        return add

    def virtual_slots(self, slots_NK: Tensor) -> Tensor:
        """The permutation of the grid's slots."""
        return self.permutation.index_select(0, slots_NK.flatten()).view(slots_NK.shape).long()

    def pool_rows(
        self, pool: MemoryPool, virtual_NK: Tensor, rows_NK: Tensor, weights_NKC: Tensor, pre_inputs_NU: Tensor | None
    ) -> Tensor:
        """Sums per virtual block, side by side or added."""
        if self.config.pooled_dim == self.config.value_dim:
            # Σ_b P_b: summing the blocks is pooling into one.
            return pool.read(rows_NK, weights_NKC, pre_inputs_NU, self.pre_activation)
        block_NK = virtual_NK // self.window.size
        return pool.read(rows_NK, weights_NKC, pre_inputs_NU, self.pre_activation, block_NK, self.config.num_blocks)

    def losses(self, retrieved: Retrieved) -> dict[str, Tensor]:
        """The Tucker penalty and the key-balance loss, where they are switched on."""
        losses: dict[str, Tensor] = {}
        if self.config.tucker_penalty_weight:
            penalty = self.retrieval.tucker_penalty(self.config.tucker_penalty_margin)
            losses["tucker_penalty"] = self.config.tucker_penalty_weight * penalty
        if self.config.key_balance_weight:
            losses["key_balance"] = self.config.key_balance_weight * self.retrieval.key_balance(retrieved)
        return losses

    @torch.no_grad()
    def further_statistics(self, retrieved: Retrieved, with_recall: bool) -> dict[str, Tensor]:
        """``singular_values`` [H, r] of the summed cores; ``recall_M`` of an inexact search on M evenly spread tokens.

        M = min(N, 64): the exact search scores the whole grid.
        """
        statistics = {"singular_values": self.retrieval.singular_values()}
        if with_recall and self.config.search != "exact":
            sample_M = _spread_tokens(len(retrieved.slots_NHK), retrieved.slots_NHK.device)
            row_MHSr, col_MHSr = self.retrieval.fine_scores(retrieved, sample_M)
            cores = self.retrieval.cores.to(row_MHSr.dtype)
            statistics["recall_M"] = search_recall(row_MHSr, col_MHSr, cores, retrieved.slots_NHK[sample_M])
        return statistics


def _spread_tokens(num_tokens: int, device: torch.device) -> Tensor:
    """Up to 64 token numbers from the first to the last, int64."""
    num_sampled = min(num_tokens, _RECALL_TOKENS)
    # No stride that may divide the sequence length, which would sample the same position of every sequence.
    return torch.arange(num_sampled, device=device) * (num_tokens - 1) // max(1, num_sampled - 1)
