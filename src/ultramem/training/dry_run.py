"""What a run would be, without running it: resolved config, sizes, FLOPs, memory, tokens and steps."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ultramem.data.manifest import DataManifest
from ultramem.data.sources import are_present
from ultramem.model.accounting import cost_card
from ultramem.training.config import RunConfig, load_config
from ultramem.training.run import TRAINING_FLOPS_FACTOR, config_yaml, fit_positions, model_config, resolve_config

FP32_BYTES = 4


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
    path: str | Path, overrides: list[str] | tuple[str, ...] = ()
) -> tuple[RunConfig, DataManifest | None]:
    """Resolves a config as a run does, but goes without data that are not there yet if the vocabulary is given.

    Returns:
        the config, and the manifest or None.

    Raises:
        ConfigError, DataError: see :func:`ultramem.training.run.resolve_config`.
    """
    config = load_config(path, overrides)
    if are_present(config.data.specs()) or config.model.get("vocab_size") is None:
        return resolve_config(path, overrides)
    fit_positions(config)
    return config, None


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """Weights, dense gradients and AdamW's two moments in fp32, and the activations of one micro-batch.

    Activations per token and block: about 12 vectors of the hidden width and 4 of the FFN's inner width in the
    arithmetic's precision, and per memory the selected rows (values and pre-values) with their scores; with gradient
    checkpointing one vector per block and one block's activations. Logits are kept in the arithmetic's precision, in
    fp32 and as their gradient.
    """
    model = model_config(config)
    num_parameters = cost_card(model).total_parameters
    element_bytes = 2 if config.training.precision == "bf16" else FP32_BYTES
    block_elements = 12 * model.hidden_size + 4 * model.intermediate_size
    memory_elements = 0
    if (memory := model.memory_config) is not None:
        memory_elements = memory.num_selected * (sum(memory.row_widths(model.hidden_size)) + 8)
    elements = model.num_hidden_layers * block_elements + len(model.memory_spans) * memory_elements
    if config.training.gradient_checkpointing:
        elements = model.num_hidden_layers * model.hidden_size + block_elements + memory_elements
    logits_bytes = model.vocab_size * (element_bytes + 2 * FP32_BYTES)
    num_tokens = config.micro_batch_sequences * config.data.sequence_length_tokens
    return MemoryEstimate(
        weights_bytes=FP32_BYTES * num_parameters,
        gradients_bytes=FP32_BYTES * num_parameters,
        moments_bytes=2 * FP32_BYTES * num_parameters,
        activations_bytes=num_tokens * (elements * element_bytes + logits_bytes),
    )


def summarize(config: RunConfig, manifest: DataManifest | None) -> list[tuple[str, str]]:
    """The figures of a run as (name, text) rows; without a manifest the number of epochs is left out."""
    card = cost_card(model_config(config))
    memory = estimate_memory(config)
    length = config.data.sequence_length_tokens
    # A token attends to half the sequence on average.
    forward_flops = card.flops_per_token(length // 2)
    num_tokens = config.num_steps * config.global_batch_tokens
    epochs = "" if manifest is None else f" ({num_tokens / manifest.splits['train'].num_tokens:.2f} epochs)"
    return [
        ("parameters", f"{card.total_parameters:,}"),
        ("dense parameters", f"{card.dense_parameters:,}"),
        ("table parameters", f"{card.table_parameters:,}"),
        ("active parameters", f"{card.active_parameters:,}"),
        ("FLOPs per token, forward", f"{forward_flops:,.0f}"),
        ("FLOPs per token, training", f"{TRAINING_FLOPS_FACTOR * forward_flops:,.0f}"),
        ("memory: weights", format_bytes(memory.weights_bytes)),
        ("memory: gradients", format_bytes(memory.gradients_bytes)),
        ("memory: optimizer moments", format_bytes(memory.moments_bytes)),
        ("memory: activations, roughly", format_bytes(memory.activations_bytes)),
        ("memory: all", format_bytes(memory.total_bytes)),
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


def print_dry_run(config: RunConfig, manifest: DataManifest | None) -> None:
    """Prints the resolved config and the figures, and without a manifest that the data are not prepared."""
    console = Console(soft_wrap=True)
    console.print(config_yaml(config), markup=False, highlight=False)
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, text in [*summarize(config, manifest), *mixture_rows(config, manifest)]:
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
