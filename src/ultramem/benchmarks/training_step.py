"""`ultramem bench train`: the training step of the demo's size, the memory model against its dense twin."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ultramem.benchmarks.cases import Case, measure_case
from ultramem.benchmarks.measure import Competitor, Tick
from ultramem.benchmarks.targets import DENSE, DENSE_GRADIENTS, ROW_GRADIENTS
from ultramem.benchmarks.twins import model_cost
from ultramem.model import UltraMemConfig, UltraMemForCausalLM
from ultramem.model.roles import parameter_roles
from ultramem.ops import use_backend
from ultramem.training.config import OptimizerSection, TableGradients
from ultramem.training.data_parallel import clip_gradients_
from ultramem.training.optim import build_optimizer
from ultramem.training.row_adamw import RowAdamW
from ultramem.training.train_module import next_token_losses

REFERENCE_STEP = "UltraMemV2, reference path"

# The models of configs/demo.yaml and configs/demo_dense.yaml.
DEMO_DECODER: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
}
DEMO_MEMORY: dict[str, Any] = {
    **DEMO_DECODER,
    "intermediate_size": 208,
    "memory": {"num_keys": 96, "key_dim": 24, "value_dim": 128, "pre_value_dim": 0, "top_k": 16},
}
DEMO_DENSE: dict[str, Any] = {**DEMO_DECODER, "intermediate_size": 312, "memory": None}


@dataclass(frozen=True)
class TrainSizes:
    """The batch of one step; the defaults are the demo's.

    Attributes:
        num_sequences: sequences.
        sequence_length_tokens: their length.
        bf16: arithmetic of forward and backward in bf16, else fp32.
    """

    num_sequences: int = 16
    sequence_length_tokens: int = 128
    bf16: bool = True


def run_training(sizes: TrainSizes, num_runs: int, tick: Tick | None = None) -> list[Case]:
    """Measure forward, backward, clipping and optimizer step.

    Args:
        sizes: of the batch.
        num_runs: runs that count.
        tick: called after each run with what was run.
    """
    memory, dense = UltraMemConfig(**DEMO_MEMORY), UltraMemConfig(**DEMO_DENSE)
    words = (
        f"{sizes.num_sequences} sequences × {sizes.sequence_length_tokens} tokens, the demo's models "
        f"(D = {memory.hidden_size}, {memory.num_hidden_layers} layers), {'bf16' if sizes.bf16 else 'fp32'}"
    )
    builders: dict[str, Callable[[], Competitor]] = {
        DENSE_GRADIENTS: lambda: _step(memory, sizes, "dense", "auto"),
        ROW_GRADIENTS: lambda: _step(memory, sizes, "rows", "auto"),
        REFERENCE_STEP: lambda: _step(memory, sizes, "dense", "reference"),
        DENSE: lambda: _step(dense, sizes, "dense", "auto"),
    }
    case = measure_case(
        "training step",
        words,
        builders,
        num_runs,
        tick,
        num_tokens=sizes.num_sequences * sizes.sequence_length_tokens,
        at_target_sizes=sizes == TrainSizes(),
        facts={"models": [asdict(model_cost("UltraMemV2", memory)), asdict(model_cost(DENSE, dense))]},
    )
    return [case]


def _step(config: UltraMemConfig, sizes: TrainSizes, table_gradients: TableGradients, backend: str) -> Competitor:
    """What `ultramem train` does in one step, on random tokens."""
    torch.manual_seed(0)
    model = UltraMemForCausalLM(config).train()
    optimizer = build_optimizer(model, parameter_roles(model), OptimizerSection(lr=1e-3), table_gradients)
    groups: dict[bool, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["name"] == "tables", []).extend(group["params"])
    shape = (sizes.num_sequences, sizes.sequence_length_tokens)

    def prepare() -> Callable[[], object]:
        ids_BT = torch.randint(config.vocab_size, shape)
        labels_BT = ids_BT.roll(-1, 1)
        labels_BT[:, -1] = -100

        def timed() -> None:
            with use_backend(backend):
                with torch.autocast("cpu", torch.bfloat16, enabled=sizes.bf16):
                    output = model(input_ids=ids_BT, use_cache=False)
                loss = next_token_losses(output.logits, labels_BT).sum() / (labels_BT != -100).sum()
                loss = loss + sum((output.auxiliary_losses or {}).values())
                loss.backward()
                for of_tables, parameters in groups.items():
                    if of_tables and isinstance(optimizer, RowAdamW):
                        optimizer.clip_rows_(1.0)
                    else:
                        clip_gradients_(parameters, 1.0)
                optimizer.step()
                model.refresh_retrieval()
                optimizer.zero_grad(set_to_none=True)

        return timed

    return Competitor(prepare)
