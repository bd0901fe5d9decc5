"""`ultramem reproduce`: the papers' figures of inference speed, measured on the device at hand."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ultramem.cli.bench import Device, numbers, positive
from ultramem.cli.extras import explains_missing_packages
from ultramem.cli.loading import choose_device


class PaperFigure(StrEnum):
    """Figures of UltraMem (arXiv 2411.12364)."""

    figure1 = "figure1"
    figure6c = "figure6c"
    figure7 = "figure7"


@explains_missing_packages("drawing", "bench")
def reproduce(
    figure: Annotated[
        PaperFigure,
        typer.Argument(
            help="figure1: time and bytes of a decode step over the batch size; figure6c: over the sparse parameters; "
            "figure7: as figure1, for several sizes of model."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of the figure and its CSV; default: reproduced/FIGURE.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models, fewer points, shorter caches.")] = False,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", help="Sequences, comma-separated; default: the figure's.")
    ] = None,
    kv_length: Annotated[
        int | None, typer.Option("--kv-length", help="Tokens in the KV cache, where memory allows; default: 2048.")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", help="Runs of each point that count, at least 7.")] = 7,
    threads: Annotated[int | None, typer.Option("--threads", help="Threads; default: PyTorch's.")] = None,
    device: Device = None,
    restart: Annotated[bool, typer.Option("--restart", help="Measure anew what is there already.")] = False,
) -> None:
    """Measure decoding of dense, MoE and UltraMemV2 models at equal FLOPs and parameters, and draw it; resumes."""
    from ultramem.benchmarks.figures import make_plan
    from ultramem.benchmarks.report import check_runs
    from ultramem.benchmarks.reproduction import Reproduction

    check_runs(runs, threads)
    plan = make_plan(
        figure.value,
        quick,
        None if batch_sizes is None else numbers("--batch-sizes", batch_sizes),
        None if kv_length is None else positive("--kv-length", kv_length),
        runs,
        choose_device(device),
    )
    reproduction = Reproduction(plan, output or Path("reproduced") / figure.value, threads, restart)
    typer.echo(reproduction.opening)
    try:
        reproduction.measure()
    except KeyboardInterrupt:
        typer.echo(f"\nstopped: {reproduction.progress}; the same command goes on from there.", err=True)
        raise
    finally:
        if (file := reproduction.draw()) is not None:
            typer.echo(f"figure: {file}\npoints: {reproduction.store.file}")
