"""The demo's comparison: a table in the terminal, and report.md with plots."""

import platform
import statistics
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ultramem.evaluation import plots, run_plots
from ultramem.files import staged_file
from ultramem.model import CostCard, UltraMemConfig, cost_card

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"UltraMemV2": "configs/demo.yaml", "dense twin": "configs/demo_dense.yaml"}
MAX_USAGE_TOKENS = 50_000


@dataclass
class Model:
    """One trained model and what was measured of it.

    Attributes:
        name: a key of `MODELS`.
        run: its run folder, as given.
        folder: its model folder.
        metrics: rows of its run's metrics.jsonl.
        training_s: wall-clock seconds of `ultramem train` this time; little where the run was finished already.
        evaluation: what `ultramem eval --json` wrote.
        continuations: prompt → prompt and continuation.
    """

    name: str
    run: Path
    folder: Path
    metrics: list[dict[str, Any]]
    training_s: float
    evaluation: dict[str, Any] = field(default_factory=dict)
    continuations: dict[str, str] = field(default_factory=dict)

    @property
    def card(self) -> CostCard:
        """Sizes and costs."""
        return cost_card(UltraMemConfig.from_pretrained(self.folder))


@dataclass
class Settings:
    """How the demo was run; `data` is relative to the repository's root unless absolute."""

    data: Path
    output: Path
    sequence_length_tokens: int
    num_facts: int
    overrides: list[str]
    peak_memory_bytes: int = 0
    duration_s: float = 0.0


def comparison(models: list[Model], sequence_length_tokens: int) -> list[tuple[str, list[str]]]:
    """Rows of the table: what is compared, and one text per model."""

    def row(heading: str, text_of: Any) -> tuple[str, list[str]]:
        return heading, [text_of(model) for model in models]

    def recall_of(key: str) -> Any:
        def text_of(model: Model) -> str:
            total = model.evaluation["recall"]["total"]
            error = total[f"{key}_error"]
            return f"{100 * total[key]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")

        return text_of

    total = models[0].evaluation["recall"]["total"]
    return [
        row("dense parameters", lambda model: f"{model.card.dense_parameters:,}"),
        row("table parameters", lambda model: f"{model.card.table_parameters:,}"),
        row("FLOPs per token", lambda model: f"{model.card.flops_per_token(sequence_length_tokens // 2):,}"),
        row("training tokens", lambda model: f"{plots.series(model.metrics, plots.TOKENS)[1][-1]:,.0f}"),
        row(
            "training tokens/s (median)",
            lambda model: f"{statistics.median(plots.series(model.metrics, plots.SPEED)[1]):,.0f}",
        ),
        row("validation loss (nats per token)", lambda model: f"{model.evaluation['loss']:.4f}"),
        row("bits per byte", lambda model: f"{model.evaluation['bits_per_byte']:.4f}"),
        row(f"right answer first, % (chance {100 * total['chance_at_1']:.1f})", recall_of("accuracy_at_1")),
        row(f"within the first 10, % (chance {100 * total['chance_at_10']:.1f})", recall_of("accuracy_at_10")),
        row(
            f"reciprocal rank × 100 (chance {100 * total['chance_reciprocal_rank']:.1f})",
            recall_of("mean_reciprocal_rank"),
        ),
    ]


def verdict(models: list[Model]) -> str:
    """One sentence on who is ahead."""
    memory, dense = (model.evaluation["loss"] for model in models)
    place = f"ahead by {dense - memory:.4f}" if memory < dense else f"behind by {memory - dense:.4f}"
    return f"At equal FLOPs per token and equal tokens, the memory model is {place} nats per token."


def print_table(console: Console, models: list[Model], sequence_length_tokens: int) -> None:
    """Show the comparison in the terminal."""
    table = Table("", *(model.name for model in models), title="\nUltraMemV2 and its dense twin")
    for column in table.columns[1:]:
        column.justify = "right"
    for heading, texts in comparison(models, sequence_length_tokens):
        table.add_row(heading, *texts)
    console.print(table)
    console.print(verdict(models))


def draw_plots(models: list[Model], settings: Settings) -> None:
    """Write the PNG files beside the report."""
    from ultramem.cli.loading import choose_device, load_model
    from ultramem.data.manifest import load_manifest
    from ultramem.evaluation.usage import count_slot_reads

    manifest = load_manifest(ROOT / settings.data)
    memory_model = load_model(models[0].folder, choose_device(None))
    counts = count_slot_reads(
        memory_model,
        manifest.splits["validation"].files,
        token_dtype=manifest.dtype,
        sequence_length_tokens=settings.sequence_length_tokens,
        max_tokens=MAX_USAGE_TOKENS,
    )
    runs = [run_plots.Run(model.name, model.metrics) for model in models]
    figures = {
        "loss.png": run_plots.plot_losses(runs, "tokens"),
        "coverage.png": run_plots.plot_memories(runs, "steps", "coverage"),
        "usage.png": plots.plot_usage(counts),
        "recall.png": plots.plot_recall({model.name: model.evaluation["recall"] for model in models}),
    }
    for name, figure in figures.items():
        plots.save(figure, settings.output / name)


def write_report(models: list[Model], settings: Settings) -> Path:
    """Draw the plots and write report.md; returns its path."""
    settings.output.mkdir(parents=True, exist_ok=True)
    draw_plots(models, settings)
    num_facts = models[0].evaluation["recall"]["total"]["num_facts"]
    lines = [
        "# UltraMemV2 and its dense twin",
        "",
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, {describe_device()}. The whole demo took "
        f"{settings.duration_s / 60:.1f} minutes, of which training "
        + " and ".join(f"{model.training_s / 60:.1f} ({model.name})" for model in models)
        + f"; no step held more than {settings.peak_memory_bytes / 2**30:.2f} GiB of memory.",
        "",
        "Both models read the same batches of the same text (CIA World Factbook and lead paragraphs of Wikipedia), "
        "and cost the same FLOPs per token: what the memory layers cost, the dense twin spends on a wider FFN.",
        "",
        "| | " + " | ".join(model.name for model in models) + " |",
        "|---|" + "---:|" * len(models),
        *(
            f"| {heading} | " + " | ".join(texts) + " |"
            for heading, texts in comparison(models, settings.sequence_length_tokens)
        ),
        "",
        verdict(models),
        "",
        "![Training and validation loss](loss.png)",
        "",
        "## Memories",
        "",
        "How many of a memory's slots were read at all between two reports of the training run:",
        "",
        "![Slots read during training](coverage.png)",
        "",
        "How evenly the trained model reads them on the validation text:",
        "",
        "![Reads per slot on the validation text](usage.png)",
        "",
        "## Factual recall",
        "",
        f"{num_facts} country facts from the Factbook, each asked in phrasings that the training text does "
        "not contain. The right answer is ranked among the other answers of its relation by how much naming the "
        "country raises its probability (pointwise mutual information), so that a model that ignores the country "
        "scores at chance. ± is one standard error over facts.",
        "",
        "![Factual recall per relation](recall.png)",
        "",
        "## Continuations",
        "",
        "Temperature 0.7, top-p 0.9, seed 1.",
        "",
    ]
    for prompt in models[0].continuations:
        for model in models:
            quoted = "\n".join(f"> {line}" for line in model.continuations[prompt].splitlines())
            lines += [f"**{model.name}**", "", quoted, ""]
    lines += ["## Commands", "", "```", *commands(models, settings), "```", ""]
    report = settings.output / "report.md"
    with staged_file(report) as stage:
        stage.write_text("\n".join(lines), encoding="utf-8")
    return report


def commands(models: list[Model], settings: Settings) -> list[str]:
    """What reproduces the numbers, from the repository's root."""
    lines = [f"ultramem data prepare factbook wikipedia-leads --tokenizer train:4096 --output {settings.data}"]
    for model in models:
        words = [MODELS[model.name], *settings.overrides, f"run.save_folder={model.run}"]
        lines.append(f"ultramem train {' '.join(words)}")
        lines.append(
            f"ultramem eval {model.run} --data {settings.data} --sequence-length {settings.sequence_length_tokens} "
            f"--recall --max-facts {settings.num_facts}"
        )
    return lines


def describe_device() -> str:
    """Processor, threads and library versions."""
    import torch
    import transformers

    cpu_info = Path("/proc/cpuinfo")
    described = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in described if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{processor}{accelerator}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
