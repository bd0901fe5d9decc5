"""Times of competitors taken in turns within one process, and what they are judged by: the device's read bandwidth."""

import gc
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ultramem

MIN_RUNS = 7
# The first calls build kernels, fill caches and touch fresh memory.
NUM_WARMUPS = 2
# A third-level cache of a large server holds a few hundred MiB.
BANDWIDTH_BUFFER_BYTES = 2**31

Prepared = Callable[[], object]
Tick = Callable[[str], None]

CPU_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Competitor:
    """One of several ways to do the same.

    Attributes:
        prepare: draws fresh inputs, untimed, and returns what is timed.
        num_calls: how many times what is timed does the thing; for what is too short for a clock.
    """

    prepare: Callable[[], Prepared]
    num_calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds of one call in each of the counted runs, in order."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median run."""
        return statistics.median(self.seconds)

    @property
    def fastest_s(self) -> float:
        """The fastest run."""
        return min(self.seconds)

    @property
    def slowest_s(self) -> float:
        """The slowest run."""
        return max(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return {
            "median_s": self.median_s,
            "fastest_s": self.fastest_s,
            "slowest_s": self.slowest_s,
            "num_runs": len(self.seconds),
            "seconds": list(self.seconds),
        }


def alternate(
    competitors: Mapping[str, Competitor],
    num_runs: int,
    num_warmups: int = NUM_WARMUPS,
    tick: Tick | None = None,
    device: torch.device = CPU_DEVICE,
) -> dict[str, Timing]:
    """Time competitors in turns, A B C A B C …, so that what else the machine does meets all of them alike.

    Each counted run follows one of the same competitor that does not count: the one before may have emptied caches, and
    what it frees takes every cached address translation along, which costs a short run a fifth of its time.

    Args:
        competitors: by name.
        num_runs: rounds that count.
        num_warmups: rounds before, which do not.
        tick: called with the competitor's name after each of its runs.
        device: whose work is waited for, before and at the end of a run.

    Returns:
        The times of each, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    with _without_garbage_collection():
        for run in range(num_warmups + num_runs):
            for name, competitor in competitors.items():
                competitor.prepare()()
                timed = competitor.prepare()
                _wait_for(device)
                start_s = time.perf_counter()
                timed()
                _wait_for(device)
                elapsed_s = time.perf_counter() - start_s
                # What a run holds, such as gradients, must not stand in the next competitor's way.
                del timed
                if run >= num_warmups:
                    seconds[name].append(elapsed_s / competitor.num_calls)
                if tick is not None:
                    tick(name)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def use_threads(num_threads: int | None) -> Iterator[None]:
    """Run PyTorch's operators on so many threads; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def huge_page_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of ones in huge pages where the system allows them; every page has been touched."""
    num_elements = 1
    for size in shape:
        num_elements *= size
    # Private: shared memory, which is the default, has huge pages under another setting that is off nearly everywhere.
    memory = mmap.mmap(-1, dtype.itemsize * num_elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Refused where the system has none, and read all the same.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).fill_(1).view(shape)


def peak_read_bandwidth(
    num_runs: int = MIN_RUNS, buffer_bytes: int = BANDWIDTH_BUFFER_BYTES, device: torch.device = CPU_DEVICE
) -> float:
    """Bytes per second at which a device reads memory in order; the CPU on PyTorch's present threads.

    Several reductions over one buffer far larger than the caches, in huge pages; the fastest run of the best one.
    """
    num_elements = buffer_bytes // 4
    buffer = huge_page_tensor(num_elements) if device.type == "cpu" else torch.ones(num_elements, device=device)
    readers: tuple[Prepared, ...] = (
        buffer.sum,
        buffer.view(torch.int64).sum,
        lambda: torch.dot(buffer, buffer),
    )
    competitors = {str(number): Competitor(lambda read=read: read) for number, read in enumerate(readers)}  # type: ignore[misc]
    times = alternate(competitors, num_runs, num_warmups=1, device=device)
    return buffer.nbytes / min(timing.fastest_s for timing in times.values())


def processor_name() -> str:
    """Name of the processor, where the system tells."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def huge_pages() -> str:
    """The system's setting of transparent huge pages: ``always``, ``madvise``, ``never`` or ``unknown``."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return setting.partition("[")[2].partition("]")[0] or "unknown"


def available_bytes(device: torch.device = CPU_DEVICE) -> int | None:
    """Memory of a device that programs can still have, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        # What PyTorch keeps of what was freed is free as well.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def describe_device(device: torch.device = CPU_DEVICE) -> dict[str, Any]:
    """What a time was measured on: processor, threads, versions, huge pages, and how busy the machine already was."""
    accelerator = {}
    if device.type == "cuda":
        accelerator = {"accelerator": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    packages = ("transformers", "ultra-mem", "PEER-pytorch", "product-key-memory")
    return {
        **accelerator,
        "processor": processor_name(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "ultramem": ultramem.__version__,
        "torch": torch.__version__,
        **{name: found for name in packages if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
