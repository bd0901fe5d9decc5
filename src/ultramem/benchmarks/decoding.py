"""`ultramem bench decode`: one decode step of the three kinds of model, and of transformers' own models."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ultramem.benchmarks.bytes_read import count_bytes_read
from ultramem.benchmarks.cases import Case, measure_case
from ultramem.benchmarks.decode_step import DecodeStep, fill_cache, fitting_kv_length, make_step
from ultramem.benchmarks.measure import CPU_DEVICE, Competitor, Tick
from ultramem.benchmarks.targets import DECODE_BATCH_SIZES, OLMO2, OLMOE
from ultramem.benchmarks.twins import BUILDERS, family_configs, model_cost


@dataclass(frozen=True)
class DecodeSizes:
    """What is decoded; the defaults are those of the project's targets.

    Attributes:
        family: presets whose members are compared.
        num_layers: blocks; None for the family's own number.
        batch_sizes: sequences.
        kv_length_tokens: tokens in the cache of each.
    """

    family: str = "base"
    num_layers: int | None = 8
    batch_sizes: tuple[int, ...] = DECODE_BATCH_SIZES
    kv_length_tokens: int = 128


def run_decoding(
    sizes: DecodeSizes, num_runs: int, tick: Tick | None = None, device: torch.device = CPU_DEVICE
) -> list[Case]:
    """Measure one case per batch size.

    Args:
        sizes: of the models and batches.
        num_runs: runs that count.
        tick: called after each run with what was run.
        device: where the models are.
    """
    configs = family_configs(sizes.family, sizes.num_layers)
    models = {name: build(configs[source], device=device) for name, (source, build) in BUILDERS.items()}
    costs = [asdict(model_cost(name, config)) for name, config in configs.items()]
    defaults = DecodeSizes()
    fixed = (sizes.family, sizes.num_layers, sizes.kv_length_tokens)
    at_target = fixed == (defaults.family, defaults.num_layers, defaults.kv_length_tokens) and device.type == "cpu"
    config = next(iter(configs.values()))
    cases = []
    for batch_size in sizes.batch_sizes:
        steps, kv_length_tokens = decode_steps(models, batch_size, sizes.kv_length_tokens)
        words = (
            f"{batch_size} sequence{'s' if batch_size > 1 else ''}, KV length {kv_length_tokens}, "
            f"D = {config.hidden_size}, {config.num_hidden_layers} layers, bf16"
        )
        builders = {name: partial(_competitor, step) for name, step in steps.items()}
        case = measure_case(
            f"batch {batch_size}",
            words,
            builders,
            num_runs,
            tick,
            device,
            num_tokens=batch_size,
            at_target_sizes=at_target and kv_length_tokens == sizes.kv_length_tokens,
        )
        bytes_read = {name: count_bytes_read(step).to_dict() for name, step in steps.items()}
        cases.append(replace(case, facts={"models": costs, "bytes_read_by": bytes_read}))
    return cases


def decode_steps(
    models: dict[str, PreTrainedModel], batch_size: int, kv_length_tokens: int
) -> tuple[dict[str, DecodeStep], int]:
    """Decode steps of models whose attention has the same sizes, behind caches that fit into memory.

    Args:
        models: by name.
        batch_size: B.
        kv_length_tokens: wanted length of the caches.

    Returns:
        steps by name, and the length of the caches. Our models share one cache, and those of transformers one.
    """
    groups = {name: name in (OLMO2, OLMOE) for name in models}
    first = next(iter(models.values()))
    length = fitting_kv_length(first, batch_size, kv_length_tokens, num_caches=len(set(groups.values())))
    caches: dict[bool, Cache] = {}
    for name, model in models.items():
        if groups[name] not in caches:
            caches[groups[name]] = fill_cache(model, batch_size, length)
    return {name: make_step(model, caches[groups[name]], batch_size) for name, model in models.items()}, length


def _competitor(step: DecodeStep) -> Competitor:
    prepare: Callable[[], Callable[[], object]] = step.prepare
    return Competitor(prepare)
