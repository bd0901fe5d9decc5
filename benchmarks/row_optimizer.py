"""Time of one row-wise AdamW step on a small and a large table, and of dense AdamW on the small one.

A step is everything from collected gradients to updated rows: coalescing, clipping, update and `zero_grad`.

    THP_MEM_ALLOC_ENABLE=1 python benchmarks/row_optimizer.py [--moments bf16]

The variable makes PyTorch ask for huge pages, without which looking up the address of a row costs as much as the row.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW

from ultramem.benchmarks.measure import processor_name
from ultramem.ops import RowContribution, RowGradients
from ultramem.training.moments import MOMENT_TYPES
from ultramem.training.row_adamw import RowAdamW

Step = Callable[[], float]


def row_step(num_rows: int, width: int, num_tokens: int, top_k: int, moments: str) -> Step:
    """A function that draws fresh rows for every token, takes a step and returns its time in seconds."""
    table = nn.Parameter(torch.full((num_rows, width), 0.02))
    collector = RowGradients(num_rows, width)
    optimizer = RowAdamW([table], {table: collector}, MOMENT_TYPES[moments]())
    optimizer.step()
    # Untouched zeros have no memory behind them; in a run that has gone on for a while, all moments have.
    for value in optimizer.state[table].values():
        value.fill_(1)

    def step() -> float:
        idx_NK = torch.randint(num_rows, (num_tokens, top_k))
        w_NKC, x_NV = torch.randn(num_tokens, top_k, 1), torch.randn(num_tokens, width)
        collector.add(RowContribution(idx_NK, w_NKC, x_NV, None, 1))
        start_s = time.perf_counter()
        optimizer.clip_rows_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start_s

    return step


def dense_step(num_rows: int, width: int) -> Step:
    """The same for fused `torch.optim.AdamW` with a dense gradient, which is there already."""
    table = nn.Parameter(torch.full((num_rows, width), 0.02))
    optimizer = AdamW([table], fused=True)
    gradient = torch.randn_like(table)

    def step() -> float:
        table.grad = gradient
        start_s = time.perf_counter()
        nn.utils.clip_grad_norm_([table], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start_s

    return step


def alternating_times_s(steps: dict[str, Step], num_runs: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turns; the first two rounds do not count."""
    times_s: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(num_runs + 2):
        for name, step in steps.items():
            seconds = step()
            if run >= 2:
                times_s[name].append(seconds)
    return times_s


def main() -> None:
    """Print medians of alternating steps, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"small": 2**20, "large": 2**24, "width": 32, "tokens": 2048, "top-k": 32, "runs": 15}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--moments", choices=list(MOMENT_TYPES), default="fp32")
    given = parser.parse_args()
    torch.manual_seed(0)
    small, large, dense = (
        f"{kind}, {num_rows:,} rows"
        for kind, num_rows in (("rows", given.small), ("rows", given.large), ("dense", given.small))
    )
    steps = {
        name: row_step(num_rows, given.width, given.tokens, given.top_k, given.moments)
        for name, num_rows in ((small, given.small), (large, given.large))
    }
    times_s = alternating_times_s(steps, given.runs)
    # Apart: it runs through the caches that the others' next step would find as the last one left them.
    times_s |= alternating_times_s({dense: dense_step(given.small, given.width)}, given.runs)
    pages = "huge" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "ordinary"
    print(
        f"{processor_name()}, threads: {torch.get_num_threads()}, torch {torch.__version__}, {pages} pages; width "
        f"{given.width}, {given.tokens:,} tokens × {given.top_k} rows, {given.moments} moments; median of {given.runs} "
        "alternating runs"
    )
    medians_s = {name: statistics.median(values) for name, values in times_s.items()}
    for name, values in times_s.items():
        spread = f"fastest {1e3 * min(values):.1f}, slowest {1e3 * max(values):.1f}"
        print(f"{name}: {1e3 * medians_s[name]:.1f} ms ({spread})")
    print(f"large / small: {medians_s[large] / medians_s[small]:.2f}")
    print(f"dense / rows, small: {medians_s[dense] / medians_s[small]:.1f}")


if __name__ == "__main__":
    main()
