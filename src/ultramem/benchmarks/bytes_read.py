"""What a decode step has to read from memory, counted on the step itself: distinct rows and experts, weights, keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts, OlmoeTopKRouter

from ultramem.benchmarks.decode_step import DecodeStep, cache_bytes
from ultramem.layers import MemoryPool
from ultramem.model import UltraMemForCausalLM
from ultramem.model.roles import Role, parameter_roles


@dataclass(frozen=True)
class BytesRead:
    """Bytes that one decode step reads, each once, and how many rows and experts are behind them.

    Attributes:
        weights: what every token reads: projections, norms, the output layer.
        keys: the memories' product keys and cores, as stored.
        embedding: distinct rows of an embedding that is not the output layer.
        tables: distinct rows of values and pre-values in each memory, and their entries of its permutation.
        experts: distinct experts in each layer.
        kv_cache: keys and values of all tokens so far.
        num_rows: distinct rows, summed over memories.
        num_experts: distinct experts, summed over layers.
    """

    weights: int
    keys: int
    embedding: int
    tables: int
    experts: int
    kv_cache: int
    num_rows: int
    num_experts: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.keys + self.embedding + self.tables + self.experts + self.kv_cache

    def to_dict(self) -> dict[str, int]:
        """All numbers by name, those of bytes with that unit."""
        counts = asdict(self)
        numbers = {name: counts.pop(name) for name in ("num_rows", "num_experts")}
        return {"bytes_read": self.total, **{f"{name}_bytes": count for name, count in counts.items()}, **numbers}


def count_bytes_read(step: DecodeStep) -> BytesRead:
    """Run the last step once more, untimed, and count what it touches.

    Args:
        step: of one of our models, or of transformers' OLMo 2 or OLMoE.
    """
    model, ids_B1 = step.model, step.last_ids_B1
    ours = isinstance(model, UltraMemForCausalLM)
    with _router_choices(model) as choices:
        output = step.run_with_statistics(ids_B1, **({"output_memory_statistics": True} if ours else {}))
    table_bytes, num_rows = _tables(model, output.memory_statistics) if ours else (0, 0)
    experts = [module for module in model.modules() if isinstance(module, OlmoeExperts)]
    distinct_experts = [len(torch.unique(chosen)) for chosen in choices]
    by_role = _parameter_bytes(model)
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    num_tokens = 0 if tied else len(torch.unique(ids_B1))
    return BytesRead(
        weights=by_role["matrix"] + by_role["norm"] + (embedding.nbytes if tied else 0),
        keys=by_role["key"],
        embedding=num_tokens * embedding.shape[1] * embedding.element_size(),
        tables=table_bytes,
        experts=sum(count * _expert_bytes(module) for count, module in zip(distinct_experts, experts, strict=True)),
        kv_cache=cache_bytes(model, step.batch_size, step.kv_length_tokens),
        num_rows=num_rows,
        num_experts=sum(distinct_experts),
    )


def _parameter_bytes(model: PreTrainedModel) -> dict[Role | str, int]:
    """Bytes of all parameters outside the experts, by role; those of others' models count as matrices."""
    expert_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, OlmoeExperts)
        for parameter in module.parameters()
    }
    embedding_id = id(model.get_input_embeddings().weight)
    roles: dict[str, Any] = parameter_roles(model) if isinstance(model, UltraMemForCausalLM) else {}
    total: dict[Role | str, int] = {"matrix": 0, "norm": 0, "embedding": 0, "key": 0, "table": 0}
    for name, parameter in model.named_parameters():
        if id(parameter) not in expert_ids:
            role = "embedding" if id(parameter) == embedding_id else roles.get(name, "matrix")
            total[role] += parameter.nbytes
    return total


def _expert_bytes(experts: OlmoeExperts) -> int:
    """Bytes of one expert."""
    return sum(parameter[0].nbytes for parameter in experts.parameters())


def _tables(model: UltraMemForCausalLM, statistics: tuple[dict[str, Tensor], ...]) -> tuple[int, int]:
    """Bytes of the distinct rows that each memory read, and their number. A row that two layers read counts twice."""
    num_bytes = num_rows = 0
    pool = model.model.memory_pool
    for memory, found in zip(model.model.memories, statistics, strict=True):
        assert isinstance(pool, MemoryPool)
        slots_NK = found["slots_NK"]
        rows = len(torch.unique(memory.physical_rows(slots_NK)))
        num_rows += rows
        num_bytes += rows * sum(table[0].nbytes for table in pool.parameters())
        permutation = getattr(memory, "permutation", None)
        if permutation is not None:
            # The permutation has one entry for every slot.
            num_bytes += len(torch.unique(slots_NK)) * permutation.element_size()
    return num_bytes, num_rows


@contextmanager
def _router_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """The experts that each router chooses inside the block: one [N, a] per layer, in order."""
    choices: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, OlmoeTopKRouter)]
    hooks = [router.register_forward_hook(lambda _, __, output: choices.append(output[2])) for router in routers]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()
