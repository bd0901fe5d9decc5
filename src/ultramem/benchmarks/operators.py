"""`ultramem bench op`: the operators that touch tables, and the search, on every way to run them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ultramem.benchmarks.cases import Builders, Case, measure_case
from ultramem.benchmarks.compiling import compiled
from ultramem.benchmarks.measure import Competitor, Tick, huge_page_tensor
from ultramem.benchmarks.targets import FUSED, OURS, PLAIN, REFERENCE, ROWS
from ultramem.ops import (
    RowContribution,
    RowGradients,
    bag,
    bag_reference,
    gather_dot,
    gather_dot_reference,
    product_topk,
    product_topk_reference,
    scatter,
    use_backend,
)
from ultramem.ops.pooled_read import pooled_read

COMPILED = "torch.compile of plain PyTorch"
REFERENCE_ROWS = "reference path, row gradients"
EMBEDDING_BAG = "F.embedding_bag"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# One token takes microseconds: so many are timed at once.
SINGLE_TOKEN_CALLS = 200
MOST_SHUFFLED_ROWS = 2**22

Read = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of indices [N, K], token vectors [N, V] and scores [N, K]."""


@dataclass(frozen=True)
class OperatorSizes:
    """Sizes of the cases; the defaults are those of the project's targets.

    Attributes:
        num_rows: R of the lookups.
        width: V = U.
        top_k: k.
        num_tokens: N.
        scatter_rows: rows of the tables that get dense gradients.
        num_keys: S of the search, whose grid has S² slots; with r = h = 2 and one head.
        growth_rows: the two table sizes that are compared.
        growth_width: V = U of that comparison.
        dtype: one of `DTYPES`, of tables and token vectors; scores and the gradients of tables as rows are fp32.
    """

    num_rows: int = 1_300_000
    width: int = 192
    top_k: int = 32
    num_tokens: int = 2048
    scatter_rows: int = 2**18
    num_keys: int = 512
    growth_rows: tuple[int, int] = (2**20, 2**24)
    growth_width: int = 32
    dtype: str = "fp32"

    def of_both_tables(self, num_rows: int) -> str:
        """What a lookup reads, in words."""
        return (
            f"gather_dot + bag: {self.num_tokens:,} × {self.top_k} of {num_rows:,} rows × ({self.width} + "
            f"{self.width}), {self.dtype}"
        )

    def of_one_table(self, num_rows: int, result: str) -> str:
        """What is read from or added to one table, in words."""
        return f"{self.num_tokens:,} × {self.top_k} of {num_rows:,} rows × {self.width}, {self.dtype}{result}"


def run_operators(
    sizes: OperatorSizes, num_runs: int, use_compile: bool = True, tick: Tick | None = None
) -> list[Case]:
    """Measure all cases.

    Args:
        sizes: of the cases.
        num_runs: runs that count.
        use_compile: measure `torch.compile` too.
        tick: called after each run with what was run.
    """
    at_target = sizes == OperatorSizes()
    measure = partial(measure_case, num_runs=num_runs, tick=tick, at_target_sizes=at_target)
    values, pre_values = _tables(sizes, sizes.num_rows)
    row_bytes = sizes.width * values.element_size()
    cases = []
    for num_tokens, num_calls in ((sizes.num_tokens, 1), (1, SINGLE_TOKEN_CALLS)):
        few = replace(sizes, num_tokens=num_tokens)
        builders = _lookups(_Draws(few, sizes.num_rows, num_calls), values, pre_values, use_compile)
        num_bytes = num_tokens * sizes.top_k * 2 * row_bytes
        name = f"lookup, {num_tokens:,} token{'s' if num_tokens > 1 else ''}"
        cases.append(measure(name, few.of_both_tables(sizes.num_rows), builders, bytes_read=num_bytes))
    builders = _bags(_Draws(sizes, sizes.num_rows), values, use_compile)
    num_bytes = sizes.num_tokens * sizes.top_k * row_bytes
    cases.append(measure("bag", sizes.of_one_table(sizes.num_rows, ""), builders, bytes_read=num_bytes))
    del values, pre_values
    words = sizes.of_both_tables(sizes.scatter_rows)
    cases.append(measure("lookup, forward + backward", words, _lookup_gradients(sizes, use_compile)))
    cases.append(measure("scatter", sizes.of_one_table(sizes.scatter_rows, "; dense result"), _scatters(sizes)))
    cases.append(measure("scatter, rows", sizes.of_one_table(sizes.num_rows, "; touched rows"), _row_sums(sizes)))
    words = f"{sizes.num_tokens:,} tokens, S = {sizes.num_keys}, k = m = {sizes.top_k}, r = h = 2, fp32"
    cases.append(measure("product_topk", words, _searches(sizes, use_compile)))
    width = sizes.growth_width
    words = (
        f"gather_dot + bag: {sizes.num_tokens:,} × {sizes.top_k} rows × ({width} + {width}), {sizes.dtype}, more and "
        "more rows"
    )
    cases.append(measure("growth", words, _growths(sizes)))
    return cases


def _tables(sizes: OperatorSizes, num_rows: int) -> tuple[Tensor, Tensor]:
    """Values and pre-values, normal, in huge pages."""
    shape, dtype = (num_rows, sizes.width), DTYPES[sizes.dtype]
    values, pre_values = (huge_page_tensor(*shape, dtype=dtype).normal_(std=0.1) for _ in range(2))
    return values, pre_values


class _Draws:
    """Fresh inputs for each run: rows that do not repeat, so that what is read is known, and normal vectors."""

    def __init__(self, sizes: OperatorSizes, num_rows: int, num_calls: int = 1) -> None:
        self.num_rows, self.shape, self.num_calls = num_rows, (sizes.num_tokens, sizes.top_k), num_calls
        # A few hundred megabytes of rows would lie in a large cache if every run read the same ones; vectors may stay.
        self.x_NV = torch.randn(sizes.num_tokens, sizes.width, dtype=DTYPES[sizes.dtype])
        self.scores_NK = torch.randn(self.shape)
        self._order, self._next = torch.empty(0, dtype=torch.int64), 0

    def indices(self) -> list[Tensor]:
        """One [N, K] int64 per call: the next rows of a shuffled order, which is made anew when it has been read."""
        num_tokens, top_k = self.shape
        needed = self.num_calls * num_tokens * top_k
        if self._next + needed > len(self._order):
            # Shuffling many millions of numbers takes longer than the run; among so many, repeats are rare.
            distinct = needed <= self.num_rows <= MOST_SHUFFLED_ROWS
            self._order = torch.randperm(self.num_rows) if distinct else torch.randint(self.num_rows, (8 * needed,))
            self._next = 0
        rows = self._order[self._next : self._next + needed]
        self._next += needed
        return list(rows.view(self.num_calls, num_tokens, top_k))

    def competitor(self, read: Read, backend: str = "auto") -> Competitor:
        """Time a function, where no gradient is wanted, on a backend."""

        def prepare() -> Callable[[], object]:
            indices, x, scores = self.indices(), self.x_NV, self.scores_NK

            def timed() -> None:
                with torch.no_grad(), use_backend(backend):
                    for idx_NK in indices:
                        read(idx_NK, x, scores)

            return timed

        prepare()()
        return Competitor(prepare, self.num_calls)

    def training(
        self, read: Read, tables: tuple[Tensor, ...], backend: str, collectors: tuple[RowGradients, ...] = ()
    ) -> Competitor:
        """Time a function and all its gradients; those of the run before are dropped, untimed."""
        x, scores = self.x_NV.clone().requires_grad_(), self.scores_NK.clone().requires_grad_()

        def prepare() -> Callable[[], object]:
            for leaf in (x, scores, *tables):
                leaf.grad = None
            for collector in collectors:
                collector.clear()
            (idx_NK,), gradient = self.indices(), torch.randn_like(x)

            def timed() -> None:
                with use_backend(backend):
                    read(idx_NK, x, scores).backward(gradient)
                    for collector in collectors:
                        collector.coalesce()

            return timed

        prepare()()
        return Competitor(prepare)


def _lookup(
    idx_NK: Tensor,
    x_NV: Tensor,
    scores_NK: Tensor,
    values: Tensor,
    pre_values: Tensor,
    of_values: RowGradients | None = None,
    of_pre_values: RowGradients | None = None,
) -> Tensor:
    weights_NK = scores_NK * gather_dot(idx_NK, x_NV, pre_values, row_gradients=of_pre_values)
    return bag(idx_NK, weights_NK, values, row_gradients=of_values)


def _plain_lookup(idx_NK: Tensor, x_NV: Tensor, scores_NK: Tensor, values: Tensor, pre_values: Tensor) -> Tensor:
    weights_NK1 = scores_NK[..., None] * gather_dot_reference(idx_NK, x_NV, pre_values)
    return bag_reference(idx_NK, weights_NK1, values)


def _with(lookup: Callable[..., Tensor], *tables: Tensor | RowGradients) -> Read:
    return lambda idx_NK, x_NV, scores_NK: lookup(idx_NK, x_NV, scores_NK, *tables)


def _lookups(draws: _Draws, values: Tensor, pre_values: Tensor, use_compile: bool) -> Builders:
    def fused(idx_NK: Tensor, x_NV: Tensor, scores_NK: Tensor) -> Tensor:
        return pooled_read(idx_NK, scores_NK, values, x_NV, pre_values)

    tables = values, pre_values
    builders: dict[str, Callable[[], Competitor]] = {
        OURS: lambda: draws.competitor(_with(_lookup, *tables), "cpu"),
        FUSED: lambda: draws.competitor(fused, "cpu"),
        REFERENCE: lambda: draws.competitor(_with(_lookup, *tables), "reference"),
        PLAIN: lambda: draws.competitor(_with(_plain_lookup, *tables)),
    }
    if use_compile:
        builders[COMPILED] = lambda: draws.competitor(_with(compiled(_plain_lookup), *tables))
    return builders


def _lookup_gradients(sizes: OperatorSizes, use_compile: bool) -> Builders:
    draws, tables = _Draws(sizes, sizes.scatter_rows), _tables(sizes, sizes.scatter_rows)
    for table in tables:
        table.requires_grad_()

    def dense(lookup: Callable[..., Tensor], backend: str = "auto") -> Competitor:
        return draws.training(_with(lookup, *tables), tables, backend)

    def rows(backend: str) -> Competitor:
        collectors = RowGradients(*tables[0].shape), RowGradients(*tables[1].shape)
        return draws.training(_with(_lookup, *tables, *collectors), tables, backend, collectors)

    builders: dict[str, Callable[[], Competitor]] = {
        OURS: lambda: dense(_lookup, "cpu"),
        ROWS: lambda: rows("cpu"),
        REFERENCE: lambda: dense(_lookup, "reference"),
        REFERENCE_ROWS: lambda: rows("reference"),
        PLAIN: lambda: dense(_plain_lookup),
    }
    if use_compile:
        builders[COMPILED] = lambda: dense(compiled(_plain_lookup))
    return builders


def _bags(draws: _Draws, values: Tensor, use_compile: bool) -> Builders:
    def pool(idx_NK: Tensor, _: Tensor, scores_NK: Tensor) -> Tensor:
        return bag(idx_NK, scores_NK, values)

    def plain(pool: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda idx_NK, x_NV, scores_NK: pool(idx_NK, scores_NK[..., None], values)

    def embedding_bag(idx_NK: Tensor, _: Tensor, scores_NK: Tensor) -> Tensor:
        return F.embedding_bag(idx_NK, values, per_sample_weights=scores_NK.to(values.dtype), mode="sum")

    builders: dict[str, Callable[[], Competitor]] = {
        OURS: lambda: draws.competitor(pool, "cpu"),
        EMBEDDING_BAG: lambda: draws.competitor(embedding_bag),
        PLAIN: lambda: draws.competitor(plain(bag_reference)),
    }
    if use_compile:
        builders[COMPILED] = lambda: draws.competitor(plain(compiled(bag_reference)))
    return builders


def _scatters(sizes: OperatorSizes) -> Builders:
    draws = _Draws(sizes, sizes.scatter_rows)

    def ours(idx_NK: Tensor, x_NV: Tensor, scores_NK: Tensor) -> Tensor:
        return scatter(idx_NK, scores_NK, x_NV, sizes.scatter_rows)

    def index_add(idx_NK: Tensor, x_NV: Tensor, scores_NK: Tensor) -> Tensor:
        rows = scores_NK[..., None] * x_NV[:, None]
        return torch.zeros(sizes.scatter_rows, sizes.width).index_add_(0, idx_NK.flatten(), rows.flatten(0, 1))

    return {
        OURS: lambda: draws.competitor(ours, "cpu"),
        REFERENCE: lambda: draws.competitor(ours, "reference"),
        "index_add_": lambda: draws.competitor(index_add),
    }


def _row_sums(sizes: OperatorSizes) -> Builders:
    draws = _Draws(sizes, sizes.num_rows)

    def ours(backend: str, idx_NK: Tensor, x_NV: Tensor, scores_NK: Tensor) -> Tensor:
        collector = RowGradients(sizes.num_rows, sizes.width)
        collector.add(RowContribution(idx_NK, scores_NK[..., None], x_NV, None, 1, backend))
        return collector.coalesce()[1]

    def sparse(idx_NK: Tensor, x_NV: Tensor, scores_NK: Tensor) -> Tensor:
        rows = (scores_NK[..., None] * x_NV[:, None]).flatten(0, 1)
        size = (sizes.num_rows, sizes.width)
        return torch.sparse_coo_tensor(idx_NK.reshape(1, -1), rows, size, check_invariants=False).coalesce()

    return {
        OURS: lambda: draws.competitor(partial(ours, "cpu")),
        REFERENCE: lambda: draws.competitor(partial(ours, "reference")),
        "sparse_coo_tensor.coalesce": lambda: draws.competitor(sparse),
    }


def _searches(sizes: OperatorSizes, use_compile: bool) -> Builders:
    shape = (sizes.num_tokens, 1, sizes.num_keys, 2)
    cores = torch.rand(2, 1, 2, 2)
    u, _, vh = torch.linalg.svd(cores.sum(0))
    directions = (u[..., :, 0].contiguous(), vh[..., 0, :].contiguous())

    def competitor(search: Callable[[Tensor, Tensor], object], backend: str) -> Competitor:
        def prepare() -> Callable[[], object]:
            scores = torch.randn(shape), torch.randn(shape)

            def timed() -> None:
                with torch.no_grad(), use_backend(backend):
                    search(*scores)

            return timed

        prepare()()
        return Competitor(prepare)

    def ours(row_scores: Tensor, col_scores: Tensor) -> object:
        return product_topk(row_scores, col_scores, cores, *directions, top_k=sizes.top_k)

    def plain(search: Callable[..., Any]) -> Callable[[Tensor, Tensor], object]:
        return lambda row, col: search(row, col, cores, *directions, sizes.top_k, sizes.top_k)

    builders = {
        OURS: lambda: competitor(ours, "cpu"),
        REFERENCE: lambda: competitor(ours, "reference"),
    }
    if use_compile:
        builders[COMPILED] = lambda: competitor(plain(compiled(product_topk_reference)), "reference")
    return builders


def _growths(sizes: OperatorSizes) -> Builders:
    narrow = replace(sizes, width=sizes.growth_width)

    def build(num_rows: int) -> Competitor:
        # Ones: drawing a thousand million numbers takes longer than reading them.
        shape, dtype = (num_rows, narrow.width), DTYPES[sizes.dtype]
        values, pre_values = (huge_page_tensor(*shape, dtype=dtype) for _ in range(2))
        return _lookups(_Draws(narrow, num_rows), values, pre_values, use_compile=False)[OURS]()

    return {f"{num_rows:,} rows": partial(build, num_rows) for num_rows in sizes.growth_rows}
