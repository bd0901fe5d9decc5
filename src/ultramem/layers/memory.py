"""What all memory layers share: settings of placement and tables, the data flow from tokens to pooled rows, costs."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ultramem.errors import ConfigError
from ultramem.layers.additive_retrieval import AdditiveRetrieval
from ultramem.layers.plain import apply_linear
from ultramem.layers.retrieval import Retrieved, TuckerRetrieval
from ultramem.layers.table import MemoryPool, RingWindow, window_side
from ultramem.ops import Activation

# A share written as 0.333 for 1/3 is a little less than a layer's own; the published formula floors it to a window.
_SHARE_ROUNDING = 2e-3


# Which statistics a memory returns: none, the cheap ones, or also the recall of its search, which scores whole grids.
Statistics = bool | Literal["recall"]


# Adds an output to hidden states [N, D] fp32, in place; the second argument is what it is made from.
AddOutput = Callable[[Tensor, Tensor], None]


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


@strict
@dataclass
class MemoryConfig:
    """Settings that every memory has.

    Attributes:
        placement: where memories stand: ``"every"``, a list of blocks, or spans ``"a:b/c:d"``.
        position: ``parallel`` to the FFN of the block where a memory starts, or ``replace`` it.
        tables: ``private`` rows for each layer, one table ``shared`` by all, or windows of a ``ring`` of rows.
        share_ratio: with ``ring``, the share of the rows that each layer sees.
        num_keys: n, keys per side of one layer's own share: n² rows (``shared``: of the one table).
        key_dim: kd, width of a key and of each half of the query.
        top_k: slots pooled per token and head.
        num_heads: H.
    """

    type: str = ""
    placement: Any = "every"
    position: Literal["parallel", "replace"] = "parallel"
    tables: Literal["private", "shared", "ring"] = "private"
    share_ratio: float | int | None = None
    num_keys: int = 64
    key_dim: int = 64
    top_k: int = 16
    num_heads: int = 1

    # Sizes that must be at least one, and settings that must not be negative; layers extend both.
    _positive: ClassVar[tuple[str, ...]] = ("num_keys", "key_dim", "top_k", "num_heads")
    _not_negative: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check what does not depend on the number of layers. Raises ConfigError naming the field."""
        for name in self._positive:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"memory.{name} must be at least 1; got {value}.")
        for name in self._not_negative:
            if not getattr(self, name) >= 0:
                raise ConfigError(f"memory.{name} must not be negative; got {getattr(self, name)}.")
        if (self.share_ratio is not None) != (self.tables == "ring"):
            raise ConfigError(
                f"memory.share_ratio belongs to memory.tables: ring, which needs it; got share_ratio "
                f"{self.share_ratio} with tables {self.tables!r}."
            )
        if self.share_ratio is not None and not 0 < self.share_ratio <= 1:
            raise ConfigError(f"memory.share_ratio must lie in (0, 1]; got {self.share_ratio}.")

    def check_sizes(self, num_memories: int) -> None:
        """Raise ConfigError if the sizes do not fit together with L memories."""
        too_small = self.share_ratio is not None and self.share_ratio * num_memories < 1 - _SHARE_ROUNDING
        if too_small or self.window_side(num_memories) < 1:
            raise ConfigError(
                f"memory.share_ratio {self.share_ratio} gives a layer less than its own share of the pool; with "
                f"{num_memories} memories it must be at least {1 / num_memories:.4g}, or tables: private for exactly "
                "that share."
            )
        if self.top_k > self.side(num_memories) ** 2:
            raise ConfigError(
                f"memory.top_k must lie between 1 and the {self.side(num_memories) ** 2} slots of a layer; "
                f"got {self.top_k}."
            )

    @property
    def num_past_tokens(self) -> int:
        """Tokens before the present one that a query depends on."""
        return 0

    @property
    def num_selected(self) -> int:
        """k·H, rows that one token reads in one layer."""
        return self.top_k * self.num_heads

    def window_side(self, num_memories: int) -> int:
        """Side w of a layer's window of rows, with L memories."""
        return window_side(self.num_keys, num_memories, self.share_ratio)

    def side(self, num_memories: int) -> int:
        """S, keys per side of a layer, with L memories."""
        return self.window_side(num_memories)

    def num_rows(self, num_memories: int) -> int:
        """R, rows of the pool of L memories."""
        return (1 if self.tables == "shared" else num_memories) * self.num_keys**2

    def window(self, num_memories: int, memory_index: int) -> RingWindow:
        """The rows that memory ℓ of L sees."""
        offset = 0 if self.tables == "shared" else memory_index * self.num_keys**2
        return RingWindow(offset, self.window_side(num_memories) ** 2, self.num_rows(num_memories))

    @abstractmethod
    def row_widths(self, hidden_size: int) -> tuple[int, int]:
        """(V, U): widths of a row's value and pre-value; U = 0 without pre-values."""

    @abstractmethod
    def matmul_weights(self, hidden_size: int, num_memories: int) -> int:
        """Weights of one layer that enter one multiply-add per token: the linear layers and the keys."""

    @abstractmethod
    def other_weights(self, hidden_size: int) -> int:
        """Further dense weights of one layer: biases, norms, cores."""

    @abstractmethod
    def search_flops(self, num_memories: int) -> int:
        """FLOPs of one layer's search per token."""

    @abstractmethod
    def table_std(
        self, hidden_size: int, num_blocks: int = 1, ffn_ratio: float = 1.0, score_variance: float = 0.0
    ) -> float:
        """Standard deviation of the rows at initialisation.

        Args:
            hidden_size: D.
            num_blocks: L, blocks of the decoder.
            ffn_ratio: κ, the FFN's inner width over D.
            score_variance: σ_s², variance of the selected scores of a simulated retrieval.
        """

    def dense_parameters(self, hidden_size: int, num_memories: int) -> int:
        """Weights of one layer that every token reads: projections, keys, norms, cores."""
        return self.matmul_weights(hidden_size, num_memories) + self.other_weights(hidden_size)

    def table_parameters(self, hidden_size: int, num_memories: int) -> int:
        """Elements of the pool that L layers read."""
        return self.num_rows(num_memories) * sum(self.row_widths(hidden_size))

    def table_elements_per_token(self, hidden_size: int) -> int:
        """Table elements that one token reads in one layer: k·H·(V+U)."""
        return self.num_selected * sum(self.row_widths(hidden_size))

    def table_elements_per_step(self, batch_size: int, hidden_size: int, num_memories: int) -> float:
        """Distinct table elements that one layer reads for B tokens, expected under uniform access."""
        rows = self.window_side(num_memories) ** 2
        distinct = rows * (1 - (1 - 1 / rows) ** (batch_size * self.num_selected))
        return distinct * sum(self.row_widths(hidden_size))

    def flops_per_token(self, hidden_size: int, num_memories: int) -> int:
        """FLOPs of one layer's forward, a multiply-add counted as two: projections, scores, search, lookups."""
        products = self.matmul_weights(hidden_size, num_memories) + self.table_elements_per_token(hidden_size)
        return 2 * products + self.search_flops(num_memories)


class MemoryLayer(nn.Module):
    """A memory layer; its rows belong to a `MemoryPool` that is passed to ``forward``.

    y = project( Σ_k w_c(k) · a(k) · value[row_k] ): the retrieval selects slots k with weights w per core; a(k), the
    activation of a row's pre-value, is one without pre-values. A layer fills in the steps in which it differs.

    Args:
        hidden_size: D.
        config: the layer's settings.
        num_memories: L, memory layers that read the pool.
        memory_index: ℓ in [0, L), which decides the layer's window of the pool.
    """

    parameter_roles: ClassVar[dict[str, str]] = {}
    retrieval: TuckerRetrieval | AdditiveRetrieval
    out_proj: nn.Linear | None

    def __init__(self, hidden_size: int, config: MemoryConfig, num_memories: int = 1, memory_index: int = 0) -> None:
        super().__init__()
        config.check_sizes(num_memories)
        self.config: Any = config
        self.hidden_size, self.memory_index = hidden_size, memory_index
        self.window = config.window(num_memories, memory_index)

    @classmethod
    def make_pool(
        cls, hidden_size: int, config: MemoryConfig, num_memories: int = 1, *, draw: bool = True
    ) -> MemoryPool:
        """The pool that ``num_memories`` layers of this config read.

        Args:
            hidden_size: D.
            config: the layers' settings.
            num_memories: L.
            draw: draw the rows as for a decoder of L blocks; False leaves that to an owner that knows its decoder.
        """
        std = config.table_std(hidden_size, num_blocks=num_memories) if draw else None
        return MemoryPool(config.num_rows(num_memories), *config.row_widths(hidden_size), std)

    @property
    def num_slots(self) -> int:
        """Virtual slots that the layer addresses."""
        return self.window.size

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise the layer's own tensors by the config's scheme; the pool's owner draws the rows."""

    def score_variance(self) -> float:
        """σ_s², variance of the selected scores of a simulated retrieval, where the rows' scale depends on it."""
        return 0.0

    def refresh_retrieval(self) -> None:
        """Recompute what the search derives from the weights; call after each optimizer step."""

    @torch.no_grad()
    def zero_output(self, pool: MemoryPool) -> None:
        """Make the output exactly zero for every input while gradients can still start: for adding to a trained model.

        Args:
            pool: the rows; without an output projection it is their values that become zero.
        """
        target = self.out_proj if self.out_proj is not None else pool
        for name, parameter in target.named_parameters():
            if name != "pre_values":
                parameter.zero_()

    def forward(
        self, x: Tensor, pool: MemoryPool, past: Tensor | None = None, *, return_statistics: Statistics = False
    ) -> MemoryOutput:
        """Look up and pool the slots that each token selects.

        Args:
            x: normed hidden states [..., D].
            pool: the rows.
            past: for a layer whose queries look back, up to ``config.num_past_tokens`` inputs [..., P, D] right before
                x; zeros stand for what is missing.
            return_statistics: also return ``slots_NK`` (virtual slots, int64), ``scores_NK`` (mean over cores),
                ``output_std`` and what the layer adds; with ``"recall"`` that of the search too, where it is inexact.

        Returns:
            The output, with losses and statistics as values.
        """
        x_ND = x.reshape(-1, self.hidden_size)
        retrieved = self.retrieval(self.query_input(x, past).reshape(-1, self.hidden_size))
        scores_NKC = retrieved.scores_NHKC.flatten(1, 2)
        virtual_NK = self.virtual_slots(retrieved.slots_NHK.flatten(1))
        rows_NK = self.physical_rows(virtual_NK)
        weights_NKC = self.slot_weights(retrieved.scores_NHKC).flatten(1, 2)
        pre_inputs_NU = None if pool.pre_values is None else self.pre_input(x_ND)
        pooled = self.pool_rows(pool, virtual_NK, rows_NK, weights_NKC, pre_inputs_NU)
        y_ND = self.project(x_ND, pooled)
        statistics = {}
        if return_statistics:
            statistics = self._statistics(virtual_NK, scores_NKC, y_ND)
            statistics |= self.further_statistics(retrieved, with_recall=return_statistics == "recall")
        return MemoryOutput(y_ND.view(*x.shape[:-1], self.hidden_size), self.losses(retrieved), statistics)

    def add_output(self, residual_ND: Tensor, x_ND: Tensor, pool: MemoryPool) -> None:
        """Add the output to the hidden states of a decode step, in place: without losses, statistics or gradients.

        Args:
            residual_ND: what is added to, fp32.
            x_ND: normed hidden states, fp32.
            pool: the rows.
        """
        kernel = self.output_kernel(pool)
        if kernel is None:
            residual_ND += self(x_ND, pool).output
        else:
            kernel(residual_ND, x_ND)

    def output_kernel(self, pool: MemoryPool) -> AddOutput | None:
        """What does the work of `add_output` in one kernel; None where none can stand in for this layer as it is.

        Asking takes as long as reading many rows. The answer holds for as long as gradients, autocast and the backend
        are what they are, and all modules of layer and pool keep their classes, modes, hooks and parameters, and these
        their dtype, device and layout; values may change.
        """
        return None

    def query_input(self, x: Tensor, past: Tensor | None) -> Tensor:
        """What the queries are made from: [..., D]."""
        return x

    def virtual_slots(self, slots_NK: Tensor) -> Tensor:
        """Virtual slots [N, K] behind the grid's."""
        return slots_NK

    def physical_rows(self, virtual_NK: Tensor) -> Tensor:
        """Rows of the pool [N, K] int64 behind virtual slots."""
        return self.window.physical_rows(virtual_NK, self.num_slots // self.window.size)

    def slot_weights(self, scores_NHKC: Tensor) -> Tensor:
        """Weights of the selected slots: the scores as they are, or normalised."""
        return scores_NHKC

    def pre_input(self, x_ND: Tensor) -> Tensor:
        """What is multiplied with the pre-values: [N, U]."""
        return x_ND

    @property
    def pre_activation(self) -> Activation | None:
        """The activation of the pre-value products."""
        return None

    def pool_rows(
        self, pool: MemoryPool, virtual_NK: Tensor, rows_NK: Tensor, weights_NKC: Tensor, pre_inputs_NU: Tensor | None
    ) -> Tensor:
        """Weighted sum of the selected values: [N, V], or [N, E·V] where blocks are kept apart."""
        return pool.read(rows_NK, weights_NKC, pre_inputs_NU, self.pre_activation)

    def project(self, x_ND: Tensor, pooled: Tensor) -> Tensor:
        """From the pooled values to the output [N, D]."""
        return pooled if self.out_proj is None else apply_linear(self.out_proj, pooled.to(x_ND.dtype))

    def losses(self, retrieved: Retrieved) -> dict[str, Tensor]:
        """Weighted auxiliary losses."""
        return {}

    def further_statistics(self, retrieved: Retrieved, with_recall: bool) -> dict[str, Tensor]:
        """Measurements beside those that every layer makes."""
        return {}

    @torch.no_grad()
    def _statistics(self, virtual_NK: Tensor, scores_NKC: Tensor, y_ND: Tensor) -> dict[str, Tensor]:
        return {
            "slots_NK": virtual_NK,
            "scores_NK": scores_NKC.detach().mean(-1),
            "output_std": y_ND.detach().float().std(),
        }

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        return f"window={self.window.offset}+{self.window.size} of {self.window.num_rows} rows, slots={self.num_slots}"


@torch.no_grad()
def draw_pool(pool: MemoryPool, memories: list[MemoryLayer], num_blocks: int, ffn_ratio: float) -> None:
    """Draw a pool's rows as the config's scheme asks for in a decoder.

    Args:
        pool: the rows; those that came from a checkpoint are left alone.
        memories: the layers that read them, initialised.
        num_blocks: L, blocks of the decoder.
        ffn_ratio: κ, the FFN's inner width over D.
    """
    variance = math.fsum(memory.score_variance() for memory in memories) / len(memories)
    layer = memories[0]
    pool.reset_parameters(layer.config.table_std(layer.hidden_size, num_blocks, ffn_ratio, variance))


def add_losses(total: dict[str, Tensor], losses: Mapping[str, Tensor]) -> None:
    """Add auxiliary losses to those of other layers, by name and in place."""
    for name, loss in losses.items():
        total[name] = total[name] + loss if name in total else loss
