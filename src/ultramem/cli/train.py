"""``ultramem train``: one YAML file and overrides to a trained model."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ultramem.cli.extras import explains_missing_packages


@explains_missing_packages("training", "train")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, e.g. configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that win over the file, e.g. optimizer.lr=0.001.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config, sizes, FLOPs and memory, and stop.")
    ] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="With --dry-run: figures of one of so many processes.")
    ] = 1,
    scale: Annotated[
        str | None, typer.Option("--scale", help="`tiny` shrinks the run to seconds, in the folder NAME-tiny.")
    ] = None,
    show_sequences: Annotated[
        str | None,
        typer.Option(
            "--show-sequences",
            metavar="EPOCH:FIRST-LAST",
            help="Print training sequences, e.g. 1:128-143, by their place in the order of the run, and stop.",
        ),
    ] = None,
) -> None:
    """Train a language model; the same command again resumes from the newest complete checkpoint."""
    # OLMo-core takes seconds to import.
    from ultramem.training.run import resolve_config
    from ultramem.training.run import train as run_training

    if dry_run:
        from ultramem.training.dry_run import print_dry_run, resolve_dry_run

        print_dry_run(*resolve_dry_run(config, overrides or [], scale), processes)
        return
    resolved = resolve_config(config, overrides or [], scale)
    if show_sequences is not None:
        from ultramem.training.sequences import print_sequences

        print_sequences(*resolved, show_sequences)
        return
    model_folder = run_training(*resolved)
    if model_folder is not None and os.environ.get("RANK", "0") == "0":
        typer.echo(f"model: {model_folder}")
