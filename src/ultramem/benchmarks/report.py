"""One benchmark from start to end: device and bandwidth, cases, judgement by the targets; as JSON and as tables."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ultramem.benchmarks.cases import Case
from ultramem.benchmarks.measure import (
    BANDWIDTH_BUFFER_BYTES,
    CPU_DEVICE,
    MIN_RUNS,
    Tick,
    describe_device,
    peak_read_bandwidth,
    use_threads,
)
from ultramem.benchmarks.targets import Verdict, judge
from ultramem.errors import ConfigError

# Above so many running programs per thread that is free, times are of little worth.
IDLE_LOAD = 0.5
# Columns of words, which may be broken into lines; the others are numbers.
WORDS = ("competitor", "target", "verdict")


@dataclass(frozen=True)
class Report:
    """What a benchmark found.

    Attributes:
        benchmark: ``op``, ``layer``, ``decode`` or ``train``.
        device: see `ultramem.benchmarks.measure.describe_device`.
        num_runs: runs that count, of each competitor.
        peak_bytes_per_s: read bandwidth of the same run.
        cases: what was measured.
        verdicts: the targets with the measured ratios.
    """

    benchmark: str
    device: dict[str, Any]
    num_runs: int
    peak_bytes_per_s: float
    cases: list[Case]
    verdicts: list[Verdict]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "benchmark": self.benchmark,
            "device": self.device,
            "num_runs": self.num_runs,
            "order": "competitors alternate within one process",
            "peak_read_bytes_per_s": self.peak_bytes_per_s,
            "cases": [case.to_dict(self.peak_bytes_per_s) for case in self.cases],
            "targets": [verdict.to_dict() for verdict in self.verdicts],
        }


def run_benchmark(
    benchmark: str,
    run: Callable[[int, Tick | None], list[Case]],
    num_runs: int,
    num_threads: int | None = None,
    tick: Tick | None = None,
    bandwidth_buffer_bytes: int = BANDWIDTH_BUFFER_BYTES,
    device: torch.device = CPU_DEVICE,
) -> Report:
    """Measure bandwidth and cases on so many threads, and judge them.

    Args:
        benchmark: its name.
        run: makes the cases, given runs and tick.
        num_runs: runs that count, at least 7.
        num_threads: None for PyTorch's present number.
        tick: called after each run with what was run.
        bandwidth_buffer_bytes: what is read to find the peak bandwidth; far larger than the caches.
        device: that the cases run on.

    Raises:
        ConfigError: too few runs or no threads.
    """
    check_runs(num_runs, num_threads)
    with use_threads(num_threads):
        description = describe_device(device)
        peak = peak_read_bandwidth(buffer_bytes=bandwidth_buffer_bytes, device=device)
        cases = run(num_runs, tick)
    return Report(benchmark, description, num_runs, peak, cases, judge(benchmark, cases, peak))


def check_runs(num_runs: int, num_threads: int | None) -> None:
    """Raise ConfigError on too few runs for a median with a spread, or a number of threads below 1."""
    if num_runs < MIN_RUNS:
        raise ConfigError(
            f"--runs must be at least {MIN_RUNS}, so that median and spread mean something; got {num_runs}."
        )
    if num_threads is not None and num_threads < 1:
        raise ConfigError(f"--threads must be at least 1; got {num_threads}.")


def print_report(report: Report, console: Console) -> None:
    """Print device, one table per case, and the targets."""
    console.print(device_text(report.device, report.peak_bytes_per_s, report.num_runs), highlight=False, soft_wrap=True)
    seen: list[dict[str, Any]] = []
    for case in report.cases:
        for model in case.facts.get("models", []):
            if model not in seen:
                seen.append(model)
    if seen:
        console.print(_model_table(seen))
    for case in report.cases:
        console.print(_case_table(case, report.peak_bytes_per_s))
    judged = [verdict for verdict in report.verdicts if verdict.target.case in {case.name for case in report.cases}]
    if judged:
        console.print(_target_table(judged))


def device_text(device: dict[str, Any], peak_bytes_per_s: float | None, num_runs: int) -> str:
    """The device in two lines, and a warning if it was busy."""
    versions = ", ".join(
        f"{name} {device[name]}"
        for name in (
            "ultramem",
            "torch",
            "cuda",
            "transformers",
            "ultra-mem",
            "PEER-pytorch",
            "product-key-memory",
            "python",
        )
        if name in device
    )
    peak = "" if peak_bytes_per_s is None else f"; peak read bandwidth {peak_bytes_per_s / 1e9:.1f} GB/s"
    where = (
        f"{device['processor']} ({device['vector_instructions']}), threads: {device['threads']} on {device['cores']} "
        f"cores, huge pages: {device['huge_pages']}"
    )
    if "accelerator" in device:
        where = f"{device['accelerator']}, decode steps as CUDA graphs; host: {where}"
    text = f"{where}{peak}\n{versions}\nmedian of {num_runs} runs, competitors taken in turns"
    load = device["load_before"]
    if load is not None and load > IDLE_LOAD:
        text += (
            f"\nThe machine was busy before the run (load {load:.1f}): times are of little worth, ratios of some. Run "
            "it again when nothing else runs."
        )
    return text


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        is_text = number == 0 or column in WORDS
        table.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    return table


def _model_table(models: list[dict[str, Any]]) -> Table:
    table = _table("models", "model", "active parameters", "total parameters", "FLOPs per token")
    for model in models:
        numbers = (model[name] for name in ("active_parameters", "total_parameters", "flops_per_token"))
        table.add_row(model["name"], *(f"{number:,}" for number in numbers))
    return table


def _case_table(case: Case, peak_bytes_per_s: float) -> RenderableType:
    columns = ["competitor", "median ms", "fastest – slowest", "× first"]
    read_by = case.facts.get("bytes_read_by")
    if case.bytes_read is not None:
        columns += ["GB/s", "of peak"]
    if case.num_tokens is not None:
        columns.append("tokens/s")
    if read_by:
        columns.append("MB read")
    # A title of its own would be broken at the table's width.
    title = Text(f"{case.name}: {case.sizes}", style="bold")
    table = _table(None, *columns)
    first_s = next(iter(case.timings.values())).median_s if case.timings else 0.0
    for name, timing in case.timings.items():
        cells = [
            name,
            _milliseconds(timing.median_s),
            f"{_milliseconds(timing.fastest_s)} – {_milliseconds(timing.slowest_s)}",
            f"{timing.median_s / first_s:.2f}",
        ]
        if case.bytes_read is not None:
            rate = case.bytes_read / timing.median_s
            cells += [f"{rate / 1e9:.1f}", f"{rate / peak_bytes_per_s:.0%}"]
        if case.num_tokens is not None:
            cells.append(f"{case.num_tokens / timing.median_s:,.0f}")
        if read_by:
            cells.append(f"{read_by[name]['bytes_read'] / 1e6:,.1f}")
        table.add_row(*cells)
    notes = [Text(f"{name}: {reason}", style="yellow") for name, reason in case.unavailable.items()]
    return Group(title, table, *notes)


def _target_table(verdicts: list[Verdict]) -> Table:
    table = _table("targets", "case", "competitor", "target", "measured", "verdict")
    for verdict in verdicts:
        target = verdict.target
        if verdict.ratio is None:
            measured = "–"
        else:
            measured = f"{verdict.ratio:.0%}" if target.quantity == "bandwidth" else f"{verdict.ratio:.2f}×"
        style = {True: "green", False: "bold red", None: "yellow"}[verdict.met]
        table.add_row(target.case, target.ours, target.text, measured, Text(verdict.word, style=style))
    return table


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return (
        f"{milliseconds:.4f}"
        if milliseconds < 1
        else f"{milliseconds:.2f}"
        if milliseconds < 100
        else f"{milliseconds:,.0f}"
    )
