"""`ultramem info`: what a checkpoint or a preset holds and costs; checkpoints are checked against their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ultramem.cli.json_files import check_writable, write_json
from ultramem.cli.loading import find_model_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ultramem.model import CostCard, UltraMemConfig
    from ultramem.model.inspection import WeightSummary

_BATCH_SIZES = (1, 16, 64)
_COMPARED_BATCH_SIZES = (1, 64)


class _Described(NamedTuple):
    """A model that was asked for; a preset has no folder and no weights."""

    name: str
    config: UltraMemConfig
    card: CostCard
    folder: Path | None
    weights: WeightSummary | None


def info(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="A model folder, a run folder (its newest model is taken), or the name of a preset "
            "(UltraMemConfig.from_preset). A path that exists wins.",
            show_default=False,
        ),
    ],
    compare: Annotated[bool, typer.Option("--compare", help="Print the models side by side.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here as well.")] = None,
) -> None:
    """Print what a model holds and costs, and its layers. A checkpoint is checked against the shapes of its tensors."""
    from rich.console import Console

    from ultramem.errors import ConfigError

    if json_file is not None:
        check_writable(json_file, "info.json")
    if len(models) > 1 and not compare:
        raise ConfigError(
            f"info describes one model, but {len(models)} were given ({', '.join(models)}): add --compare to print "
            "them side by side."
        )
    described = [_describe(model) for model in models]
    console = Console()
    if compare:
        _print_side_by_side(console, described)
    else:
        _print_one(console, described[0])
    if json_file is not None:
        write_json(json_file, {"models": [_numbers(model) for model in described]})


def _describe(model: str) -> _Described:
    """Read a checkpoint or a preset.

    Raises:
        CheckpointError: a path without a model, or a damaged one.
        ConfigError: a bare word that is neither a path nor a preset.
    """
    from ultramem.errors import ConfigError
    from ultramem.model import UltraMemConfig, cost_card
    from ultramem.model.inspection import check_weights, load_config
    from ultramem.model.presets import PRESETS, describe_presets

    path = Path(model)
    if not path.exists():
        if model in PRESETS:
            config = UltraMemConfig.from_preset(model)
            return _Described(model, config, cost_card(config), None, None)
        if path.name == model:
            raise ConfigError(f"{model!r} is neither a path that exists nor a preset; {describe_presets(model)}")
    folder = find_model_folder(path)
    config = load_config(folder)
    return _Described(model, config, cost_card(config), folder, check_weights(folder, config))


def _print_one(console: Console, model: _Described) -> None:
    console.print(_size_table(model))
    console.print(_layer_table(model.config))
    if (weights := model.weights) is None:
        text = "A preset: counted from its settings; there are no weights to compare with."
    else:
        text = (
            f"{weights.num_tensors} tensors in {weights.num_files} file(s), {weights.num_bytes:,} bytes "
            f"({', '.join(weights.dtypes)}): shapes and parameter counts agree with the configuration."
        )
    console.print(text, soft_wrap=True, highlight=False)


def _table_elements(card: CostCard) -> int:
    """Table elements that one token reads in all memories."""
    memory = card.config.memory_config
    return 0 if memory is None else card.num_memories * memory.table_elements_per_token(card.config.hidden_size)


def _ffn_text(config: UltraMemConfig) -> str:
    """The FFN of a block: its inner width, or how many experts of what width a token visits."""
    from ultramem.model.ffn import MoEFFNConfig

    ffn = config.ffn_config
    if not isinstance(ffn, MoEFFNConfig):
        return f"{config.intermediate_size}"
    return f"{ffn.num_experts_per_tok} of {ffn.num_experts} × {ffn.expert_size(config.intermediate_size)}"


def _size_table(model: _Described) -> Table:
    from rich.table import Table

    config, card = model.config, model.card
    table = Table(title=str(model.folder or f"preset {model.name}"), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_row("blocks, width", f"{config.num_hidden_layers}, {config.hidden_size}")
    table.add_row("attention heads, of keys and values", f"{config.num_attention_heads}, {config.num_key_value_heads}")
    table.add_row("vocabulary", f"{config.vocab_size:,}{' (tied)' if config.tie_word_embeddings else ''}")
    table.add_row("positions", f"{config.max_position_embeddings:,}")
    table.add_row("FFN, inner width", f"{config.ffn_config.type}, {_ffn_text(config)}")
    if (memory := config.memory_config) is not None:
        table.add_row("memory", f"{memory.type}, {memory.position}, {memory.tables} tables")
        table.add_row(
            "rows of the pool, shared by", f"{memory.num_rows(card.num_memories):,}, {card.num_memories} memories"
        )
    table.add_section()
    table.add_row("dense parameters", f"{card.dense_parameters:,}")
    table.add_row("expert parameters", f"{card.expert_parameters:,}")
    table.add_row("table parameters", f"{card.table_parameters:,}")
    table.add_row("total parameters", f"{card.total_parameters:,}")
    table.add_row("active parameters", f"{card.active_parameters:,}")
    table.add_section()
    table.add_row("FLOPs per token (no context)", f"{card.flops_per_token():,}")
    longest = config.max_position_embeddings
    table.add_row(f"FLOPs per token ({longest:,} tokens of context)", f"{card.flops_per_token(longest):,}")
    table.add_row("table elements read per token", f"{_table_elements(card):,}")
    for batch_size in _BATCH_SIZES:
        table.add_row(
            f"bytes read per decode step, batch {batch_size}, bf16", f"{card.bytes_per_decode_step(batch_size):,}"
        )
    return table


def _layer_table(config: UltraMemConfig) -> Table:
    from rich.table import Table

    memory, spans = config.memory_config, config.memory_spans
    ffn = _ffn_text(config)
    table = Table(title="blocks (memory: reads at a block → adds after a block)")
    table.add_column("block")
    table.add_column("FFN")
    for heading in ("memory", "slots", "keys", "key, value, pre-value dims", "top-k · heads"):
        table.add_column(heading, justify="right")
    for block in range(config.num_hidden_layers):
        here = [span for span in spans if span.start == block]
        if not here or memory is None:
            table.add_row(str(block), ffn, *["–"] * 5)
            continue
        side = memory.side(len(spans))
        for number, span in enumerate(here):
            table.add_row(
                *((str(block), "–" if block in config.replaced_blocks else ffn) if number == 0 else ("", "")),
                f"{span.start} → {span.end}",
                f"{side**2:,}",
                f"2 × {side:,}",
                ", ".join(map(str, (memory.key_dim, *memory.row_widths(config.hidden_size)))),
                f"{memory.top_k} · {memory.num_heads}",
            )
    return table


def _print_side_by_side(console: Console, models: list[_Described]) -> None:
    """One column per model; as many tables below each other as the console's width asks for."""
    from rich.measure import Measurement

    start = 0
    while start < len(models):
        end = len(models)
        while end > start + 1:
            table = _comparison_table(models[start:end])
            if Measurement.get(console, console.options.update(width=10_000), table).maximum <= console.width:
                break
            end -= 1
        console.print(_comparison_table(models[start:end]))
        start = end
    console.print(
        "2→4: reads at block 2, adds after block 4. FFN: inner width. FLOPs and table elements read: per token. Bytes: "
        "read to decode one token for each sequence of a batch, in bf16, without context. K, M, B, T: 10³ to 10¹².",
        highlight=False,
    )


def _comparison_table(models: list[_Described]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for model in models:
        # On two lines, so that columns stay narrow: family and member, or run folder and export.
        heading = model.name.replace("-", "-\n", 1) if model.folder is None else "/\n".join(model.folder.parts[-2:])
        table.add_column(heading, justify="right", overflow="fold")
    for rows in _comparison_rows(models):
        for label, cells in rows:
            table.add_row(label, *cells)
        table.add_section()
    return table


def _comparison_rows(models: list[_Described]) -> list[list[tuple[str, list[str]]]]:
    """Sections of labelled rows, one cell per model."""

    def counts(label: str, numbers: list[float]) -> tuple[str, list[str]]:
        return label, [_short(number) for number in numbers]

    configs, cards = [model.config for model in models], [model.card for model in models]
    what = [
        ("memory", [config.memory_config.type if config.memory_config else "–" for config in configs]),
        ("at blocks", [_placement_text(config) for config in configs]),
        ("tables", [config.memory_config.tables if config.memory_config else "–" for config in configs]),
        ("FFN", [_ffn_text(config) for config in configs]),
    ]
    parameters = [
        counts("dense parameters", [card.dense_parameters for card in cards]),
        counts("expert parameters", [card.expert_parameters for card in cards]),
        counts("table parameters", [card.table_parameters for card in cards]),
        counts("total parameters", [card.total_parameters for card in cards]),
        counts("active parameters", [card.active_parameters for card in cards]),
    ]
    costs = [
        counts("FLOPs, no context", [card.flops_per_token() for card in cards]),
        counts(
            "FLOPs, full",
            [card.flops_per_token(config.max_position_embeddings) for config, card in zip(configs, cards, strict=True)],
        ),
        ("full, in tokens", [f"{config.max_position_embeddings:,}" for config in configs]),
        counts("table elements", [_table_elements(card) for card in cards]),
    ]
    for batch_size in _COMPARED_BATCH_SIZES:
        costs.append(counts(f"bytes, batch {batch_size}", [card.bytes_per_decode_step(batch_size) for card in cards]))
    return [what, parameters, costs]


def _placement_text(config: UltraMemConfig) -> str:
    memory = config.memory_config
    if memory is None:
        return "–"
    if memory.placement == "every":
        text = "every"
    else:
        text = ", ".join(f"{a}" if a == b else f"{a}→{b}" for a, b in config.memory_spans)
    return f"{text}, no FFN" if memory.position == "replace" else text


def _short(number: float) -> str:
    """Four significant digits with K, M, B (10⁹) or T."""
    for power, suffix in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if number >= 10**power:
            return f"{number / 10**power:#.4g}".rstrip(".") + suffix
    return f"{number:.4g}"


def _numbers(model: _Described) -> dict[str, Any]:
    """All numbers of a model, for a file."""
    config, card = model.config, model.card
    longest = config.max_position_embeddings
    return {
        "name": model.name,
        "folder": str(model.folder) if model.folder else None,
        "num_blocks": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": longest,
        "memory": config.memory,
        "ffn": config.ffn,
        "intermediate_size": config.intermediate_size,
        "dense_parameters": card.dense_parameters,
        "expert_parameters": card.expert_parameters,
        "table_parameters": card.table_parameters,
        "total_parameters": card.total_parameters,
        "active_parameters": card.active_parameters,
        "flops_per_token": {"0": card.flops_per_token(), str(longest): card.flops_per_token(longest)},
        "table_elements_per_token": _table_elements(card),
        "bytes_per_decode_step_bf16": {str(size): card.bytes_per_decode_step(size) for size in _BATCH_SIZES},
    }
