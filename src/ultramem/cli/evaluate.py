"""`ultramem eval`: loss, perplexity, bits per byte, speed, factual recall and tasks of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultramem.cli.evaluate_tasks import evaluate_on_tasks, load_tasks
from ultramem.cli.json_files import check_writable, write_json
from ultramem.cli.loading import Precision, choose_device, find_model_folder, load_model, load_tokenizer, progress_bars

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ultramem.data.facts import Fact
    from ultramem.data.manifest import DataManifest
    from ultramem.evaluation.perplexity import PerplexityResult
    from ultramem.evaluation.recall import RecallReport

_MAX_DEFAULT_LENGTH_TOKENS = 1024


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A model folder, or a run folder (its newest model is taken).")],
    data: Annotated[
        Path | None, typer.Option(help="Folder that `ultramem data prepare` wrote: measure the loss on it.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval or offline_… ones, with commas between: offline_piqa,offline_hellaswag."),
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the data to measure the loss on.")] = "validation",
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window; default: the model's positions, at most 1024.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or requests of tasks, per forward pass.")] = 16,
    dtype: Annotated[Precision, typer.Option(help="Arithmetic of the matrix products.")] = Precision.fp32,
    max_tokens: Annotated[int | None, typer.Option(help="Predict only the first so many tokens.")] = None,
    recall: Annotated[
        bool | None,
        typer.Option("--recall/--no-recall", help="Country facts; default: if the data holds the Factbook."),
    ] = None,
    max_facts: Annotated[int, typer.Option(help="Ask a random sample of so many facts.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of that sample.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Ask only the first so many questions of each task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; default: what the task says.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: an accelerator if present.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers here as well.")] = None,
) -> None:
    """Measure a checkpoint: its loss on prepared data, how many country facts it recalls, its scores on tasks."""
    from ultramem.errors import ConfigError

    if json_file is not None:
        check_writable(json_file, "eval.json")
    if data is None and tasks is None:
        raise ConfigError(
            "nothing to measure: give --data FOLDER for the loss on prepared data, --tasks NAMES for scores on tasks "
            "(for example --tasks offline_piqa), or both."
        )
    folder = find_model_folder(checkpoint)
    part = _find_part(data, split) if data is not None else None
    loaded = load_tasks(folder, tasks) if tasks is not None else None
    model = load_model(folder, choose_device(device))
    numbers: dict[str, Any] = {"checkpoint": str(folder), "dtype": dtype.value, "device": str(model.device)}
    if part is not None:
        numbers |= _evaluate_on_data(
            model, folder, *part, sequence_length, batch_size, dtype, max_tokens, recall, max_facts, seed
        )
    if loaded is not None:
        numbers |= evaluate_on_tasks(model, folder, loaded, limit, num_fewshot, batch_size, dtype)
    if json_file is not None:
        write_json(json_file, numbers)


def _find_part(data: Path, split: str) -> tuple[DataManifest, str]:
    """The data folder's manifest, which has this split."""
    from ultramem.data.manifest import load_manifest
    from ultramem.evaluation.compatibility import split_of

    manifest = load_manifest(data)
    split_of(manifest, split)
    return manifest, split


def _evaluate_on_data(
    model: PreTrainedModel,
    folder: Path,
    manifest: DataManifest,
    split: str,
    sequence_length: int | None,
    batch_size: int,
    dtype: Precision,
    max_tokens: int | None,
    recall: bool | None,
    max_facts: int,
    seed: int,
) -> dict[str, Any]:
    """Measure and print what the options ask for on a data folder; returns the numbers for JSON."""
    from ultramem.evaluation.compatibility import check_same_vocabulary

    part = manifest.splits[split]
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
        "dtype": dtype.torch_dtype,
        "max_tokens": max_tokens,
    }
    with progress_bars() as progress:
        total_tokens = min(part.num_tokens, max_tokens or part.num_tokens)
        result = _measure_loss(model, options, progress, total_tokens)
        report = _measure_recall(model, *questions, max_facts, seed, progress) if questions else None
    numbers = {
        "data": str(manifest.folder),
        "data_fingerprint": manifest.fingerprint,
        "split": split,
        "sequence_length_tokens": sequence_length,
        **result.to_dict(),
        "recall": report.to_dict() if report else None,
    }
    heading = f"{folder} on {manifest.folder}, {split}"
    measured_as = f"{dtype.value}, windows of {sequence_length}, {model.device}"
    _print(heading, measured_as, result, report)
    return numbers


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


def _print(heading: str, measured_as: str, result: PerplexityResult, report: RecallReport | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=heading, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_row("tokens predicted", f"{result.num_tokens:,}")
    table.add_row("loss (nats per token)", f"{result.loss:.4f}")
    table.add_row("perplexity", f"{result.perplexity:,.2f}")
    table.add_row("bits per byte", "–" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}")
    table.add_row("tokens per second", f"{result.tokens_per_s:,.0f}")
    table.add_row("measured as", measured_as)
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
