"""The table operators' Triton kernels on a GPU: parity with the references, then bytes per second.

Every figure stands beside the copy bandwidth of the same run, and `bag` beside PyTorch's `embedding_bag`. Bytes are
those that the definition asks for: each selected row once per slot, its operands and its result once.

    make bench-gpu
    python benchmarks/gpu_operators.py --json gpu_operators.json
    TRITON_INTERPRET=1 python benchmarks/gpu_operators.py --device cpu --tiny    # tries the program, measures nothing
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ultramem import ops
from ultramem.files import staged_file
from ultramem.ops import triton as triton_backend

# Longer than the host takes to start any of these: the device then does one kernel after the other, as in training.
HEAD_START_CYCLES = 4_000_000
# Largest copy of all selected rows that a peer may make.
PEER_BYTES = 16 << 30
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}

Run = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """What is measured: every combination, and searches (side, top_k, coarse_top_k) at the first token count."""

    tokens: tuple[int, ...] = (8192, 32768)
    top_ks: tuple[int, ...] = (32, 128, 512)
    widths: tuple[int, ...] = (192, 512, 1024)
    num_rows: int = 2_600_000
    searches: tuple[tuple[int, int, int], ...] = ((360, 32, 32), (528, 128, 128), (528, 768, 128))
    copy_bytes: int = 1 << 30
    flush_bytes: int = 256 << 20


TINY = Sizes((3,), (2,), (8,), 20, ((5, 3, 2),), 1 << 16, 1 << 10)


@dataclass(frozen=True)
class Measurement:
    """One operator at one size: seconds of each counted run, and the bytes that it has to move."""

    operator: str
    sizes: dict[str, int]
    dtype: str
    bytes_moved: int
    times_s: list[float]

    @property
    def median_s(self) -> float:
        """Median of the counted runs."""
        return statistics.median(self.times_s)

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved in the median time."""
        return self.bytes_moved / self.median_s


def time_s(run: Run, device: torch.device, flush: Tensor) -> float:
    """Seconds of one call, on a device by its own clock, with caches that hold something else.

    The device waits until the host has started everything; only what waits for the device itself shows the host's time.
    """
    flush.zero_()
    if device.type == "cpu":
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def alternating_times_s(runs: dict[str, Run], num_runs: int, device: torch.device, flush: Tensor) -> dict[str, list]:
    """Seconds of each, taken in turns; the first two rounds, in which kernels are compiled and tuned, do not count."""
    times_s: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(num_runs + 2):
        for name, run in runs.items():
            seconds = time_s(run, device, flush)
            if number >= 2:
                times_s[name].append(seconds)
    return times_s


def make_operands(
    num_tokens: int, top_k: int, num_rows: int, width: int, num_cores: int, num_blocks: int, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Random operands of the table operators, on the default device."""
    return {
        "idx": torch.randint(num_rows, (num_tokens, top_k)),
        "w": torch.randn(num_tokens, top_k, num_cores, dtype=dtype),
        "x": torch.randn(num_tokens, num_blocks * width, dtype=dtype),
        "table": torch.randn(num_rows, width, dtype=dtype),
        "block": torch.randint(num_blocks, (num_tokens, top_k)) if num_blocks > 1 else None,
    }


def results(name: str, operands: dict, num_rows: int, num_cores: int, num_blocks: int, backend: str) -> list[Tensor]:
    """An operator's result and the gradients of its operands."""
    blocks = {"block_NK": operands["block"], "num_blocks": num_blocks, "backend": backend}
    keys = {"bag": "w table", "gather_dot": "x table", "scatter": "w x"}[name].split()
    values = [operands[key].detach().requires_grad_() for key in keys]
    if name == "bag":
        out = ops.bag(operands["idx"], *values, **blocks)
    elif name == "gather_dot":
        out = ops.gather_dot(operands["idx"], *values, num_cores=num_cores, **blocks)
    else:
        out = ops.scatter(operands["idx"], *values, num_rows, **blocks)
    return [out.detach(), *torch.autograd.grad(out, values, torch.ones_like(out))]


def search_operands(num_tokens: int, num_heads: int, side: int, rank: int, num_cores: int) -> list[Tensor]:
    """Random fine scores and cores with their leading singular pair, on the default device."""
    row, col = torch.randn(2, num_tokens, num_heads, side, rank)
    cores = torch.rand(num_cores, num_heads, rank, rank)
    u, _, vh = torch.linalg.svd(cores.sum(0))
    return [row, col, cores, u[..., :, 0].contiguous(), vh[..., 0, :].contiguous()]


def parity_failures(tiny: bool) -> Iterator[str | None]:
    """Compare kernels with references on the default device: a line for what differs, None for what agrees."""
    shapes = [(5, 3, 11, 6, 1, 1), (4, 5, 13, 9, 3, 4)]
    if not tiny:
        # Odd ones, one row for all, and one of the sizes that are measured.
        shapes += [(1, 1, 1, 1, 1, 1), (33, 70, 2, 250, 2, 1), (301, 33, 1, 192, 1, 1), (2048, 32, 100_000, 192, 2, 1)]
    dtypes = list(TOLERANCES) if not tiny else [torch.bfloat16]
    for shape, dtype, name in itertools.product(shapes, dtypes, ("bag", "gather_dot", "scatter")):
        operands = make_operands(*shape, dtype)
        expected = results(name, operands, *shape[2:3], *shape[4:], "reference")
        ours = results(name, operands, *shape[2:3], *shape[4:], "triton")
        # Sums of many terms err in proportion to the largest result.
        errors = [
            float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1))
            for a, b in zip(ours, expected, strict=True)
        ]
        ok = max(errors) <= TOLERANCES[dtype]
        yield None if ok else f"{name} {shape} {dtype}: relative errors {errors}"
    for shape, top_k, coarse_top_k in [((3, 2, 7, 2, 3), 4, 4)] + (
        [] if tiny else [((512, 2, 360, 2, 2), 128, 128), ((64, 1, 528, 2, 2), 768, 128)]
    ):
        operands = search_operands(*shape)
        (ours, slots), (expected, theirs) = (
            ops.product_topk(*operands, top_k=top_k, coarse_top_k=coarse_top_k, backend=backend)
            for backend in ("triton", "reference")
        )
        # Rounding may exchange neighbours: compare scores in order, and nearly all slots.
        ok = (slots == theirs).float().mean() > 0.999 and torch.allclose(ours.sum(-1), expected.sum(-1), 1e-4, 1e-4)
        yield None if ok else f"product_topk {shape}, top_k {top_k}: other slots or scores"


def table_runs(operands: dict, num_rows: int) -> dict[str, tuple[Run, int]]:
    """What to call for one size, and the bytes that each call has to move."""
    from ultramem.ops.triton import tables

    idx, w, x, table = (operands[key] for key in ("idx", "w", "x", "table"))
    size, num_slots, width = table.element_size(), idx.numel(), table.shape[1]
    w_2 = torch.cat([w, w], dim=2)
    indices, rows, tokens = 8 * num_slots, num_slots * width * size, x.numel() * size
    num_touched = idx.unique().numel()
    sparse = 4 * width * num_touched
    runs: dict[str, tuple[Run, int]] = {
        "gather_dot": (
            lambda: ops.gather_dot(idx, x, table, backend="triton"),
            indices + rows + tokens + num_slots * size,
        ),
        "bag": (lambda: ops.bag(idx, w, table, backend="triton"), indices + rows + tokens + num_slots * size),
        "bag, 2 cores": (
            lambda: ops.bag(idx, w_2, table, backend="triton"),
            indices + rows + tokens + 2 * num_slots * size,
        ),
        "embedding_bag": (
            lambda: torch.nn.functional.embedding_bag(idx, table, per_sample_weights=w[..., 0], mode="sum"),
            indices + rows + tokens + num_slots * size,
        ),
        # x is small enough to stay in the cache: read once per slot, but not from memory.
        "scatter to rows": (
            lambda: tables.scatter_rows(idx, w, x, num_rows),
            indices + num_slots * size + tokens + sparse,
        ),
        "scatter": (
            lambda: ops.scatter(idx, w, x, num_rows, backend="triton"),
            indices + num_slots * size + tokens + sparse + 4 * num_rows * width,
        ),
    }
    if num_slots * width * 4 <= PEER_BYTES:
        runs["scatter, reference"] = (
            lambda: ops.scatter(idx, w, x, num_rows, backend="reference"),
            runs["scatter"][1],
        )
    return runs


def measure(sizes: Sizes, dtype: torch.dtype, num_runs: int, device: torch.device) -> Iterator[list[Measurement]]:
    """Measure the operators of one size after the other, in turns with a copy, which is among what is returned."""
    flush = torch.empty(sizes.flush_bytes, dtype=torch.uint8)
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = {"copy": (lambda: target.copy_(source), 2 * sizes.copy_bytes)}
    name = str(dtype).removeprefix("torch.")
    for width in sizes.widths:
        table = torch.randn(sizes.num_rows, width, dtype=dtype)
        for num_tokens, top_k in itertools.product(sizes.tokens, sizes.top_ks):
            operands = make_operands(num_tokens, top_k, 1, width, 1, 1, dtype)
            operands |= {"table": table, "idx": torch.randint(sizes.num_rows, (num_tokens, top_k))}
            runs = copy | table_runs(operands, sizes.num_rows)
            times_s = alternating_times_s({key: run for key, (run, _) in runs.items()}, num_runs, device, flush)
            where = {"tokens": num_tokens, "top_k": top_k, "width": width, "rows": sizes.num_rows}
            yield [Measurement(key, where, name, bytes_moved, times_s[key]) for key, (_, bytes_moved) in runs.items()]
    num_tokens = sizes.tokens[0]
    for side, top_k, coarse_top_k in sizes.searches:
        scores = search_operands(num_tokens, 1, side, 2, 2)
        bytes_moved = 2 * scores[0].numel() * 4 + num_tokens * top_k * (8 + 2 * 4)

        def search(backend: str, scores=scores, top_k=top_k, coarse_top_k=coarse_top_k) -> Run:
            return lambda: ops.product_topk(*scores, top_k=top_k, coarse_top_k=coarse_top_k, backend=backend)

        searches = {
            "product_topk": search("triton"),
            "product_topk, reference": search("reference"),
            "copy": copy["copy"][0],
        }
        times_s = alternating_times_s(searches, num_runs, device, flush)
        where = {"tokens": num_tokens, "side": side, "top_k": top_k, "coarse_top_k": coarse_top_k}
        yield [
            Measurement(key, where, "float32", copy[key][1] if key == "copy" else bytes_moved, seconds)
            for key, seconds in times_s.items()
        ]


def print_heading(header: dict[str, object]) -> None:
    """Print the device and the names of the columns."""
    print(", ".join(f"{key}: {value}" for key, value in header.items()))
    print("of copy: bytes per second over those of a device-to-device copy (read and written) in turns with it")
    print("peer: how many times faster than embedding_bag (bag) or the reference (scatter, product_topk)")
    print(f"{'operator':26}{'sizes':52}{'median':>11}{'fastest–slowest':>20}{'GB/s':>8}{'of copy':>9}{'peer':>8}")


def report(group: list[Measurement]) -> list[dict[str, object]]:
    """Print the lines of one size; returns them for JSON."""
    (copy,) = (m for m in group if m.operator == "copy")
    rows: list[dict[str, object]] = []
    for m in group:
        if m is copy:
            continue
        peer_name = {"bag": "embedding_bag", "product_topk": "product_topk, reference"}.get(m.operator)
        if m.operator.startswith("scatter") and "reference" not in m.operator:
            peer_name = "scatter, reference"
        peers = [p for p in group if p.operator == peer_name]
        ratio = peers[0].median_s / m.median_s if peers else None
        share = m.bytes_per_s / copy.bytes_per_s
        sizes = " ".join(f"{key}={value}" for key, value in m.sizes.items()) + f" {m.dtype}"
        spread = f"{1e3 * min(m.times_s):.3f}–{1e3 * max(m.times_s):.3f}"
        times = f"{1e3 * m.median_s:.3f} ms"
        print(
            f"{m.operator:26}{sizes:52}{times:>11}{spread:>20}{m.bytes_per_s / 1e9:8.0f}{share:9.0%}"
            + (f"{ratio:7.2f}×" if ratio else f"{'–':>8}"),
            flush=True,
        )
        derived = {"copy_bytes_per_s": copy.bytes_per_s, "of_copy": share, "peer_ratio": ratio}
        rows.append(asdict(m) | {"median_s": m.median_s, "bytes_per_s": m.bytes_per_s} | derived)
    return rows


def main() -> int:
    """Check parity, measure, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1")
    parser.add_argument("--tiny", action="store_true", help="sizes that try the program and measure nothing")
    parser.add_argument("--runs", type=int, default=9, help="counted runs of each operator")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures too")
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "This benchmark needs a CUDA device, and PyTorch finds none here. Run it where there is one, or try the "
            "program with: TRITON_INTERPRET=1 python benchmarks/gpu_operators.py --device cpu --tiny",
            file=sys.stderr,
        )
        return 2
    if reason := triton_backend.why_unavailable():
        print(f"The Triton kernels cannot run: {reason}.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    torch.set_default_device(device)
    checks = list(parity_failures(given.tiny))
    failures = [line for line in checks if line]
    print(f"parity: {len(checks) - len(failures)} of {len(checks)} comparisons with the references agree")
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1
    import triton

    header: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "runs": given.runs,
    }
    print_heading(header)
    rows: list[dict[str, object]] = []
    for group in measure(TINY if given.tiny else Sizes(), getattr(torch, given.dtype), given.runs, device):
        rows += report(group)
        if given.json is not None:
            # What was measured stays, whatever comes after.
            with staged_file(given.json) as stage:
                stage.write_text(json.dumps({**header, "measurements": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
