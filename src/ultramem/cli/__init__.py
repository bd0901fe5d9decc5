"""The `ultramem` command: one thin module per verb.

The modules import OLMo-core, data sets and plots only when a verb needs them.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

import ultramem
from ultramem.cli import evaluate, generate, info, parity, plot, reproduce, train
from ultramem.cli.bench import bench_app
from ultramem.cli.data import data_app
from ultramem.errors import UltraMemError

INTERRUPTED_STATUS = 130
ERROR_STATUS = 2
OTHER_PROCESSES_WAIT_S = 5

app = typer.Typer(
    help="Language models with large, sparsely read memory tables: data, training, evaluation, text.",
    no_args_is_help=True,
    # A traceback that a user meets is a bug of ours: shown in full and plain, as the bug report needs it.
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench", no_args_is_help=True)
app.command("train")(train.train)
app.command("plot")(plot.plot)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("info")(info.info)
app.command("parity")(parity.parity)
app.command("reproduce")(reproduce.reproduce)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ultramem {ultramem.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@contextmanager
def _first_process_speaks() -> Iterator[None]:
    """Of an error that ends all processes of a run, the first tells; torchrun ends the others while they wait here."""
    try:
        yield
    except Exception:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(OTHER_PROCESSES_WAIT_S)
        raise


def main() -> None:
    """Run the command line; an error meant for the user is one red line on stderr, and status 2."""
    try:
        with _first_process_speaks():
            app(prog_name="ultramem")
    except UltraMemError as error:
        from rich.console import Console

        message = " ".join(str(error).split())
        Console(stderr=True).print(f"Error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_STATUS)
