"""Table lookups on this CPU: bytes read per second beside sequential reading, every competitor in turn in one process.

    python benchmarks/table_operators.py                                   # 1.3M rows of 192 + 192, k = 32, N = 2,048
    python benchmarks/table_operators.py --num-tokens 1                    # what one token costs
    python benchmarks/table_operators.py --num-rows 16000000 --width 32    # beside --num-rows 1000000: growth
    python benchmarks/table_operators.py --num-rows 262144 --width 128 --backward

On a machine that others use too, ``--threads 1`` counts the CPU time of the one thread, which their turns are not part
of, though their share of caches and memory is.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from ultramem.ops import RowGradients, bag, gather_dot, pooled_read
from ultramem.ops.cpu import why_unavailable

ROUNDS = 15
# Distinct index tensors, together more rows than caches hold.
NUM_DRAWS = 8


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=1_300_000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--num-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--backward", action="store_true", help="forward and backward, dense and as rows")
    return parser.parse_args()


def cases(args: argparse.Namespace) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name → bytes of table rows that it reads, and what to time."""
    dtype = getattr(torch, args.dtype)
    values, pre_values = (torch.randn(args.num_rows, args.width, dtype=dtype) for _ in range(2))
    x, w = torch.randn(args.num_tokens, args.width, dtype=dtype), torch.randn(args.num_tokens, args.top_k)
    shape = (args.num_tokens, args.top_k)
    draws = itertools.cycle([torch.randint(args.num_rows, shape) for _ in range(NUM_DRAWS)])
    num_bytes = args.num_tokens * args.top_k * args.width * values.element_size()

    def both(backend: str, idx: torch.Tensor, *collectors: RowGradients) -> torch.Tensor:
        for_pre, for_values = collectors or (None, None)
        pre = gather_dot(idx, x, pre_values, backend=backend, row_gradients=for_pre)
        return bag(idx, w * pre, values, backend=backend, row_gradients=for_values)

    def step(backend: str, rows: bool) -> None:
        collectors = [RowGradients(*values.shape) for _ in range(2)] if rows else []
        both(backend, next(draws), *collectors).float().sum().backward()
        for collector in collectors:
            collector.coalesce()
        for tensor in (values, pre_values, x, w):
            tensor.grad = None

    if args.backward:
        for tensor in (values, pre_values, x, w):
            tensor.requires_grad_()
        return {
            f"{backend}, gradients {'as rows' if rows else 'dense'}": (
                2 * num_bytes,
                lambda b=backend, r=rows: step(b, r),
            )
            for backend in ("cpu", "reference")
            for rows in (False, True)
        }
    sequential = torch.ones(1 << 27)
    return {
        "sequential read": (sequential.nbytes, sequential.sum),
        "gather_dot": (num_bytes, lambda: gather_dot(next(draws), x, pre_values)),
        "bag": (num_bytes, lambda: bag(next(draws), w, values)),
        "gather_dot + bag": (2 * num_bytes, lambda: both("cpu", next(draws))),
        "pooled_read": (2 * num_bytes, lambda: pooled_read(next(draws), w, values, x, pre_values)),
        "gather_dot + bag, reference": (2 * num_bytes, lambda: both("reference", next(draws))),
    }


def main() -> None:
    """Time the competitors in turn and print a line for each."""
    args = arguments()
    torch.set_num_threads(args.threads)
    if reason := why_unavailable():
        raise SystemExit(reason)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    competitors = cases(args)
    # Small calls are timed many at once.
    repeats = max(1, 64 // args.num_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    with torch.set_grad_enabled(args.backward):
        for _ in range(ROUNDS + 1):
            for name, (_, call) in competitors.items():
                start = clock()
                for _ in range(repeats):
                    call()
                seconds[name].append((clock() - start) / repeats)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, {args}")
    for name, (num_bytes, _) in competitors.items():
        # The first round builds, maps pages and fills caches.
        times = sorted(seconds[name][1:])
        median = statistics.median(times)
        spread = f"{times[0] * 1e6:12.1f} … {times[-1] * 1e6:.1f}"
        print(f"{name:28} {median * 1e6:12.1f} µs  {spread:>28}  {num_bytes / median / 1e9:6.2f} GB/s")


if __name__ == "__main__":
    main()
