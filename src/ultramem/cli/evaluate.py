"""`ultramem eval`: loss, perplexity, bits per byte, speed and factual recall of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultramem.cli.json_files import check_writable, write_json
from ultramem.cli.loading import Precision, choose_device, find_model_folder, load_model, load_tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultramem.data.facts import Fact
    from ultramem.evaluation.perplexity import PerplexityResult
    from ultramem.evaluation.recall import RecallReport

_MAX_DEFAULT_LENGTH_TOKENS = 1024


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, or a run folder (its newest model is taken).")],
    data: Annotated[Path, typer.Option(help="Folder that `ultramem data prepare` wrote.")],
    split: Annotated[str, typer.Option(help="Part of the data to measure the loss on.")] = "validation",
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window; default: the model's positions, at most 1024.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 16,
    dtype: Annotated[Precision, typer.Option(help="Arithmetic of the matrix products.")] = Precision.fp32,
    max_tokens: Annotated[int | None, typer.Option(help="Predict only the first so many tokens.")] = None,
    recall: Annotated[
        bool | None,
        typer.Option("--recall/--no-recall", help="Country facts; default: if the data holds the Factbook."),
    ] = None,
    max_facts: Annotated[int, typer.Option(help="Ask a random sample of so many facts.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of that sample.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: an accelerator if present.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here as well.")] = None,
) -> None:
    """Measure the loss, perplexity and bits per byte of a checkpoint, and how many country facts it recalls."""
    import torch

    from ultramem.data.manifest import load_manifest
    from ultramem.evaluation.compatibility import check_same_vocabulary, split_of

    if json_file is not None:
        check_writable(json_file, "eval.json")
    folder = find_model_folder(checkpoint)
    manifest = load_manifest(data)
    part = split_of(manifest, split)
    model = load_model(folder, choose_device(device))
    check_same_vocabulary(folder, model.config.vocab_size, manifest)
    sequence_length = _choose_sequence_length(sequence_length, model.config.max_position_embeddings)
    if recall is None:
        recall = "factbook" in manifest.sources
    questions = _prepare_recall(folder, max_facts) if recall else None
    options = {
        "token_files": part.files,
        "token_dtype": manifest.dtype,
        "sequence_length_tokens": sequence_length,
        "batch_size": batch_size,
        "bytes_per_token": part.bytes_per_token if part.num_tokens else None,
        "dtype": torch.bfloat16 if dtype is Precision.bf16 else torch.float32,
        "max_tokens": max_tokens,
    }
    with _progress() as progress:
        total_tokens = min(part.num_tokens, max_tokens or part.num_tokens)
        result = _measure_loss(model, options, progress, total_tokens)
        report = _measure_recall(model, *questions, max_facts, seed, progress) if questions else None
    numbers = {
        "checkpoint": str(folder),
        "data": str(data),
        "data_fingerprint": manifest.fingerprint,
        "split": split,
        "sequence_length_tokens": sequence_length,
        "dtype": dtype.value,
        "device": str(model.device),
        **result.to_dict(),
        "recall": report.to_dict() if report else None,
    }
    _print(numbers, result, report)
    if json_file is not None:
        write_json(json_file, numbers)


def _choose_sequence_length(given: int | None, num_positions: int) -> int:
    from ultramem.errors import ConfigError

    if given is None:
        return min(num_positions, _MAX_DEFAULT_LENGTH_TOKENS)
    if given > num_positions:
        raise ConfigError(
            f"--sequence-length {given} is more than the {num_positions} positions of the model "
            f"(max_position_embeddings): give at most {num_positions}."
        )
    return given


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def _measure_loss(
    model: PreTrainedModel, options: dict[str, Any], progress: Progress, total_tokens: int
) -> PerplexityResult:
    from ultramem.evaluation.perplexity import evaluate_perplexity

    task = progress.add_task("loss", total=total_tokens)
    return evaluate_perplexity(model, progress=lambda num_tokens: progress.advance(task, num_tokens), **options)


def _prepare_recall(folder: Path, max_facts: int) -> tuple[PreTrainedTokenizerBase, list[Fact]]:
    """What the questions need: read before anything is measured, so that what is missing is said at once."""
    from ultramem.data.facts import load_facts
    from ultramem.errors import ConfigError

    if max_facts < 1:
        raise ConfigError(f"--max-facts {max_facts}: give at least 1, or --no-recall to ask none.")
    return load_tokenizer(folder), load_facts()


def _measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: list[Fact],
    max_facts: int,
    seed: int,
    progress: Progress,
) -> RecallReport:
    from ultramem.data.facts import PHRASINGS
    from ultramem.evaluation.recall import evaluate_recall

    task = progress.add_task("recall", total=min(len(facts), max_facts))
    return evaluate_recall(
        model,
        tokenizer,
        facts,
        PHRASINGS,
        max_facts=max_facts,
        seed=seed,
        progress=lambda num_facts: progress.advance(task, num_facts),
    )


def _print(numbers: dict[str, Any], result: PerplexityResult, report: RecallReport | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{numbers['checkpoint']} on {numbers['data']}, {numbers['split']}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_row("tokens predicted", f"{result.num_tokens:,}")
    table.add_row("loss (nats per token)", f"{result.loss:.4f}")
    table.add_row("perplexity", f"{result.perplexity:,.2f}")
    table.add_row("bits per byte", "–" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}")
    table.add_row("tokens per second", f"{result.tokens_per_s:,.0f}")
    table.add_row(
        "measured as", f"{numbers['dtype']}, windows of {numbers['sequence_length_tokens']}, {numbers['device']}"
    )
    console.print(table)
    if report is None:
        return
    headings = ("relation", "facts", "answers", "first, %", "in first 10, %", "1 / rank, × 100")
    table = Table(title="factual recall: mean ± standard error (chance)", box=SIMPLE, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "relation" else "right", no_wrap=True)
    for name, one in [*report.relations.items(), ("all", report.total)]:
        if name == "all":
            table.add_section()
        table.add_row(
            name,
            str(one.num_facts),
            f"{one.num_candidates:.0f}",
            _percent(one.accuracy_at_1, one.accuracy_at_1_error, one.chance_at_1),
            _percent(one.accuracy_at_10, one.accuracy_at_10_error, one.chance_at_10),
            _percent(one.mean_reciprocal_rank, one.mean_reciprocal_rank_error, one.chance_reciprocal_rank),
        )
    console.print(table)


def _percent(mean: float, error: float | None, chance: float) -> str:
    """``12.3±1.4 (0.5)``; a single fact has no error."""
    return f"{100 * mean:.1f}" + ("" if error is None else f"±{100 * error:.1f}") + f" ({100 * chance:.1f})"
