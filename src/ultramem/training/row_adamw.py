"""AdamW whose tables are updated row by row: a step costs what its tokens touched, however large the tables are."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from ultramem.errors import CheckpointError
from ultramem.ops import RowGradients
from ultramem.training.moments import FIRST, SECOND, Moments, PlainMoments, State

# So few rows that what is gathered from large tables is still in the caches, and its pages in the TLB, when it is put
# back: a third faster than all at once.
CPU_CHUNK_ROWS = 1024


class RowAdamW(AdamW):
    """AdamW for all parameters, lazy for those whose gradient is collected as rows.

    Moments and decoupled weight decay of a row advance only in steps that touch it, while the bias correction counts
    all steps, as in `torch.optim.SparseAdam`. Where every row is touched in every step, it is AdamW. Dense parameters
    are AdamW's as ever. Tables have AdamW's state (``step``, ``exp_avg``, ``exp_avg_sq``), so that a training state
    with fp32 moments fits both.

    Args:
        params: parameters or groups, tables among them.
        row_gradients: table → collector of its gradient. Only the collector counts; ``.grad`` is dropped.
        moments: how the tables' moments are kept.
        **settings: of `torch.optim.AdamW`: ``lr``, ``betas``, ``eps``, ``weight_decay``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        row_gradients: Mapping[nn.Parameter, RowGradients],
        moments: Moments | None = None,
        **settings: Any,
    ) -> None:
        # The fused step runs on CPU too, several times faster than the loop over tensors.
        super().__init__(params, fused=True, **settings)
        self._row_gradients = dict(row_gradients)
        self._moments = moments or PlainMoments()
        self._coalesced: dict[nn.Parameter, tuple[Tensor, Tensor]] | None = None

    def coalesce(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """The tables' gradients of this step, summed once; :meth:`step` takes what is in this dictionary then.

        Returns:
            table → rows [M] int64, distinct, and their gradients [M, V] in the table's dtype. Clipping changes the
            gradients in place, and a reduction over processes may replace the entries.
        """
        if self._coalesced is None:
            self._coalesced = {}
            for table, collector in self._row_gradients.items():
                rows_M, gradient_MV = collector.coalesce()
                self._coalesced[table] = rows_M.to(table.device), gradient_MV.to(table)
        return self._coalesced

    @torch.no_grad()
    def clip_rows_(self, max_norm: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` over the tables; returns the norm before clipping."""
        gradients = [gradient_MV for _, gradient_MV in self.coalesce().values()]
        norm = nn.utils.get_total_norm(gradients)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient_MV in gradients:
            gradient_MV.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of everything; like ``.grad``, collected gradients stay until :meth:`zero_grad`."""
        for table in self._row_gradients:
            # torch's distributed checkpoints set gradients of zeros to make an optimizer create its state.
            table.grad = None
        loss = super().step(closure)
        coalesced = self.coalesce()
        for group in self.param_groups:
            for table in group["params"]:
                if table in coalesced:
                    self._step_rows(table, group, *coalesced[table])
        self._coalesced = None
        return loss

    def _step_rows(self, table: nn.Parameter, group: dict[str, Any], rows_M: Tensor, gradient_MV: Tensor) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=table.device)
            state |= self._moments.new_state(table)
        num_rows = CPU_CHUNK_ROWS if rows_M.device.type == "cpu" else max(1, rows_M.shape[0])
        for chunk in zip(rows_M.split(num_rows), gradient_MV.split(num_rows), strict=True):
            self._step_chunk(table, group, state, *chunk)
        state["step"] += 1

    def _step_chunk(
        self, table: nn.Parameter, group: dict[str, Any], state: State, rows_M: Tensor, gradient_MV: Tensor
    ) -> None:
        row_MV = table.index_select(0, rows_M)
        first_MV, second_MV = (self._moments.read_rows(state, name, rows_M).to(table) for name in (FIRST, SECOND))
        # torch's own kernel on the gathered rows: the arithmetic cannot drift from AdamW's. It counts the step up.
        adamw(
            [row_MV],
            [gradient_MV],
            [first_MV],
            [second_MV],
            [],
            [state["step"].clone()],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        table.index_copy_(0, rows_M, row_MV)
        self._moments.write_rows(state, FIRST, rows_M, first_MV)
        self._moments.write_rows(state, SECOND, rows_M, second_MV)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, the collected ones too."""
        super().zero_grad(set_to_none)
        self._coalesced = None
        for collector in self._row_gradients.values():
            collector.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; the tables' moments keep their own dtypes, where torch would cast them to the table's.

        Raises:
            CheckpointError: the state's moments are kept in another way.
        """
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        tables = {
            index: table for index, table in zip(indices, parameters, strict=True) if table in self._row_gradients
        }
        saved = state_dict["state"]
        others = {index: state for index, state in saved.items() if index not in tables}
        super().load_state_dict({**state_dict, "state": others})
        for index in tables.keys() & saved.keys():
            table = tables[index]
            expected = {name: value.dtype for name, value in self._moments.new_state(table[:0]).items()}
            if saved[index].keys() - {"step"} != expected.keys():
                raise CheckpointError(
                    f"the saved state of a table holds {', '.join(sorted(saved[index]))}, but its moments are kept as "
                    f"{', '.join(expected)}: set 'optimizer.table_moments' as in the run that saved it"
                )
            self.state[table] = {
                name: value.to(table.device, expected.get(name, torch.float32)) for name, value in saved[index].items()
            }
