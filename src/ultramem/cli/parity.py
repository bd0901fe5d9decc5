"""`ultramem parity`: our layers against fixtures of the published implementations."""

from pathlib import Path
from typing import Annotated

import typer


def parity(
    files: Annotated[
        list[Path], typer.Argument(help="Fixtures (*.safetensors), for example tests/golden/*.safetensors")
    ],
) -> None:
    """Compare our layers with fixtures of published implementations; exit 1 if one differs.

    Prints a line per file: the largest absolute error of the output and of the gradients.
    """
    from ultramem.evaluation.parity import check_fixture

    failed = 0
    for path in files:
        report = check_fixture(path)
        verdict = "ok" if not report.failures else "FAILED: " + "; ".join(report.failures)
        typer.echo(f"{path.name}: output {report.output_error:.2e}, gradients {report.gradient_error:.2e}, {verdict}")
        failed += bool(report.failures)
    if failed:
        typer.echo(f"{failed} of {len(files)} fixtures failed (pass mark: 1e-5 + 1e-4 relative).", err=True)
        raise typer.Exit(1)
