"""`ultramem bench`: speed beside real peers, judged by the project's targets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ultramem.cli.extras import explains_missing_packages
from ultramem.cli.json_files import check_writable, write_json
from ultramem.cli.loading import choose_device

if TYPE_CHECKING:
    import torch

    from ultramem.benchmarks.cases import Case
    from ultramem.benchmarks.measure import Tick

bench_app = typer.Typer(help="Measure speed beside other implementations, in turns within one process.")

Runs = Annotated[int, typer.Option("--runs", help="Runs of each competitor that count, at least 7.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads; default: PyTorch's.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 …; default: an accelerator if present. Targets are for CPUs."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all numbers here as well.")]
UseCompile = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Measure torch.compile too; it takes a while.")
]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of one call. Targets are judged at the defaults.")]


class TableType(StrEnum):
    """Types of tables that kernels read."""

    fp32 = "fp32"
    bf16 = "bf16"


@bench_app.command("op")
def bench_op(
    tokens: Tokens = 2048,
    rows: Annotated[int, typer.Option("--rows", help="Rows of the tables.")] = 1_300_000,
    width: Annotated[int, typer.Option("--width", help="Width of values and of pre-values.")] = 192,
    top_k: Annotated[int, typer.Option("--top-k", help="Rows that a token reads.")] = 32,
    growth_rows: Annotated[
        str, typer.Option("--growth-rows", help="Two table sizes, of width 32 + 32, that are compared.")
    ] = "1048576,16777216",
    dtype: Annotated[
        TableType, typer.Option("--dtype", help="Of tables and token vectors. Targets are judged at fp32.")
    ] = TableType.fp32,
    runs: Runs = 9,
    threads: Threads = None,
    use_compile: UseCompile = True,
    json_file: JsonFile = None,
) -> None:
    """Lookups, gradients of tables and the search: our kernels, plain PyTorch, torch.compile, F.embedding_bag."""
    from ultramem.benchmarks.operators import OperatorSizes, run_operators

    small, large = numbers("--growth-rows", growth_rows, exactly=2)
    sizes = OperatorSizes(
        num_rows=positive("--rows", rows),
        width=positive("--width", width),
        top_k=positive("--top-k", top_k),
        num_tokens=positive("--tokens", tokens),
        growth_rows=(small, large),
        dtype=dtype.value,
    )
    _run("op", lambda runs, tick: run_operators(sizes, runs, use_compile, tick), runs, threads, json_file)


@bench_app.command("layer")
def bench_layer(
    tokens: Tokens = 2048,
    hidden_size: Annotated[int, typer.Option("--hidden-size", help="Width of the model.")] = 512,
    num_keys: Annotated[int, typer.Option("--num-keys", help="Keys per side of UltraMemV2: n² rows.")] = 512,
    product_keys: Annotated[int, typer.Option("--product-keys", help="Keys per side of PKM and PEER.")] = 256,
    product_tokens: Annotated[int, typer.Option("--product-tokens", help="Tokens of PKM and PEER.")] = 512,
    runs: Runs = 7,
    threads: Threads = None,
    use_compile: UseCompile = True,
    json_file: JsonFile = None,
) -> None:
    """Memory layers forward and backward: ours on each backend, ultra-mem, PEER-pytorch, product-key-memory."""
    from ultramem.benchmarks.memory_layers import LayerSizes, run_layers

    sizes = LayerSizes(
        hidden_size=positive("--hidden-size", hidden_size),
        num_keys=positive("--num-keys", num_keys),
        num_tokens=positive("--tokens", tokens),
        product_keys=positive("--product-keys", product_keys),
        product_tokens=positive("--product-tokens", product_tokens),
    )
    _run("layer", lambda runs, tick: run_layers(sizes, runs, use_compile, tick), runs, threads, json_file)


@bench_app.command("decode")
def bench_decode(
    batch_sizes: Annotated[str, typer.Option("--batch-sizes", help="Sequences, comma-separated.")] = "1,4,16,64,256",
    kv_length: Annotated[int, typer.Option("--kv-length", help="Tokens in the KV cache of each sequence.")] = 128,
    family: Annotated[
        str,
        typer.Option("--family", help="Presets that are compared: tiny, small, base, 227m or 1b (docs/presets.md)."),
    ] = "base",
    layers: Annotated[int, typer.Option("--layers", help="Blocks of the models; 0 for the family's own.")] = 8,
    runs: Runs = 9,
    threads: Threads = None,
    device: Device = None,
    json_file: JsonFile = None,
) -> None:
    """One decode step in bf16: UltraMemV2, its dense and MoE twins, Olmo2ForCausalLM, OlmoeForCausalLM.

    On a CUDA device every model's step is captured in a CUDA graph.
    """
    from ultramem.benchmarks.decoding import DecodeSizes, run_decoding

    sizes = DecodeSizes(
        family=family,
        num_layers=positive("--layers", layers) if layers else None,
        batch_sizes=numbers("--batch-sizes", batch_sizes),
        kv_length_tokens=positive("--kv-length", kv_length),
    )
    where = choose_device(device)
    _run("decode", lambda runs, tick: run_decoding(sizes, runs, tick, device=where), runs, threads, json_file, where)


@bench_app.command("train")
@explains_missing_packages("the training benchmark", "train")
def bench_train(
    sequences: Annotated[int, typer.Option("--sequences", help="Sequences of one step.")] = 16,
    length: Annotated[int, typer.Option("--length", help="Tokens of each.")] = 128,
    fp32: Annotated[bool, typer.Option("--fp32", help="Arithmetic in fp32 instead of bf16.")] = False,
    runs: Runs = 15,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """A training step of the demo's size: the memory model, with both kinds of table gradients, and its dense twin."""
    from ultramem.benchmarks.training_step import TrainSizes, run_training

    sizes = TrainSizes(positive("--sequences", sequences), positive("--length", length), bf16=not fp32)
    _run("train", lambda runs, tick: run_training(sizes, runs, tick), runs, threads, json_file)


def _run(
    name: str,
    run: "Callable[[int, Tick | None], list[Case]]",
    runs: int,
    threads: int | None,
    json_file: Path | None,
    device: "torch.device | None" = None,
) -> None:
    from rich.console import Console

    from ultramem.benchmarks.measure import CPU_DEVICE
    from ultramem.benchmarks.report import check_runs, print_report, run_benchmark

    check_runs(runs, threads)
    if json_file is not None:
        check_writable(json_file, f"bench-{name}.json")
    with spinner() as tick:
        report = run_benchmark(name, run, runs, threads, tick, device=device or CPU_DEVICE)
    print_report(report, Console())
    if json_file is not None:
        write_json(json_file, report.to_dict())


@contextmanager
def spinner() -> "Iterator[Tick]":
    """A line on stderr that says what was just measured."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Redrawn only between runs: a thread that draws would take its time from what is measured.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("peak read bandwidth")

        def tick(what: str) -> None:
            progress.update(task, description=what, refresh=True)

        progress.refresh()
        yield tick


def positive(option: str, number: int) -> int:
    """The number, which must be at least 1. Raises ConfigError."""
    from ultramem.errors import ConfigError

    if number < 1:
        raise ConfigError(f"{option} must be at least 1; got {number}.")
    return number


def numbers(option: str, text: str, exactly: int | None = None) -> tuple[int, ...]:
    """Whole numbers, at least 1, from a comma-separated list. Raises ConfigError."""
    from ultramem.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts) or exactly not in (None, len(parts)):
        count = "comma-separated numbers" if exactly is None else f"{exactly} comma-separated numbers"
        raise ConfigError(f"{option} takes {count}, each at least 1, for example 1,16; got {text!r}.")
    return tuple(map(int, parts))
