"""Table gradients as rows: what backward hands over when a table's gradient must not become a dense tensor."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultramem.ops.backends import AUTO, CPU, TRITON, choose


@dataclass(frozen=True)
class RowContribution:
    """The gradient of one lookup in factors: row idx[n, k] receives w[n, k, c] · x[n, block[n, k], c-th slice].

    Keeping the factors costs N·(K·C + E·V) elements where the rows themselves would cost N·K·V. ``backend`` is what the
    lookup was asked to run on.
    """

    idx_NK: Tensor
    w_NKC: Tensor
    x_NV: Tensor
    block_NK: Tensor | None
    num_blocks: int
    backend: str = AUTO

    @property
    def layout(self) -> tuple[object, ...]:
        """What contributions must share to be laid end to end: slots, cores, blocks and dtypes."""
        return (*self.w_NKC.shape[1:], self.num_blocks, self.idx_NK.dtype, self.w_NKC.dtype, self.x_NV.dtype)


class RowGradients:
    """Collects the gradient of one table as (rows, row gradients), over layers and micro-batches.

    The backward of `bag` and `gather_dot` adds to it when it is passed as ``row_gradients``; the optimizer step
    coalesces it once and clears it. The table's own ``.grad`` stays None. Collecting is a side effect, which
    `torch.compile` cannot trace: with ``fullgraph=True`` it raises, otherwise the graph breaks around the lookup.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self.num_rows = num_rows
        self.width = width
        self.contributions: list[RowContribution] = []
        # A leaf with no elements: it puts the tap on the autograd tape even where only the table learns.
        self.anchor = torch.empty(0, requires_grad=True)

    def add(self, contribution: RowContribution) -> None:
        """Remember one lookup's contribution."""
        self.contributions.append(contribution)

    def clear(self) -> None:
        """Forget all contributions: what ``zero_grad(set_to_none=True)`` is for an ordinary gradient."""
        self.contributions.clear()

    def coalesce(self) -> tuple[Tensor, Tensor]:
        """Sum the contributions per row.

        Returns:
            rows [M] int64, sorted and distinct, and their gradients [M, V] in fp32 (fp64 for fp64 operands). M = 0 if
            nothing was collected.
        """
        if not self.contributions:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, self.width)
        chosen = {choose("scatter", part.backend, part.x_NV, part.w_NKC) for part in self.contributions}
        if chosen == {CPU}:
            return self._sum_rows_on_cpu()
        if chosen == {TRITON} and len({part.layout for part in self.contributions}) == 1:
            return self._sum_rows_on_device()
        touched = torch.cat([part.idx_NK.reshape(-1).long() for part in self.contributions])
        rows_M, position = torch.unique(touched, return_inverse=True)
        sizes = [part.idx_NK.numel() for part in self.contributions]
        total: Tensor | None = None
        for part, local in zip(self.contributions, position.split(sizes), strict=True):
            local_NK = local.view(part.idx_NK.shape)
            gradient = torch.ops.ultramem.scatter(
                local_NK, part.w_NKC, part.x_NV, rows_M.shape[0], part.block_NK, part.num_blocks, part.backend
            )
            total = gradient if total is None else total + gradient
        assert total is not None
        return rows_M, total

    @torch.no_grad()
    def _sum_rows_on_cpu(self) -> tuple[Tensor, Tensor]:
        parts = self.contributions
        rows_M, gradient_MV = torch.ops.ultramem_cpu.sum_rows(
            [part.idx_NK for part in parts],
            [part.w_NKC for part in parts],
            [part.x_NV for part in parts],
            [part.block_NK for part in parts],
            [part.num_blocks for part in parts],
            self.num_rows,
            self.width,
        )
        return rows_M, gradient_MV

    @torch.no_grad()
    def _sum_rows_on_device(self) -> tuple[Tensor, Tensor]:
        from ultramem.ops.triton import tables

        parts, first = self.contributions, self.contributions[0]
        # The factors are small beside the rows: one sort over all lookups, and each row is written once.
        return tables.scatter_rows(
            torch.cat([part.idx_NK for part in parts]),
            torch.cat([part.w_NKC for part in parts]),
            torch.cat([part.x_NV for part in parts]),
            self.num_rows,
            None
            if first.block_NK is None
            else torch.cat([part.block_NK for part in parts if part.block_NK is not None]),
            first.num_blocks,
        )


class _Tap(torch.autograd.Function):
    """The identity on a lookup's result; its backward tells the collector what the table would have received."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, anchor: Tensor, collector: RowGradients, num_blocks: int, backend: str, *operands: Any
    ) -> Tensor:
        ctx.collector, ctx.num_blocks, ctx.backend = collector, num_blocks, backend
        ctx.save_for_backward(*operands)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_out,) = grad_outputs
        idx_NK, block_NK, w_NKC, x_NV = ctx.saved_tensors
        # d(bag) pairs the saved weights with the incoming gradient; d(gather_dot) pairs it with the saved vectors.
        w, x = (w_NKC, grad_out) if x_NV is None else (grad_out, x_NV)
        ctx.collector.add(RowContribution(idx_NK, w.detach(), x.detach(), block_NK, ctx.num_blocks, ctx.backend))
        return (grad_out, *[None] * 8)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tap(
    out: Tensor,
    collector: RowGradients,
    idx_NK: Tensor,
    block_NK: Tensor | None,
    num_blocks: int,
    backend: str,
    *,
    w_NKC: Tensor | None = None,
    x_NV: Tensor | None = None,
) -> Tensor:
    """Return ``out`` unchanged, with a backward that reports the lookup's table gradient to ``collector``.

    Pass the operand that the gradient pairs with the incoming one: the weights of a `bag`, the vectors of a
    `gather_dot`.
    """
    tapped: Tensor = _Tap.apply(  # type: ignore[no-untyped-call]
        out, collector.anchor, collector, num_blocks, backend, idx_NK, block_NK, w_NKC, x_NV
    )
    return tapped
