"""`make demo`: an UltraMemV2 language model beside its dense twin, from text to a report.

Everything goes through the command line as a user would type it. Text that is prepared and models that are trained are
taken as they are; a run that was interrupted goes on.
"""

import json
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from report import MODELS, ROOT, Model, Settings, print_table, write_report
from rich.console import Console

PROMPTS = ("Norway / Capital / name:", "Kenya is a country", "The largest planet")
MAX_FLOPS_DIFFERENCE = 0.01

console = Console(highlight=False)


def ultramem(*arguments: object, capture: bool = False) -> str:
    """Run one command from the repository's root, showing it first; its standard output where `capture` is set."""
    words = [str(argument) for argument in arguments]
    if not capture:
        console.print(f"\n[bold]$ ultramem {shlex.join(words)}[/bold]", soft_wrap=True)
    interrupts: list[int] = []
    # Ctrl-C reaches the command too, and training then saves: it is waited for, not killed.
    previous = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    command = [sys.executable, "-m", "ultramem.cli", *words]
    try:
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True) as process:
            output = process.communicate()[0]
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupts:
        raise SystemExit(128 + signal.SIGINT)
    if process.returncode:
        raise SystemExit(f"`ultramem {words[0]}` ended with status {process.returncode}")
    return output or ""


def check_comparable(config_files: dict[str, Path], overrides: list[str]) -> tuple[int, int]:
    """Stop unless the models cost the same per token and read the same text.

    Returns:
        Length of a training window in tokens, and steps of each run.
    """
    from ultramem.errors import UltraMemError
    from ultramem.model import cost_card
    from ultramem.training.run import model_config, resolve_config

    try:
        configs = {name: resolve_config(file, overrides)[0] for name, file in config_files.items()}
        cards = {name: cost_card(model_config(config)) for name, config in configs.items()}
    except UltraMemError as error:
        raise SystemExit(f"Error: {error}") from None
    read = {(config.data.sequence_length_tokens, config.num_steps, config.num_tokens) for config in configs.values()}
    if len(read) > 1:
        raise SystemExit(f"the models do not read the same text (window, steps, tokens): {sorted(read)}")
    length_tokens, num_steps, _ = read.pop()
    # A token attends to half of its window on average.
    flops = {name: card.flops_per_token(length_tokens // 2) for name, card in cards.items()}
    if max(flops.values()) > (1 + MAX_FLOPS_DIFFERENCE) * min(flops.values()):
        raise SystemExit(f"the models differ by more than {MAX_FLOPS_DIFFERENCE:.0%} in FLOPs per token: {flops}")
    return length_tokens, num_steps


def train(name: str, config: Path, folder: Path, overrides: list[str], num_steps: int) -> Model:
    """Train one model, or go on with it, and measure it."""
    from ultramem.evaluation.plots import load_metrics
    from ultramem.model.folders import resolve_model_folder

    start_s = time.perf_counter()
    ultramem("train", config.relative_to(ROOT), *overrides, f"run.save_folder={folder}")
    seconds = time.perf_counter() - start_s
    model_folder = resolve_model_folder(ROOT / folder)
    if model_folder.name != f"step{num_steps}-hf":
        raise SystemExit(f"{folder} stopped at {model_folder.name} of {num_steps} steps; start the demo again to go on")
    metrics = load_metrics(ROOT / folder / "metrics.jsonl")
    return Model(name, folder, model_folder, metrics, seconds)


def evaluate(model: Model, data: Path, settings: Settings) -> None:
    """Fill in the loss and the recall."""
    file = ROOT / model.run / "evaluation.json"
    ultramem(
        "eval", model.run, "--data", data, "--sequence-length", settings.sequence_length_tokens,
        "--recall", "--max-facts", settings.num_facts, "--json", file,
    )  # fmt: skip
    model.evaluation = json.loads(file.read_text(encoding="utf-8"))


def generate(model: Model) -> None:
    """Fill in a few continuations."""
    for prompt in PROMPTS:
        arguments = ["generate", model.folder, "--prompt", prompt, "--max-new-tokens", 60]
        arguments += ["--temperature", 0.7, "--top-p", 0.9, "--seed", 1]
        model.continuations[prompt] = ultramem(*arguments, capture=True).strip()
        console.print(f"\n[bold]{model.name}[/bold]: ", end="")
        console.print(model.continuations[prompt], markup=False, soft_wrap=True)


def main(
    data: Annotated[Path, typer.Option(help="Where the token files are or go.")] = Path("data/demo"),
    runs: Annotated[Path, typer.Option(help="Where the two runs are or go.")] = Path("runs"),
    output: Annotated[Path, typer.Option(help="Where report.md and its plots go.")] = Path("demo"),
    facts: Annotated[int, typer.Option(help="How many country facts are asked.")] = 800,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings for both runs, e.g. training.max_steps=20")
    ] = None,
) -> None:
    """Prepare the text, train both models, evaluate them, and write the report."""
    started_s = time.perf_counter()
    overrides = [*(overrides or []), f"data.folder={data}"]
    ultramem("data", "prepare", "factbook", "wikipedia-leads", "--tokenizer", "train:4096", "--output", data)
    config_files = {name: ROOT / file for name, file in MODELS.items()}
    length_tokens, num_steps = check_comparable(config_files, overrides)
    models = [train(name, file, runs / file.stem, overrides, num_steps) for name, file in config_files.items()]
    settings = Settings(data, ROOT / output, length_tokens, num_facts=facts, overrides=overrides)
    for model in models:
        evaluate(model, data, settings)
    console.print("\n[bold]Continuations[/bold] (temperature 0.7, top-p 0.9, seed 1)")
    for model in models:
        generate(model)
    settings.peak_memory_bytes = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    settings.duration_s = time.perf_counter() - started_s
    print_table(console, models, length_tokens)
    report = write_report(models, settings)
    console.print(f"\nThe report with its plots: {report}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
