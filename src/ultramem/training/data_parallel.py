"""One model trained by several processes, each on its part of every batch: DDP, or FSDP2 around replicated tables."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dist_cp_sd
from olmo_core.distributed.utils import get_world_size
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ultramem.layers.additive_retrieval import AdditiveRetrieval
from ultramem.model.block import UltraMemDecoderLayer
from ultramem.ops import scatter
from ultramem.training.config import Parallel, TableGradients

WHOLE_ROLES = ("table", "key")


class DataParallel:
    """Forward passes and gradients of a model that several processes train; in one process it adds nothing.

    After :meth:`finish_gradients` every gradient is the mean over the processes, tables included.

    Attributes:
        forward: the module to call for a training step.
    """

    def __init__(
        self, model: nn.Module, roles: Mapping[str, str], mode: Parallel, table_gradients: TableGradients = "dense"
    ) -> None:
        """Prepares the model in place, before an optimizer takes its parameters.

        Args:
            model: with equal weights in all processes, on its device.
            roles: role of every parameter by name.
            mode: ``ddp`` replicates everything; ``fsdp`` splits the weights of every block, its gradients and moments
                over the processes, and replicates the memories' tables and keys.
            table_gradients: with ``rows`` the tables have no gradient to average; see :meth:`average_rows`.
        """
        self.model = model
        self.forward: nn.Module = model
        self.num_processes = get_world_size()
        self._replicated: list[nn.Parameter] = []
        if self.num_processes == 1:
            return
        if mode == "fsdp":
            self._replicated = _shard(model, roles)
        else:
            if table_gradients == "rows":
                tables = [name for name, role in roles.items() if role == "table"]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, tables)
            # Buffers follow from the weights, or are averaged below.
            self.forward = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """Forward and backward of one micro-batch; gradients travel between the processes after the last only."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
            self.model.set_is_last_backward(is_last)
        if isinstance(self.forward, DistributedDataParallel) and not is_last:
            with self.forward.no_sync():
                yield
        else:
            yield

    def finish_gradients(self) -> None:
        """After the last micro-batch: averages what the engine left, and the running statistics of batch norms."""
        gradients = [parameter.grad for parameter in self._replicated if parameter.grad is not None]
        self._average_(gradients + running_statistics(self.model))

    def average_rows(self, gradients: dict[nn.Parameter, tuple[Tensor, Tensor]]) -> None:
        """Replaces each process's row gradients by their mean over the processes, equal to the bit in all of them.

        Args:
            gradients: table → rows [M] int64, distinct, and their gradients [M, V]; a row that a process lacks counts
                as zero there. Every process sends all of its rows.
        """
        if self.num_processes == 1:
            return
        for table, (rows_M, gradient_MV) in gradients.items():
            touched = torch.cat(_gather(rows_M))
            rows, position = torch.unique(touched, return_inverse=True)
            sent = torch.cat(_gather(gradient_MV)) / self.num_processes
            ones = sent.new_ones(len(sent), 1)
            # In the order of the processes, whatever the device: all must come to the same bits.
            gradients[table] = rows, scatter(position[:, None], ones, sent, len(rows)).to(gradient_MV.dtype)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes of a number that each has, detached."""
        value = value.detach()
        if self.num_processes > 1:
            value = value.float()
            self._average_([value])
        return value

    def _average_(self, tensors: list[Tensor]) -> None:
        if self.num_processes == 1:
            return
        pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work, tensor in zip(pending, tensors, strict=True):
            work.wait()
            tensor.div_(self.num_processes)


def _gather(tensor: Tensor) -> list[Tensor]:
    """Every process's tensor; they may differ in their first dimension."""
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(get_world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(size) for size in lengths]
    # Not every backend sends unequal parts.
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that forward passes in training change: those of batch-normalised queries."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, AdditiveRetrieval)
        for buffer in (module.query_mean, module.query_variance)
        if buffer is not None
    ]


def _shard(model: nn.Module, roles: Mapping[str, str]) -> list[nn.Parameter]:
    """Splits a model's blocks, and what is outside them, with FSDP2.

    Returns:
        the trainable parameters that stay whole in every process: tables, which FSDP would gather for every block, and
        keys with their cores, from which the search directions are computed outside forward passes.
    """
    whole = [parameter for name, parameter in model.named_parameters() if roles[name] in WHOLE_ROLES]
    mesh = init_device_mesh(next(model.parameters()).device.type, (get_world_size(),))
    for block in [module for module in model.modules() if isinstance(module, UltraMemDecoderLayer)]:
        fully_shard(block, mesh=mesh, ignored_params=set(whole))
    fully_shard(model, mesh=mesh, ignored_params=set(whole))
    return [parameter for parameter in whole if parameter.requires_grad]


def clip_gradients_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a norm, of which each process may hold a part or the whole, as FSDP left it.

    Args:
        parameters: those without a gradient are left out.
        max_norm: infinity only measures.

    Returns:
        the norm before, over all processes, a scalar.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    split = [parameter for parameter in parameters if isinstance(parameter.grad, DTensor)]
    whole = [parameter for parameter in parameters if not isinstance(parameter.grad, DTensor)]
    norms = []
    for part in filter(None, (split, whole)):
        norm = nn.utils.get_total_norm([parameter.grad for parameter in part if parameter.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for part in filter(None, (split, whole)):
        nn.utils.clip_grads_with_norm_(part, max_norm, total)
    return total


def gather_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """All weights of a model that FSDP has split, by name, on the CPU of the first process; the others help.

    Returns:
        an empty dictionary in the other processes; None if the model holds its weights itself.
    """
    if not isinstance(model, FSDPModule):
        return None
    options = dist_cp_sd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dist_cp_sd.get_model_state_dict(model, options=options)
    first_names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A shared weight was gathered once per name; writers recognise it by its memory.
        if (first := first_names.setdefault(parameter, name)) in weights:
            weights[name] = weights[first]
    return weights
