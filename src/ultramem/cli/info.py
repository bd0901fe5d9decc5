"""`ultramem info`: what a checkpoint holds and costs, checked against its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultramem.cli.loading import find_model_folder

if TYPE_CHECKING:
    from rich.table import Table

    from ultramem.model import CostCard, UltraMemConfig

_BATCH_SIZES = (1, 16, 64)


def info(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, or a run folder (its newest model is taken).")],
) -> None:
    """Print a checkpoint's sizes and costs and its layers, and check them against the shapes of its tensors."""
    from rich.console import Console

    from ultramem.model import cost_card
    from ultramem.model.inspection import check_weights, load_config

    folder = find_model_folder(checkpoint)
    config = load_config(folder)
    card = cost_card(config)
    file_summary = check_weights(folder, config)
    console = Console()
    console.print(_size_table(folder, config, card))
    console.print(_layer_table(config))
    console.print(
        f"{file_summary.num_tensors} tensors in {file_summary.num_files} file(s), {file_summary.num_bytes:,} bytes "
        f"({', '.join(file_summary.dtypes)}): shapes and parameter counts agree with the configuration.",
        soft_wrap=True,
        highlight=False,
    )


def _size_table(folder: Path, config: UltraMemConfig, card: CostCard) -> Table:
    from rich.table import Table

    table = Table(title=str(folder), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_row("blocks, width", f"{config.num_hidden_layers}, {config.hidden_size}")
    table.add_row("attention heads, of keys and values", f"{config.num_attention_heads}, {config.num_key_value_heads}")
    table.add_row("vocabulary", f"{config.vocab_size:,}{' (tied)' if config.tie_word_embeddings else ''}")
    table.add_row("positions", f"{config.max_position_embeddings:,}")
    if (memory := config.memory_config) is not None:
        table.add_row("memory", f"{memory.type}, {memory.position}, {memory.tables} tables")
        table.add_row(
            "rows of the pool, shared by", f"{memory.num_rows(card.num_memories):,}, {card.num_memories} memories"
        )
    table.add_section()
    table.add_row("dense parameters", f"{card.dense_parameters:,}")
    table.add_row("table parameters", f"{card.table_parameters:,}")
    table.add_row("total parameters", f"{card.total_parameters:,}")
    table.add_row("active parameters", f"{card.active_parameters:,}")
    table.add_section()
    table.add_row("FLOPs per token (no context)", f"{card.flops_per_token():,}")
    longest = config.max_position_embeddings
    table.add_row(f"FLOPs per token ({longest:,} tokens of context)", f"{card.flops_per_token(longest):,}")
    for batch_size in _BATCH_SIZES:
        table.add_row(
            f"bytes read per decode step, batch {batch_size}, bf16", f"{card.bytes_per_decode_step(batch_size):,}"
        )
    return table


def _layer_table(config: UltraMemConfig) -> Table:
    from rich.table import Table

    memory, spans = config.memory_config, config.memory_spans
    table = Table(title="blocks (memory: reads at a block → adds after a block)")
    table.add_column("block")
    table.add_column("FFN")
    for heading in ("memory", "slots", "keys", "key, value, pre-value dims", "top-k · heads"):
        table.add_column(heading, justify="right")
    for block in range(config.num_hidden_layers):
        here = [span for span in spans if span.start == block]
        if not here or memory is None:
            table.add_row(str(block), str(config.intermediate_size), *["–"] * 5)
            continue
        side = memory.side(len(spans))
        ffn = "–" if block in config.replaced_blocks else str(config.intermediate_size)
        for number, span in enumerate(here):
            table.add_row(
                *((str(block), ffn) if number == 0 else ("", "")),
                f"{span.start} → {span.end}",
                f"{side**2:,}",
                f"2 × {side:,}",
                ", ".join(map(str, (memory.key_dim, *memory.row_widths(config.hidden_size)))),
                f"{memory.top_k} · {memory.num_heads}",
            )
    return table
