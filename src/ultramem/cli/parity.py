"""`ultramem parity`: our layers against fixtures of the published implementations."""

from pathlib import Path
from typing import Annotated

import typer

from ultramem.cli.loading import choose_device


def parity(
    files: Annotated[
        list[Path], typer.Argument(help="Fixtures (*.safetensors), for example tests/golden/*.safetensors")
    ],
    device: Annotated[str, typer.Option(help="Where the layers run: cpu, cuda, cuda:1 …")] = "cpu",
) -> None:
    """Compare our layers with fixtures of published implementations; exit 1 if one differs, 2 if one cannot be used.

    Prints a line per file: the largest absolute error of the output and of the gradients.
    """
    from ultramem.errors import CheckpointError
    from ultramem.evaluation.parity import check_fixture

    where = choose_device(device)
    failed = unusable = 0
    for path in files:
        try:
            report = check_fixture(path, where)
        except CheckpointError as error:
            typer.echo(f"{path.name}: ERROR: {' '.join(str(error).split())}")
            unusable += 1
            continue
        verdict = "ok" if not report.failures else "FAILED: " + "; ".join(report.failures)
        typer.echo(f"{path.name}: output {report.output_error:.2e}, gradients {report.gradient_error:.2e}, {verdict}")
        failed += bool(report.failures)
    if failed:
        typer.echo(f"{failed} of {len(files)} fixtures failed (pass mark: 1e-5 + 1e-4 relative).", err=True)
    if unusable:
        typer.echo(f"{unusable} of {len(files)} files could not be compared.", err=True)
    if failed or unusable:
        raise typer.Exit(2 if unusable else 1)
