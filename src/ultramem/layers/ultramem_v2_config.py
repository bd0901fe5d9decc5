"""The settings of an UltraMemV2 memory and what they cost, in plain Python."""

from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from ultramem.errors import ConfigError
from ultramem.layers.table import window_side
from ultramem.ops import Search, check_search, product_topk_macs

# A share written as 0.333 for 1/3 is a little less than a layer's own; the published formula floors it to a window.
_SHARE_ROUNDING = 2e-3


@strict
@dataclass
class UltraMemV2Config:
    """Settings of the UltraMemV2 memories of a model (arXiv 2508.18756; exact definitions in
    docs/ultramem_v2.md).

    Attributes:
        placement: where memories stand: ``"every"``, a list of blocks, or spans ``"a:b/c:d"``.
        num_keys: n, keys per side of one layer's own share; the pool holds L·n² rows.
        key_dim: kd, width of a key and of each half of the query.
        value_dim: V.
        pre_value_dim: U; 0 switches pre-values off.
        top_k: slots pooled per token and head.
        coarse_top_k: keys that each side keeps before the grid is scored; null for top_k, at most the keys of a side.
        num_heads: H.
        num_cores: h; each core weighs its own equal slice of the values.
        rank: r of the Tucker decomposition.
        key_expansion: e; the key grid has side e·w and addresses e² virtual blocks over the window's rows.
        projection: ``sum`` adds the virtual blocks before the output projection, ``project`` concatenates them.
        share_ratio: share of the pool that each layer sees as a ring window; null for 1/L, private windows.
        query_per_rank: a query of its own for every rank.
        pre_value_activation: null (linear) or ``gelu``.
        search: ``two_stage`` (published), ``signed`` or ``exact``.
        key_balance_weight: weight of the key-balance loss; 0 is off.
        tucker_penalty_weight: α of the Tucker penalty; 0 is off (UltraMem used 0.001).
        tucker_penalty_margin: τ of the Tucker penalty.
        output_dropout: dropout rate of the layer's output.
        init: ``paper`` or ``released``.
        shuffle_seed: seed of the permutation from grid to rows.
    """

    type: Literal["ultramem_v2"] = "ultramem_v2"
    placement: Any = "every"
    num_keys: int = 64
    key_dim: int = 64
    value_dim: int = 64
    pre_value_dim: int = 64
    top_k: int = 16
    coarse_top_k: int | None = None
    num_heads: int = 1
    num_cores: int = 2
    rank: int = 2
    key_expansion: int = 1
    projection: Literal["sum", "project"] = "sum"
    share_ratio: float | int | None = None
    query_per_rank: bool = False
    pre_value_activation: Literal["gelu"] | None = None
    search: Search = "two_stage"
    key_balance_weight: float | int = 0.0
    tucker_penalty_weight: float | int = 0.0
    tucker_penalty_margin: float | int = 0.15
    output_dropout: float | int = 0.0
    init: Literal["paper", "released"] = "paper"
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        """Check what does not depend on the number of layers. Raises ConfigError naming the field."""
        for name in ("num_keys", "key_dim", "value_dim", "top_k", "num_heads", "num_cores", "rank", "key_expansion"):
            if getattr(self, name) < 1:
                raise ConfigError(f"memory.{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("pre_value_dim", "key_balance_weight", "tucker_penalty_weight", "tucker_penalty_margin"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"memory.{name} must not be negative; got {getattr(self, name)}.")
        if self.value_dim % self.num_cores:
            raise ConfigError(
                f"memory.value_dim ({self.value_dim}) must be a multiple of memory.num_cores ({self.num_cores}): each "
                "core weighs an equal slice of the values."
            )
        if not 0 <= self.output_dropout < 1:
            raise ConfigError(f"memory.output_dropout must lie in [0, 1); got {self.output_dropout}.")
        if self.share_ratio is not None and not 0 < self.share_ratio <= 1:
            raise ConfigError(f"memory.share_ratio must lie in (0, 1] or be null; got {self.share_ratio}.")
        if self.pre_value_activation is not None and self.pre_value_dim == 0:
            raise ConfigError("memory.pre_value_activation needs pre-values; memory.pre_value_dim is 0.")

    @property
    def num_selected(self) -> int:
        """k·H, rows that one token reads in one layer."""
        return self.top_k * self.num_heads

    @property
    def pooled_dim(self) -> int:
        """Inputs of the output projection: V, or E·V with ``projection: project``."""
        return self.value_dim * (self.key_expansion**2 if self.projection == "project" else 1)

    def window_side(self, num_memories: int) -> int:
        """Side w of a layer's window of rows, with L memories."""
        return window_side(self.num_keys, num_memories, self.share_ratio)

    def side(self, num_memories: int) -> int:
        """S = e·w, keys per side of a layer, with L memories."""
        return self.key_expansion * self.window_side(num_memories)

    def resolved_coarse_top_k(self, num_memories: int) -> int:
        """m, with its default filled in."""
        return min(self.top_k, self.side(num_memories)) if self.coarse_top_k is None else self.coarse_top_k

    def check_sizes(self, num_memories: int) -> None:
        """Raise ConfigError if the sizes do not fit together with L memories."""
        too_small = self.share_ratio is not None and self.share_ratio * num_memories < 1 - _SHARE_ROUNDING
        if too_small or self.window_side(num_memories) < 1:
            raise ConfigError(
                f"memory.share_ratio {self.share_ratio} gives a layer less than its own share of the pool; with "
                f"{num_memories} memories it must be at least {1 / num_memories:.4g}, or null for exactly that share."
            )
        try:
            check_search(self.search, self.side(num_memories), self.top_k, self.resolved_coarse_top_k(num_memories))
        except ValueError as error:
            raise ConfigError(f"memory: {error}") from None

    def dense_parameters(self, hidden_size: int, num_memories: int) -> int:
        """Weights of one layer that every token reads: projections, keys, norms, cores."""
        norms_and_cores = 2 * self.key_dim + self.num_cores * self.num_heads * self.rank**2
        return self._matmul_weights(hidden_size, num_memories) + norms_and_cores

    def _matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights that enter one multiply-add per token: the linear layers and the keys."""
        queries = 2 * self.key_dim * (self.rank if self.query_per_rank else 1)
        keys = self.num_heads * 2 * self.side(num_memories) * self.key_dim * self.rank
        return hidden_size * (queries + self.pre_value_dim + self.pooled_dim) + keys

    def table_parameters(self, num_memories: int) -> int:
        """Elements of the pool that L layers share."""
        return num_memories * self.num_keys**2 * (self.value_dim + self.pre_value_dim)

    def table_elements_per_token(self) -> int:
        """Table elements that one token reads in one layer: k·H·(V+U)."""
        return self.num_selected * (self.value_dim + self.pre_value_dim)

    def table_elements_per_step(self, batch_size: int, num_memories: int) -> float:
        """Distinct table elements that one layer reads for B tokens, expected under uniform access."""
        rows = self.window_side(num_memories) ** 2
        return rows * (1 - (1 - 1 / rows) ** (batch_size * self.num_selected)) * (self.value_dim + self.pre_value_dim)

    def flops_per_token(self, hidden_size: int, num_memories: int) -> int:
        """Multiply-adds of one layer's forward, counted as two: projections, scores, search, lookups."""
        search = product_topk_macs(
            self.side(num_memories),
            self.rank,
            self.num_heads,
            self.num_cores,
            self.top_k,
            self.resolved_coarse_top_k(num_memories),
            self.search,
        )
        return 2 * (self._matmul_weights(hidden_size, num_memories) + search + self.table_elements_per_token())
