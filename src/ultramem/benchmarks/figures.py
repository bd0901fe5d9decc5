"""`ultramem reproduce`: inference time and bytes read, as in the papers' figures, on the device at hand.

Figures 1 and 7 of UltraMem (arXiv 2411.12364) show both against the batch size, for one and for three sizes of model;
figure 6c shows the time against the sparse parameters, at batch 512.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ultramem.benchmarks.bytes_read import count_bytes_read
from ultramem.benchmarks.decode_step import DecodeStep, fill_cache, fitting_kv_length, make_step
from ultramem.benchmarks.measure import CPU_DEVICE, Competitor, Tick, alternate
from ultramem.benchmarks.points import GroupKey, Point, PointStore
from ultramem.benchmarks.twins import build_model, family_configs, model_cost, with_sparse_ratio
from ultramem.errors import ConfigError
from ultramem.model import UltraMemConfig

FIGURES = ("figure1", "figure6c", "figure7")
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_BATCH_SIZES = (1, 8, 64)
# Sparse parameters over the dense model's; 0 stands for the family's own.
SPARSE_RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0)
QUICK_SPARSE_RATIOS = (1.0, 4.0)
OWN_RATIO = 0.0


@dataclass(frozen=True)
class Size:
    """Models of one size.

    Attributes:
        family: of presets.
        num_layers: blocks; None for the family's own number.
    """

    family: str
    num_layers: int | None = None


# The first is what `ultramem bench decode` takes.
_SIZES = {
    "figure1": (Size("base", 8),),
    "figure6c": (Size("base", 8),),
    "figure7": (Size("small"), Size("base"), Size("227m")),
}
# The published sizes, which take more memory and bandwidth than a few cores have.
_ACCELERATOR_SIZES = {
    "figure1": (Size("1b"),),
    "figure6c": (Size("227m"),),
    "figure7": (Size("base"), Size("227m"), Size("1b")),
}
_QUICK_SIZES = {
    "figure1": (Size("small", 4),),
    "figure6c": (Size("small", 4),),
    "figure7": (Size("tiny"), Size("small", 4)),
}


@dataclass(frozen=True)
class Plan:
    """Everything that decides the points of a figure.

    Attributes:
        figure: one of `FIGURES`.
        sizes: of the models.
        sparse_ratios: sparse parameters over the dense model's; 0 stands for the families' own.
        batch_sizes: sequences.
        kv_length_tokens: tokens in the cache of each, halved until it fits into memory.
        num_runs: runs of each point that count.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """

    figure: str
    sizes: tuple[Size, ...]
    sparse_ratios: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    kv_length_tokens: int
    num_runs: int
    device: str = "cpu"

    def groups(self) -> list[tuple[Size, float, int]]:
        """What is measured, in order: all models of one size, sparse ratio and batch size at a time."""
        return [
            (size, ratio, batch) for size in self.sizes for ratio in self.sparse_ratios for batch in self.batch_sizes
        ]


def make_plan(
    figure: str,
    quick: bool = False,
    batch_sizes: tuple[int, ...] | None = None,
    kv_length_tokens: int | None = None,
    num_runs: int = 7,
    device: torch.device = CPU_DEVICE,
) -> Plan:
    """The plan of a figure.

    Args:
        figure: one of `FIGURES`.
        quick: smaller models, fewer points, a cache of 256 tokens: a minute instead of many.
        batch_sizes: in place of the figure's own.
        kv_length_tokens: in place of the published 2,048.
        num_runs: runs of each point that count.
        device: that the models run on; on an accelerator they are larger.

    Raises:
        ConfigError: no such figure.
    """
    if figure not in FIGURES:
        raise ConfigError(f"{figure!r} is none of the figures that can be reproduced: {', '.join(FIGURES)}.")
    over_ratio = figure == "figure6c"
    own = ((64,) if quick else (512,)) if over_ratio else QUICK_BATCH_SIZES if quick else BATCH_SIZES
    return Plan(
        figure=figure,
        sizes=(_QUICK_SIZES if quick else _SIZES if device.type == "cpu" else _ACCELERATOR_SIZES)[figure],
        sparse_ratios=(QUICK_SPARSE_RATIOS if quick else SPARSE_RATIOS) if over_ratio else (OWN_RATIO,),
        batch_sizes=batch_sizes or own,
        kv_length_tokens=kv_length_tokens or (256 if quick else 2048),
        num_runs=num_runs,
        device=str(device),
    )


def key_of(size: Size, ratio: float, batch_size: int) -> GroupKey:
    """How a group is found among the points."""
    return _name(size), ratio, batch_size


def measure_figure(plan: Plan, store: PointStore, tick: Tick | None = None) -> None:
    """Measure the groups of a plan that a store does not have yet; each is on the disk as soon as it is measured."""
    done = store.groups
    missing = [group for group in plan.groups() if key_of(*group) not in done]
    for (size, ratio, batch_size), configs, models in _with_models(missing, torch.device(plan.device)):
        store.add(_measure(plan, _name(size), ratio, batch_size, configs, models, tick))


def _name(size: Size) -> str:
    return size.family if size.num_layers is None else f"{size.family}, {size.num_layers} layers"


def _with_models(
    groups: list[tuple[Size, float, int]],
    device: torch.device,
) -> Iterator[tuple[tuple[Size, float, int], dict[str, UltraMemConfig], dict[str, PreTrainedModel]]]:
    """Groups with their models, which are built once for groups that have the same."""
    built: tuple[Size, float] | None = None
    configs: dict[str, UltraMemConfig] = {}
    models: dict[str, PreTrainedModel] = {}
    for group in groups:
        size, ratio, _ = group
        if built != (size, ratio):
            # Gone before the next ones are made: the largest take gigabytes.
            models.clear()
            configs = family_configs(size.family, size.num_layers)
            if ratio != OWN_RATIO:
                configs = with_sparse_ratio(configs, ratio)
            models.update({name: build_model(config, device=device) for name, config in configs.items()})
            built = size, ratio
        yield group, configs, models


def _measure(
    plan: Plan,
    size: str,
    ratio: float,
    batch_size: int,
    configs: dict[str, UltraMemConfig],
    models: dict[str, PreTrainedModel],
    tick: Tick | None,
) -> list[Point]:
    first = next(iter(models.values()))
    length = fitting_kv_length(first, batch_size, plan.kv_length_tokens)
    # One cache for all: their attention has the same sizes, and so a longer one fits.
    cache = fill_cache(first, batch_size, length)
    steps = {name: make_step(model, cache, batch_size) for name, model in models.items()}
    competitors = {name: Competitor(_prepare(step)) for name, step in steps.items()}
    say = None if tick is None else lambda name: tick(f"{size}: {name}, batch {batch_size}, KV length {length}")
    timings = alternate(competitors, plan.num_runs, tick=say, device=torch.device(plan.device))
    points = []
    for name, step in steps.items():
        cost, timing = model_cost(name, configs[name]), timings[name]
        points.append(
            {
                "size": size,
                "sparse_ratio": ratio,
                "batch_size": batch_size,
                "kv_length_tokens": length,
                "model": name,
                "active_parameters": cost.active_parameters,
                "total_parameters": cost.total_parameters,
                "flops_per_token": cost.flops_per_token,
                "num_runs": plan.num_runs,
                "median_s": timing.median_s,
                "fastest_s": timing.fastest_s,
                "slowest_s": timing.slowest_s,
                **count_bytes_read(step).to_dict(),
            }
        )
    return points


def _prepare(step: DecodeStep) -> Callable[[], Callable[[], Any]]:
    return step.prepare
