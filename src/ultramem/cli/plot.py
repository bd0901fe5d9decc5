"""`ultramem plot`: what runs recorded, as PNG files and one page, compared on one axis."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ultramem.cli.extras import explains_missing_packages
from ultramem.errors import ConfigError


class Axis(StrEnum):
    """What runs are compared over."""

    steps = "steps"
    tokens = "tokens"
    flops = "flops"


@explains_missing_packages("drawing", "train")
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of `ultramem train`.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the plots; default: `plots` in the run, or here for several runs.")
    ] = None,
    axis: Annotated[Axis, typer.Option(help="What the runs are drawn over.")] = Axis.steps,
) -> None:
    """Draw losses, throughput, rates and the memories' statistics: PNG files, and one page that holds them all."""
    from ultramem.evaluation.plots import load_metrics
    from ultramem.evaluation.run_page import write_page
    from ultramem.evaluation.run_plots import Run, check_axis

    folders = [run.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise ConfigError("A run is named twice: name each once.")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = list(map(str, runs))
    loaded = [Run(name, load_metrics(folder / "metrics.jsonl")) for name, folder in zip(names, folders, strict=True)]
    check_axis(loaded, axis.value)
    output = output or (runs[0] / "plots" if len(runs) == 1 else Path("plots"))
    try:
        output.mkdir(parents=True, exist_ok=True)
        page = write_page(loaded, axis.value, output)
    except OSError as error:
        raise ConfigError(
            f"The plots cannot be written to {output} ({error.strerror}): name another folder with --output."
        ) from error
    typer.echo(f"plots: {page}")
