"""What a run would be, without running it: resolved config, sizes, FLOPs, memory, tokens and steps."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ultramem.data.manifest import DataManifest
from ultramem.data.sources import are_present
from ultramem.layers import MemoryConfig
from ultramem.layers.tucker_memory import TuckerMemoryConfig
from ultramem.model import UltraMemConfig, UltraMemForCausalLM
from ultramem.model.accounting import cost_card
from ultramem.model.block import UltraMemDecoderLayer
from ultramem.model.ffn import MoEFFNConfig
from ultramem.model.roles import parameter_roles
from ultramem.training.config import RunConfig, load_config
from ultramem.training.data_parallel import WHOLE_ROLES
from ultramem.training.processes import check_processes
from ultramem.training.run import TRAINING_FLOPS_FACTOR, config_yaml, fit_positions, model_config, resolve_config
from ultramem.training.scale import scale_config

FP32_BYTES = 4
# Of one element; the scale of an 8-bit row is left out.
BYTES_OF_TABLE_MOMENT = {"fp32": 4, "bf16": 2, "8bit": 1}


@dataclass
class MemoryEstimate:
    """Bytes that training holds at its peak; activations are a rough estimate."""

    weights_bytes: int
    gradients_bytes: int
    moments_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything together."""
        return self.weights_bytes + self.gradients_bytes + self.moments_bytes + self.activations_bytes


def resolve_dry_run(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), scale: str | None = None
) -> tuple[RunConfig, DataManifest | None]:
    """Resolves a config as a run does, but goes without data that are not there yet if the vocabulary is given.

    Returns:
        the config, and the manifest or None.

    Raises:
        ConfigError, DataError: see :func:`ultramem.training.run.resolve_config`.
    """
    config = load_config(path, overrides)
    vocab_size = config.model.get("vocab_size")
    if are_present(config.data.specs()) or vocab_size is None:
        return resolve_config(path, overrides, scale)
    if scale is not None:
        # Without data, the vocabulary of a scaled run is the config's own.
        config = scale_config(config, model_config(config), scale)
        config.model["vocab_size"] = vocab_size
    fit_positions(config)
    return config, None


def _table_gradient_bytes(
    config: RunConfig, memory: MemoryConfig, num_memories: int, value_dim: int, pre_value_dim: int
) -> int:
    num_rows = memory.num_rows(num_memories)
    if config.training.table_gradients == "dense":
        return FP32_BYTES * num_rows * (2 * value_dim + pre_value_dim)
    num_lookups, width = config.global_batch_tokens * num_memories, value_dim + pre_value_dim
    # An index of 8 bytes and a weight for each selected row of either table, and one vector per lookup.
    handed_over = num_lookups * (2 * memory.num_selected * (8 + FP32_BYTES) + FP32_BYTES * width)
    return handed_over + FP32_BYTES * width * min(num_lookups * memory.num_selected, num_rows)


def _split_parameters(model: UltraMemConfig) -> tuple[int, int]:
    """Parameters that ``training.parallel: fsdp`` splits over the processes: all, and those of the largest block."""
    with torch.device("meta"):
        built = UltraMemForCausalLM(model)
    roles = parameter_roles(built)
    split = {name: parameter.numel() for name, parameter in built.named_parameters() if roles[name] not in WHOLE_ROLES}
    blocks = [name + "." for name, module in built.named_modules() if isinstance(module, UltraMemDecoderLayer)]
    largest = max(sum(size for name, size in split.items() if name.startswith(block)) for block in blocks)
    return sum(split.values()), largest


def estimate_memory(config: RunConfig, num_processes: int = 1) -> MemoryEstimate:
    """What one of so many processes holds, counted from the config alone.

    With ``training.parallel: fsdp`` it holds its share of what is split, two blocks gathered whole, and whole gradients
    where a step has several micro-batches; otherwise everything.

    Weights, gradients and AdamW's two moments in fp32, if the config does not narrow the tables' moments. Dense table
    gradients need one more of the values, which a memory's backward makes before it is added. Table gradients as rows:
    what backward hands over for the whole batch, weights and an index per selected row and a vector per token, and the
    rows themselves where they are summed, all of them distinct at worst. Activations are those of one micro-batch: what
    the blocks keep for backward, one memory's gathered rows, and the logits in the arithmetic's precision, in fp32 and
    as their gradient. With gradient checkpointing a block keeps its input only, and one block's activations are made
    again.
    """
    model = model_config(config)
    card = cost_card(model)
    element_bytes = 2 if config.training.precision == "bf16" else FP32_BYTES
    token_bytes = model.vocab_size * (element_bytes + 2 * FP32_BYTES)
    if config.training.gradient_checkpointing:
        token_bytes += model.num_hidden_layers * FP32_BYTES * model.hidden_size
        token_bytes += _block_bytes(model, element_bytes) + _memory_bytes(model)
    else:
        token_bytes += saved_bytes_per_token(model, element_bytes)
    gradients_bytes = FP32_BYTES * card.total_parameters
    if (memory := model.memory_config) is not None:
        value_dim, pre_value_dim = memory.row_widths(model.hidden_size)
        token_bytes += FP32_BYTES * memory.num_selected * max(value_dim, pre_value_dim)
        gradients_bytes -= FP32_BYTES * card.table_parameters
        gradients_bytes += _table_gradient_bytes(config, memory, len(model.memory_spans), value_dim, pre_value_dim)
    process_sequences = config.training.global_batch_sequences // num_processes
    micro_batch = min(config.micro_batch_sequences, process_sequences)
    estimate = MemoryEstimate(
        weights_bytes=FP32_BYTES * card.total_parameters,
        gradients_bytes=gradients_bytes,
        moments_bytes=2 * FP32_BYTES * (card.total_parameters - card.table_parameters)
        + 2 * BYTES_OF_TABLE_MOMENT[config.optimizer.table_moments] * card.table_parameters,
        activations_bytes=micro_batch * config.data.sequence_length_tokens * token_bytes,
    )
    if num_processes > 1 and config.training.parallel == "fsdp":
        split, largest_block = _split_parameters(model)
        elsewhere_bytes = FP32_BYTES * (split - split // num_processes)
        estimate.weights_bytes += 2 * FP32_BYTES * largest_block - elsewhere_bytes
        estimate.moments_bytes -= 2 * elsewhere_bytes
        if micro_batch == process_sequences:
            estimate.gradients_bytes -= elsewhere_bytes
    return estimate


def saved_bytes_per_token(model: UltraMemConfig, element_bytes: int) -> int:
    """What autograd saves in all blocks, roughly; the tests compare it with a count of the saved tensors.

    Args:
        model: the model's configuration.
        element_bytes: of the arithmetic's precision: 2 for bf16, 4 for fp32.
    """
    blocks = model.num_hidden_layers * _block_bytes(model, element_bytes)
    return blocks + len(model.memory_spans) * _memory_bytes(model)


def _block_bytes(model: UltraMemConfig, element_bytes: int) -> int:
    """Bytes per token that attention and FFN of a block keep for backward, without its memories.

    Around norms and rotary embedding ten vectors of the hidden width stay in fp32; five more, and four of each inner
    width, have the arithmetic's precision. A token's experts also keep their inputs and outputs, and the router fp32
    logits.
    """
    hidden_bytes = model.hidden_size * (10 * FP32_BYTES + 5 * element_bytes)
    ffn = model.ffn_config
    if not isinstance(ffn, MoEFFNConfig):
        return hidden_bytes + 4 * model.intermediate_size * element_bytes
    expert_elements = 4 * ffn.expert_size(model.intermediate_size) + 2 * model.hidden_size
    router_bytes = 4 * FP32_BYTES * ffn.num_experts
    return hidden_bytes + ffn.num_experts_per_tok * expert_elements * element_bytes + router_bytes


def _memory_bytes(model: UltraMemConfig) -> int:
    """Bytes per token that a memory keeps for backward.

    With Tucker scores three fp32 vectors of the queries' width, from before and after their norm; per selected slot two
    indices, the fine scores of its keys in two ranks, weights for two cores and the pre-value's product. With additive
    scores those of all keys, for every head; per slot two indices and its weights. And two vectors of the hidden width.
    """
    memory = model.memory_config
    if memory is None:
        return 0
    if isinstance(memory, TuckerMemoryConfig):
        num_elements, slot_bytes = 3 * 2 * memory.num_queries * memory.key_dim, 52
    else:
        num_elements, slot_bytes = 2 * memory.side(len(model.memory_spans)) * memory.num_heads, 36
    return FP32_BYTES * (num_elements + 2 * model.hidden_size) + slot_bytes * memory.num_selected


def summarize(config: RunConfig, manifest: DataManifest | None, num_processes: int = 1) -> list[tuple[str, str]]:
    """The figures of a run as (name, text) rows; without a manifest the number of epochs is left out."""
    card = cost_card(model_config(config))
    memory = estimate_memory(config, num_processes)
    length = config.data.sequence_length_tokens
    # A token attends to half the sequence on average.
    forward_flops = card.flops_per_token(length // 2)
    num_tokens = config.num_steps * config.global_batch_tokens
    epochs = "" if manifest is None else f" ({num_tokens / manifest.splits['train'].num_tokens:.2f} epochs)"
    return [
        ("parameters", f"{card.total_parameters:,}"),
        ("dense parameters", f"{card.dense_parameters:,}"),
        ("expert parameters", f"{card.expert_parameters:,}"),
        ("table parameters", f"{card.table_parameters:,}"),
        ("active parameters", f"{card.active_parameters:,}"),
        ("FLOPs per token, forward", f"{forward_flops:,.0f}"),
        ("FLOPs per token, training", f"{TRAINING_FLOPS_FACTOR * forward_flops:,.0f}"),
        ("FLOPs of the run", f"{TRAINING_FLOPS_FACTOR * forward_flops * num_tokens:.3e}"),
        ("processes", f"{num_processes} ({config.training.parallel or 'ddp'})" if num_processes > 1 else "1"),
        ("memory per process: weights", format_bytes(memory.weights_bytes)),
        ("memory per process: gradients", format_bytes(memory.gradients_bytes)),
        ("memory per process: optimizer moments", format_bytes(memory.moments_bytes)),
        ("memory per process: activations, roughly", format_bytes(memory.activations_bytes)),
        ("memory per process: all", format_bytes(memory.total_bytes)),
        ("tokens", f"{num_tokens:,}{epochs}"),
        ("steps", f"{config.num_steps:,} of {config.global_batch_tokens:,} tokens"),
    ]


def mixture_rows(config: RunConfig, manifest: DataManifest | None) -> list[tuple[str, str]]:
    """Share of the run and passes over the data of every source of a mixture; nothing for other data."""
    tokens = config.num_steps * config.global_batch_tokens
    return [
        (f"source {source.name}", f"{source.weight:.1%}, {tokens * source.weight / source.num_tokens:.2f} passes")
        for source in (manifest.mixture if manifest is not None else ())
    ]


def format_bytes(num_bytes: int) -> str:
    """``1536`` → ``1.5 KiB``."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.1f} {units[0]}"


def print_dry_run(config: RunConfig, manifest: DataManifest | None, num_processes: int = 1) -> None:
    """Prints the resolved config and the figures, and without a manifest that the data are not prepared.

    Raises:
        ConfigError: so many processes cannot train this config.
    """
    check_processes(config, num_processes)
    console = Console(soft_wrap=True)
    console.print(config_yaml(config), markup=False, highlight=False)
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, text in [*summarize(config, manifest, num_processes), *mixture_rows(config, manifest)]:
        table.add_row(name, text)
    console.print(table)
    if manifest is None:
        sources = ", ".join(spec.name for spec in config.data.specs())
        sources = f"folder {sources}" if config.data.folder is not None else sources
        console.print(
            f"The data are not prepared: there is no {sources}. A real run needs it (`ultramem data prepare SOURCE… "
            f"--output {config.data.folder or 'FOLDER'} --tokenizer …`).",
            markup=False,
            highlight=False,
        )
